"""How many requests at the same time, and the bytes on their way to the hasher."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glmlocal.hub import ranges
from glmlocal.hub.recent import Recent
from hub.pulling import QUICK, REPO, fetch, huggingface, visible_files
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {"config.json": b'{"model_type": "glm4_moe"}', BIG: random.Random(1).randbytes(4_000_000)}
MANY = replace(QUICK, connections=8, range_bytes=200_000)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, FILES)
        yield server


class Most:
    """The most requests of the large file that were served at the same time."""

    def __init__(self, server: HubServer, monkeypatch: pytest.MonkeyPatch, delay_s: float = 0.0) -> None:
        from hub.server import _Handler

        self.now = self.most = 0
        lock, send = threading.Lock(), _Handler._send

        def counted(handler: Any, path: str, *rest: Any) -> None:
            with lock:
                self.now += path == BIG
                self.most = max(self.most, self.now)
            try:
                time.sleep(delay_s)
                send(handler, path, *rest)
            finally:
                with lock:
                    self.now -= path == BIG

        monkeypatch.setattr(_Handler, "_send", counted)


def test_near_a_hub_one_request_is_enough(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_WAITING", 2.0)  # a busy machine is not far away
    seen = Most(server, monkeypatch)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most <= 1 + 1  # a server may still be at the end of an answer that was read
    assert visible_files(tmp_path) == FILES


def test_far_from_a_hub_all_are_used(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Most(server, monkeypatch, delay_s=0.1)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most >= 6
    assert visible_files(tmp_path) == FILES


def test_of_a_hub_that_is_near_and_slow_all_are_used(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fail(BIG, bytes_per_s=300_000, times=10_000)
    seen = Most(server, monkeypatch)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most >= 6
    assert visible_files(tmp_path) == FILES


def test_never_more_than_were_allowed(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Most(server, monkeypatch, delay_s=0.05)
    fetch(huggingface(server, tmp_path), options=replace(MANY, connections=1))
    assert seen.most == 1


def test_what_was_hashed_is_not_written_again(server: HubServer, tmp_path: Path) -> None:
    """A server without ranges that breaks off, and then sends a wrong byte where it was right before."""
    server.fail(BIG, ignore_range=True)  # found out
    server.fail(BIG, ignore_range=True, cut_after=3_000_000, bytes_per_s=10_000_000)
    server.fail(BIG, ignore_range=True, flip_at=1_000)
    fetch(huggingface(server, tmp_path), options=replace(QUICK, connections=1))
    assert visible_files(tmp_path) == FILES
    whole = [t for _, t, headers in server.requests if "/cdn/" in t and BIG in t and "range" not in headers]
    assert len(whole) == 2
