"""A file that is being downloaded: its bytes, and a journal of those that are there.

``NAME.partial`` has the file's full length from the start, with holes. ``NAME.journal`` is a line that says what it
belongs to, then lines of two kinds. ``begin end BOOT``: written, and so believed until the machine starts again: a
process that dies loses nothing of the page cache. ``begin end``: synced before the line was written, and so believed
for good. A line that was not finished is not believed, nor is what follows it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from glmlocal.hub.unsynced import boot_id, sync

Extent = tuple[int, int]  # bytes begin … end - 1
_FORMAT = 1
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LINE = re.compile(rb"(\d{1,18}) (\d{1,18})(?: ([A-Za-z0-9-]{1,64}))?\n")


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes as sorted extents that neither touch nor overlap."""
    result: list[Extent] = []
    for begin, end in sorted(extents):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def gaps(extents: Sequence[Extent], size: int) -> list[Extent]:
    """What of ``size`` bytes is not in the merged ``extents``."""
    bounds = [0, *(bound for extent in extents for bound in extent), size]
    return [(begin, end) for begin, end in zip(bounds[::2], bounds[1::2], strict=True) if begin < end]


class PartialFile:
    """One file on its way. ``write`` may be called from several threads, ``note`` and ``sync`` meanwhile from others.

    OSError (a full disk, for one) is the caller's.
    """

    def __init__(self, path: Path, digest: str, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._journal_path = path.with_suffix(".journal")
        self._header = json.dumps({"format": _FORMAT, "digest": digest, "size": size_bytes}) + "\n"
        self._data = self._journal = -1  # descriptors, opened by the first write
        self._lock = threading.Lock()  # of the lists of extents
        self._file_lock = threading.RLock()  # of the descriptors, the journal and the names
        self._is_new = False  # the journal's name may not be on disk
        self._attempt = 0
        self._unsynced_bytes = 0
        self._unnoted: list[Extent] = []  # written, not yet in the journal
        self._written, self._unsynced, self._journal_bytes = self._read_journal()

    @property
    def written(self) -> list[Extent]:
        """What can be read back, whether or not it is in the journal; merged."""
        with self._lock:
            self._written = merged(self._written)
            return list(self._written)

    def missing(self) -> list[Extent]:
        return gaps(self.written, self.size_bytes)

    @property
    def unsynced_bytes(self) -> int:
        """Written since the last ``sync`` began."""
        return self._unsynced_bytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.store(offset, data)
        self.count(offset, offset + len(data))

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """The first half of ``write``: nobody knows of the bytes yet."""
        if self._data < 0:
            self._open()
        rest, position = memoryview(data), offset
        while rest:
            num_bytes = os.pwrite(self._data, rest, position)
            rest, position = rest[num_bytes:], position + num_bytes

    def count(self, begin: int, end: int) -> None:
        """The second half: they are there."""
        with self._lock:
            self._unsynced_bytes += end - begin
            for extents in (self._unnoted, self._written):
                if extents and extents[-1][1] == begin:  # the same stream goes on
                    extents[-1] = (extents[-1][0], end)
                else:
                    extents.append((begin, end))

    def write_missing(self, offset: int, data: bytes | memoryview) -> bool:
        """As ``write``, of what is not there yet: what may have been hashed must not change. Whether there was any."""
        end = offset + len(data)
        new = _common((offset, end), self.missing())
        for begin, until in new:
            self.write(begin, memoryview(data)[begin - offset : until - offset])
        return bool(new)

    def read(self, offset: int, out: bytearray | memoryview) -> int:
        """Fill ``out`` from what was written; returns the bytes read."""
        if self._data < 0:
            self._open()
        return os.preadv(self._data, [out], offset)

    def note(self) -> None:
        """Say in the journal what was written: whoever comes after this process need not fetch it again."""
        with self._file_lock:
            extents = self._take_unnoted()
            if extents and self._journal >= 0:
                self._append(extents, f" {boot_id()}")

    def sync(self) -> None:
        """Bring what was written to the disk, then say so in the journal, for after a power failure too."""
        with self._file_lock:
            self.note()
            with self._lock:
                extents, self._unsynced, self._unsynced_bytes = merged(self._unsynced), [], 0
            if not extents or self._journal < 0:
                return
            # Nobody is kept waiting meanwhile: the file may get its name, or start over.
            data, journal, attempt = os.dup(self._data), os.dup(self._journal), self._attempt
        try:
            os.fdatasync(data)
            with self._file_lock:
                if self._journal < 0 or attempt != self._attempt:
                    return
                self._append(extents, "")
                is_new, self._is_new = self._is_new, False
            os.fdatasync(journal)
            if is_new:
                sync(self.path.parent)
        finally:
            os.close(data)
            os.close(journal)

    def finish(self, target: Path, *, synced: bool = False) -> int:
        """Put the whole, verified file in its place, and the journal away. Returns a descriptor of it, to be synced.

        It waits for the disk only if it is to be ``synced`` before it gets its name.
        """
        if self._data < 0:
            self._open()
        with self._file_lock:
            if synced:
                os.fsync(self._data)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path, target)
            if synced:
                sync(target.parent)
            self._journal_path.unlink()
            data, self._data = self._data, -1
            self._close()
            return data

    def start_over(self) -> None:
        """Believe nothing of what is there."""
        with self._file_lock, self._lock:
            self._close()
            self._journal_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self._unnoted, self._unsynced, self._written = [], [], []
            self._journal_bytes, self._unsynced_bytes = 0, 0
            self._attempt += 1

    def close(self) -> None:
        with self._file_lock:
            self._close()

    def _close(self) -> None:
        for descriptor in (self._data, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._journal = -1

    def _open(self) -> None:
        with self._file_lock:
            if self._data >= 0:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = os.open(self.path, _OPEN, 0o666)
            self._journal = os.open(self._journal_path, _OPEN | os.O_APPEND, 0o666)
            if not self._journal_bytes:
                # The old journal goes first: it must not vouch for new bytes.
                os.ftruncate(self._journal, 0)
                os.ftruncate(data, 0)
                os.ftruncate(data, self.size_bytes)
                self._journal_bytes = os.write(self._journal, self._header.encode("ascii"))
                self._is_new = True
            self._data = data

    def _take_unnoted(self) -> list[Extent]:
        with self._lock:
            extents, self._unnoted = merged(self._unnoted), []
            self._unsynced += extents
        return extents

    def _append(self, extents: Sequence[Extent], boot: str) -> None:
        line = "".join(f"{begin} {end}{boot}\n" for begin, end in extents).encode("ascii")
        os.ftruncate(self._journal, self._journal_bytes)  # an unfinished line must not join the next one
        if os.write(self._journal, line) != len(line):
            raise OSError(errno.ENOSPC, "the journal could not be written in full", str(self._journal_path))
        self._journal_bytes += len(line)

    def _read_journal(self) -> tuple[list[Extent], list[Extent], int]:
        """What is there, what of it is not known to be on disk, and how many of the journal's bytes are believed."""
        try:
            with open(self._journal_path, "rb") as file:
                lines = file.readlines()
            whole = self.path.stat().st_size == self.size_bytes
        except OSError:
            return [], [], 0
        if not whole or not lines or lines[0] != self._header.encode("ascii"):
            return [], [], 0
        written, synced, believed = list[Extent](), list[Extent](), len(lines[0])
        for line in lines[1:]:
            parsed = _parse_line(line, self.size_bytes)
            if parsed is None:
                break
            extent, boot = parsed
            if boot is None:
                synced.append(extent)
            if boot in (None, boot_id()):
                written.append(extent)
            believed += len(line)
        on_disk = merged(synced)
        unsynced = [each for each in gaps(on_disk, self.size_bytes) for each in _common(each, merged(written))]
        return merged(written), unsynced, believed


def _common(extent: Extent, others: Iterable[Extent]) -> list[Extent]:
    """What of ``extent`` is in the others too."""
    cut = ((max(extent[0], begin), min(extent[1], end)) for begin, end in others)
    return [(begin, end) for begin, end in cut if begin < end]


def _parse_line(line: bytes, size: int) -> tuple[Extent, str | None] | None:
    """An extent, and the boot that it is believed in if it was not synced; None for what is no line of ours."""
    fields = _LINE.fullmatch(line)
    if fields is None:
        return None
    begin, end = int(fields[1]), int(fields[2])
    boot = fields[3].decode("ascii") if fields[3] else None
    return ((begin, end), boot) if 0 <= begin < end <= size else None
