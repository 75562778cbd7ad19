"""MODEL, as a person writes it, → an open checkpoint of which headers are enough: from this disk, else from its hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.hub.local import NotPulled
from glmlocal.resolve import resolve


@dataclass(frozen=True, slots=True)
class Opened:
    checkpoint: Checkpoint
    where: str  # its path, or its page on the hub
    is_remote: bool  # nothing but the headers is on this disk


@contextmanager
def opened(model: str) -> Iterator[Opened]:
    """What lies on this disk under that name, else its headers, read over the network from the hub that has it.

    Raises ConfigError for what is neither a path nor a hub's name, DownloadError where the hub cannot be asked or does
    not have it, CheckpointError for bad files.
    """
    try:
        path = resolve(model)
    except NotPulled as error:
        from glmlocal.hub import headers, pull

        hub = pull.connect(error.source.hub)
        with headers.remote_checkpoint(error.source, hub) as checkpoint:
            yield Opened(checkpoint, hub.page(error.source.repo_id), is_remote=True)
        return
    checkpoint = open_checkpoint(path)
    try:
        yield Opened(checkpoint, str(checkpoint.path), is_remote=False)
    finally:
        checkpoint.tensors.close()
