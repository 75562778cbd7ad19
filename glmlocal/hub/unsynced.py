"""Files that have their names but perhaps not yet their bytes on the disk: docs/design/006-pull-durability.md.

A file gets its name as soon as its hash is right; the disk may take its time. Only a machine that goes down (power, a
kernel crash) can lose what is in the page cache, so before a file is fetched a mark of it is made and synced:

models--org--name/.glmlocal/<digest>.<boot id>.unsynced

It goes when the file's fsync has returned. A mark of an earlier boot says that the machine went down in between: the
file is hashed again before anybody believes it. A mark is nothing but a name, so there is nothing in it to be damaged.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.hub.listing import HubFile
from glmlocal.progress import OnBytes, byte_bar, say
from glmlocal.text.files import one_line
from glmlocal.units import MIB, format_bytes

if TYPE_CHECKING:
    from glmlocal.hub.cache import RepoCache

_MARK = re.compile(r"(?P<digest>[0-9a-f]{40}|[0-9a-f]{64})\.(?P<boot>.*)\.unsynced")
_READ_BYTES = MIB
_WRITTEN_AFTER_S = 60.0  # Linux writes what is older than 30 s; then an fsync has nothing to wait for
_LOOK_EVERY_S = 0.2
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Mark:
    """One file that may not be on the disk."""

    path: Path
    digest: str
    boot: str


@functools.cache
def boot_id() -> str:
    """The same as long as the machine runs, and never again: letters, digits and hyphens."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        import psutil

        boot = f"since-{psutil.boot_time():.0f}"
    return re.sub(r"[^A-Za-z0-9-]", "-", boot)[:64]


def sync(path: Path) -> None:
    """What was created, renamed or linked in a directory is there after a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network filesystems that have no such thing
            raise
    finally:
        os.close(handle)


def mark(directory: Path, digests: Iterable[str]) -> list[Mark]:
    """Say of files that are about to be fetched that they may not be on the disk. Raises OSError.

    Once this has returned, the marks survive whatever becomes of the files.
    """
    made = [Mark(directory / f"{digest}.{boot_id()}.unsynced", digest, boot_id()) for digest in digests]
    above = directory
    while not above.exists():  # their names too must be there after a power failure
        above = above.parent
    directory.mkdir(parents=True, exist_ok=True)
    for each in made:
        os.close(os.open(each.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    for path in (directory, *directory.parents):
        sync(path)
        if path == above:
            break
    return made


def marks(directory: Path) -> list[Mark]:
    """Those of a directory, whoever made them."""
    with suppress(OSError):
        found = ((name, _MARK.fullmatch(name)) for name in sorted(os.listdir(directory)))
        return [Mark(directory / name, match["digest"], match["boot"]) for name, match in found if match]
    return []


def in_doubt(cache: RepoCache) -> frozenset[str]:
    """The digests of the files that ``settle`` would hash."""
    return frozenset(each.digest for each in marks(cache.work) if each.boot != boot_id())


def settle(cache: RepoCache, on_wait: Callable[[], object] = lambda: None) -> list[str]:
    """Believe or remove every marked file of a repository; the digests of those that were damaged, and are gone now.

    Marks of this boot are left to their writer, or are done with where the disk has had its time. Files with marks of
    an earlier boot are hashed, with a bar for a person; that needs the repository's lock, and no pull of it goes on
    meanwhile. A cache that cannot be written is hashed each time, and never changed.
    """
    found = marks(cache.work)
    if not found:
        return []
    if not in_doubt(cache):
        with suppress(OSError):
            _settle_written(cache, found)
    while in_doubt(cache):
        try:
            with cache.locked(busy):
                return settle_locked(cache)
        except BlockingIOError:  # by somebody who settles first of all, and may then go on for hours
            on_wait()
            time.sleep(_LOOK_EVERY_S)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            return settle_locked(cache)
    return []


def settle_locked(cache: RepoCache) -> list[str]:
    """As ``settle``, of the marks of earlier boots; the repository's lock must be held, where it can be."""
    blobs = cache.directory / "blobs"
    doubtful = [each for each in marks(cache.work) if each.boot != boot_id()]
    sizes = {each: path.stat().st_size for each in doubtful if (path := blobs / each.digest).is_file()}
    if sizes:
        what = f"{len(sizes)} {'file' if len(sizes) == 1 else 'files'} ({format_bytes(sum(sizes.values()))})"
        say(f"{cache.repo_id}: the machine went down while {what} may not have been on disk; checking", show=True)
    damaged: list[str] = []
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_bytes(done)

    with byte_bar("checking", sum(sizes.values()), show=True) as on_bytes:
        for each, size in sizes.items():
            if not has_digest(blobs / each.digest, HubFile("", size, each.digest), advance):
                damaged.append(each.digest)
                say(f"damaged: {_name_of(cache, each.digest)}", show=True)
    # The files before their marks: whatever stops this leaves the doubt.
    for path in [*(blobs / digest for digest in damaged), *(each.path for each in doubtful)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
    return damaged


def has_digest(path: Path, file: HubFile, advance: OnBytes = lambda num_bytes: None) -> bool:
    """Whether the bytes at ``path`` are the file's; ``advance`` is told of each read, in bytes."""
    hasher, buffer = file.hasher(), bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while num_bytes := stream.readinto(buffer):
            hasher.update(memoryview(buffer)[:num_bytes])
            advance(num_bytes)
    return hasher.hexdigest() == file.digest


def _settle_written(cache: RepoCache, found: Sequence[Mark]) -> None:
    """Sync what the kernel has long written anyway, so that the next start of the machine finds no doubt."""
    blobs = cache.directory / "blobs"
    due = [each for each in found if time.time() - _last_written_s(blobs / each.digest) >= _WRITTEN_AFTER_S]
    if not due:
        return
    with cache.locked(busy):  # by a pull, which cares for its marks itself
        for each in due:
            blob = blobs / each.digest
            if blob.exists():
                sync(blob)
                sync(blobs)
            each.path.unlink(missing_ok=True)
    with suppress(OSError):
        cache.work.rmdir()


def _last_written_s(path: Path) -> float:
    """Seconds since 1970; 0 for a file that is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def busy() -> None:
    """For ``RepoCache.locked``: raises BlockingIOError, an OSError, instead of waiting."""
    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock")


def _name_of(cache: RepoCache, digest: str) -> str:
    """How a person knows the file."""
    for snapshot in cache.snapshots():
        for link in snapshot.rglob("*"):
            if link.is_symlink() and os.path.basename(os.readlink(link)) == digest:
                return one_line(link.relative_to(snapshot).as_posix())
    return digest
