"""Whether a pulled model still has the bytes that it was pulled with.

Blobs are named by their hash, so no hub is asked. A link whose blob is gone counts as missing, and so does what the
safetensors index or a split GGUF's numbers name. A copy in place of a link has no hash to be compared with.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import CheckpointError, DownloadError
from glmlocal.hub import unsynced
from glmlocal.hub.cache import RepoCache, local_selection, snapshot_files
from glmlocal.hub.listing import HubFile
from glmlocal.hub.local import NotPulled, cache_dir
from glmlocal.hub.names import Source
from glmlocal.progress import OnBytes

_THREADS = 2  # disks of today read faster than one core hashes


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a model is on this disk."""

    cache: RepoCache
    snapshot: Path
    files: tuple[HubFile, ...]
    missing: tuple[str, ...]  # paths
    revision: str | None  # to fetch again from

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Paths of the files that nothing says the hash of."""
        return tuple(file.path for file in self.files if not file.digest)


def kept_files(source: Source) -> Kept:
    """Raises NotPulled where there is nothing at all, ConfigError where a quantization must be named or is not here."""
    cache = RepoCache(cache_dir(source.hub), source.repo_id)
    unsynced.settle(cache)  # what it removes is missing below
    commit = cache.commit_of(source.revision)
    snapshot = cache.snapshot(commit) if commit else None
    if commit is None or snapshot is None or not snapshot.is_dir():
        raise NotPulled(source, "is not on this disk")
    present = snapshot_files(snapshot)
    missing = _broken_links(snapshot)
    try:
        selection = local_selection(snapshot, source.repo_id, source.quant)
        files: Sequence[HubFile] = selection.files
        if selection.format == "gguf":
            missing = []  # whole; what is missing is another quantization's
    except (CheckpointError, DownloadError) as error:  # not whole: what there is, then the rest is fetched
        files, missing = present, missing or [f"something ({error})"]
    # A commit of Hugging Face's can be asked for again; ModelScope's snapshots are named by their content.
    revision = commit if source.hub == "huggingface" else source.revision
    return Kept(cache, snapshot, tuple(files), tuple(missing), revision)


def damaged(kept: Kept, on_bytes: OnBytes = lambda num_bytes: None) -> list[HubFile]:
    """The files whose bytes are not those of their names; ``on_bytes`` is told the bytes hashed so far."""
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_bytes(done)

    def is_damaged(file: HubFile) -> bool:
        try:
            return not unsynced.has_digest(kept.snapshot / file.path, file, advance)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return True  # the disk cannot read it back

    hashed = [file for file in kept.files if file.digest]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [file for file, is_bad in zip(hashed, threads.map(is_damaged, hashed), strict=True) if is_bad]


def discard(kept: Kept, files: Sequence[HubFile]) -> None:
    """Remove damaged blobs, so that nobody reads them while they are fetched again."""
    with kept.cache.locked():
        for file in files:
            kept.cache.blob(file).unlink(missing_ok=True)


def _broken_links(snapshot: Path) -> list[str]:
    links = [Path(root, name) for root, _, names in os.walk(snapshot) for name in names]
    return sorted(link.relative_to(snapshot).as_posix() for link in links if not link.exists())
