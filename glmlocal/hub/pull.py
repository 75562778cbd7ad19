"""From a name on a hub to a snapshot on this disk: list, select, check the space, download, publish."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import DownloadError
from glmlocal.formats.safetensors import INDEX_FILE, SINGLE_FILE, read_weight_map
from glmlocal.hub import huggingface, modelscope, unsynced
from glmlocal.hub.cache import RepoCache, blocks_bytes
from glmlocal.hub.download import DEFAULTS, OnProgress, Options, download
from glmlocal.hub.http import DEFAULT_PATIENCE, Patience
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.names import HubName, Source
from glmlocal.hub.partial import PartialFile
from glmlocal.hub.select import Selection, select
from glmlocal.units import MIB, format_bytes

_SPARE_BYTES = 64 * MIB  # for directories, links and journals


@dataclass(frozen=True, slots=True)
class Pull:
    """What a pull will do: everything that can be known before the weights come."""

    source: Source
    hub: Hub
    cache: RepoCache
    listing: Listing
    selection: Selection

    @property
    def missing(self) -> tuple[HubFile, ...]:
        """The files whose bytes are not in the cache yet."""
        return tuple(file for file in self.selection.files if not self.cache.has(file))

    @property
    def snapshot(self) -> Path:
        return self.cache.snapshot(self.listing.commit)

    @property
    def path(self) -> Path:
        """What is opened once it is there: the snapshot, or the (first) GGUF file in it."""
        return self.snapshot / self.selection.first if self.selection.first else self.snapshot

    def bytes_to_fetch(self) -> int:
        """Without what earlier attempts have journalled."""
        return sum(end - begin for file in self.missing for begin, end in self._partial(file).missing())

    def _partial(self, file: HubFile) -> PartialFile:
        return PartialFile(self.cache.partial(file), file.digest, file.size_bytes)


def connect(name: HubName, patience: Patience = DEFAULT_PATIENCE) -> Hub:
    """The hub of that name, as the environment sets it up."""
    return modelscope.connect(patience) if name == "modelscope" else huggingface.connect(patience)


def prepare(source: Source, hub: Hub, options: Options = DEFAULTS) -> Pull:
    """Look the model up. Of its files only the safetensors index is fetched: it says which others belong to it.

    Raises DownloadError, and ConfigError for a quantization that is not there.
    """
    listing = hub.list_files(source.repo_id, source.revision)
    cache = RepoCache(hub.cache_dir, source.repo_id)
    with storing_in(cache):
        unsynced.settle(cache)
    index = next((file for file in listing.files if file.path == INDEX_FILE), None)
    shards: frozenset[str] = frozenset()
    if index is not None and source.quant is None and all(file.path != SINGLE_FILE for file in listing.files):
        with storing_in(cache):
            if not cache.has(index):
                with cache.locked():
                    _fetch([index], cache, listing, hub, options)
            shards = frozenset(read_weight_map(cache.blob(index)).values())
    return Pull(source, hub, cache, listing, select(listing.files, source.repo_id, source.quant, shards))


def pull(
    plan: Pull,
    options: Options = DEFAULTS,
    on_progress: OnProgress = lambda progress: None,
    on_wait: Callable[[], object] = lambda: None,
) -> Path:
    """Do it, and return what to open. ``on_wait`` is called when another process is at the same repository.

    Raises DownloadError. Whatever ends it, the next call goes on from there.
    """
    with storing_in(plan.cache):
        if not plan.missing and plan.cache.is_published(plan.listing, plan.selection.files):
            # Nothing has to be written, so a cache that cannot be written, or that another process is at, will do.
            with suppress(OSError):
                if plan.cache.leftovers():
                    with plan.cache.locked(unsynced.busy):
                        plan.cache.sweep()
            return plan.path
    with storing_in(plan.cache), plan.cache.locked(on_wait):
        unsynced.settle_locked(plan.cache)
        missing = plan.missing  # another process may have brought some while this one waited
        check_room(plan)
        _fetch(missing, plan.cache, plan.listing, plan.hub, options, on_progress)
        plan.cache.publish(plan.listing, plan.selection.files)
        plan.cache.sweep()
    return plan.path


def check_room(plan: Pull) -> None:
    """Raise DownloadError unless the disk has room for what is missing."""
    check_space({plan.cache.directory: _bytes_to_write(plan.cache, plan.missing)})


def free_bytes(path: Path) -> int:
    """Of the filesystem that ``path`` is on, or will be."""
    system = os.statvfs(_existing(path))
    return system.f_bavail * system.f_frsize


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_space(needs: Mapping[Path, int]) -> None:
    """Raise DownloadError unless every filesystem has room for what is to be written below these directories."""
    by_device: dict[int, tuple[Path, int]] = {}
    for path, num_bytes in needs.items():
        existing = _existing(path)
        first, before = by_device.get(existing.stat().st_dev, (existing, 0))
        by_device[existing.stat().st_dev] = (first, before + num_bytes)
    for path, num_bytes in by_device.values():
        free = free_bytes(path)
        if num_bytes and num_bytes + _SPARE_BYTES > free:
            short = num_bytes + _SPARE_BYTES - free
            raise DownloadError(
                f"the disk of {path} is too small: {format_bytes(num_bytes)} are to come, {format_bytes(free)} are "
                f"free, {format_bytes(short)} ({short:,} bytes) are missing; free some, or set HF_HOME to another disk"
            )


def _bytes_to_write(cache: RepoCache, files: Sequence[HubFile]) -> int:
    """What the disk must still give: partial files have some of it already."""
    return sum(max(file.size_bytes - blocks_bytes(cache.partial(file)), 0) for file in files)


def fetch_files(
    plan: Pull, files: Sequence[HubFile], options: Options, on_progress: OnProgress = lambda progress: None
) -> None:
    """Bring these files of the model into the cache, and leave the rest. The cache's lock must be held.

    Raises DownloadError; OSError is for ``storing_in``.
    """
    _fetch(files, plan.cache, plan.listing, plan.hub, options, on_progress)


def _fetch(
    files: Sequence[HubFile],
    cache: RepoCache,
    listing: Listing,
    hub: Hub,
    options: Options,
    on_progress: OnProgress = lambda progress: None,
) -> None:
    if not files:
        return
    (cache.directory / "blobs").mkdir(parents=True, exist_ok=True)
    by_digest = {file.digest: file for file in files}  # two names for the same bytes are one download
    download(
        [
            (file, PartialFile(cache.partial(file), file.digest, file.size_bytes), cache.blob(file))
            for file in by_digest.values()
        ],
        listing,
        hub,
        options,
        on_progress,
    )


@contextmanager
def storing_in(cache: RepoCache) -> Iterator[None]:
    """OSError of the cache → one clear line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or cache.directory, error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk of {cache.directory} is full; free some space and run the same command again: "
                "it goes on where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DownloadError(f"cannot write {where} ({reason}); set HF_HOME to a directory that is yours") from error
        raise DownloadError(f"cannot store the model in {cache.directory}: {reason}") from error
