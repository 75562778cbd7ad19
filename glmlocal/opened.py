"""MODEL, as a person writes it, → an open checkpoint of which headers are enough: from this disk, else from its hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.hub.known import KnownReleases, hub_ids
from glmlocal.hub.local import FamilyNotPulled, NotPulled
from glmlocal.hub.names import Source, parse_source
from glmlocal.resolve import resolve


@dataclass(frozen=True, slots=True)
class Opened:
    checkpoint: Checkpoint
    where: str  # its path, or its page on the hub
    is_remote: bool  # nothing but the headers is on this disk


@contextmanager
def opened(model: str) -> Iterator[Opened]:
    """What lies on this disk under that name, else its headers, read over the network from the hub that has it.

    Of a family of which nothing is here it is the original release, which the others were made of.
    Raises ConfigError for what is neither a path nor a hub's name, DownloadError where the hub cannot be asked or does
    not have it, CheckpointError for bad files.
    """
    source: Source | None = None
    try:
        path = resolve(model)
    except FamilyNotPulled as error:
        source = parse_source(hub_ids(error.family, "huggingface")[0], KnownReleases())
    except NotPulled as error:
        source = error.source
    if source is not None:
        from glmlocal.hub import headers, pull

        hub = pull.connect(source.hub)
        with headers.remote_checkpoint(source, hub) as checkpoint:
            yield Opened(checkpoint, hub.page(source.repo_id), is_remote=True)
        return
    checkpoint = open_checkpoint(path)
    try:
        yield Opened(checkpoint, str(checkpoint.path), is_remote=False)
    finally:
        checkpoint.tensors.close()
