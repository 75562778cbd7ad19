"""Pulls against a HubServer, with little patience and small ranges."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmlocal.hub import pull
from glmlocal.hub.download import Options
from glmlocal.hub.http import Patience
from glmlocal.hub.huggingface import HuggingFace
from glmlocal.hub.listing import Hub
from glmlocal.hub.modelscope import ModelScope
from glmlocal.hub.names import Source
from hub.server import HubServer

REPO = "zai-org/GLM-test"
SOURCE = Source("huggingface", REPO)
PATIENCE = Patience(connect_s=5, read_s=5, attempts=3, backoff_s=0.01, max_wait_s=2)
QUICK = Options(connections=4, range_bytes=64 << 10, sync_every_s=0.02, report_every_s=0.02, patience=PATIENCE)


def huggingface(server: HubServer, cache: Path, token: str | None = None, **settings: Any) -> HuggingFace:
    return HuggingFace(server.url, cache, token, **{"offline": False, "patience": PATIENCE, **settings})


def modelscope(server: HubServer, cache: Path, token: str | None = None, **settings: Any) -> ModelScope:
    return ModelScope(server.url, cache, token, patience=PATIENCE, **settings)


def fetch(hub: Hub, source: Source = SOURCE, options: Options = QUICK, **more: Any) -> Path:
    """List, select and download; returns what to open."""
    return pull.pull(pull.prepare(source, hub, options), options, **more)


def fetch_twice_at_once(server: HubServer, cache: Path) -> bool:
    """Two pulls of the same at the same time; whether one waited for the other. Raises what they raise."""
    waited = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        pulls = [threads.submit(fetch, huggingface(server, cache), on_wait=waited.set) for _ in range(2)]
        for each in pulls:
            each.result()
    return waited.is_set()


def visible_files(cache: Path) -> dict[str, bytes]:
    """What any other tool would find in the snapshots of a cache, by path in the repository."""
    return {
        "/".join(path.relative_to(snapshot).parts): path.read_bytes()
        for snapshot in cache.glob("models--*/snapshots/*")
        for path in snapshot.rglob("*")
        if path.is_file()
    }


def journalled(cache: Path, *, synced: bool = False) -> dict[str, list[tuple[int, int]]]:
    """What the journals of a cache vouch for (for after a power failure: ``synced``), read without our own code."""
    result: dict[str, list[tuple[int, int]]] = {}
    for journal in cache.glob("models--*/.glmlocal/*.journal"):
        with suppress(FileNotFoundError):  # finished meanwhile
            lines = [line.split() for line in journal.read_bytes().split(b"\n")[1:-1]]
            result[journal.stem] = [(int(line[0]), int(line[1])) for line in lines if len(line) == 2 or not synced]
    return result
