"""A file that is being downloaded: its bytes, and a journal of those that are known to be on disk.

``NAME.partial`` has the file's full length from the start, with holes. ``NAME.journal`` is a line that says what it
belongs to, then a line ``begin end`` per extent, appended only after the bytes were synced: what the journal says is
true whenever the process or the machine stops. A line that was not finished is not believed.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from glmlocal.hub.cache import sync

Extent = tuple[int, int]  # bytes begin … end - 1
_FORMAT = 1
_LINE = re.compile(rb"(\d{1,18}) (\d{1,18})\n")


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
    """One file on its way. ``write`` may be called from several threads, ``commit`` meanwhile from another.

    OSError (a full disk, for one) is the caller's.
    """

    def __init__(self, path: Path, digest: str, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._journal_path = path.with_suffix(".journal")
        self._header = json.dumps({"format": _FORMAT, "digest": digest, "size": size_bytes}) + "\n"
        self._data = self._journal = -1  # descriptors, opened by the first write
        self._lock = threading.Lock()  # of _pending and _written
        self._commit_lock = threading.Lock()
        self._pending: list[Extent] = []  # written, not yet in the journal
        self._unsynced_bytes = 0
        self._written, self._journal_bytes = self._read_journal()

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
        """Written since the last commit began."""
        return self._unsynced_bytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        if self._data < 0:
            self._open()
        rest, position = memoryview(data), offset
        while rest:
            num_bytes = os.pwrite(self._data, rest, position)
            rest, position = rest[num_bytes:], position + num_bytes
        with self._lock:
            self._unsynced_bytes += position - offset
            for extents in (self._pending, self._written):
                if extents and extents[-1][1] == offset:  # the same stream goes on
                    extents[-1] = (extents[-1][0], position)
                else:
                    extents.append((offset, position))

    def read(self, offset: int, out: bytearray) -> int:
        """Fill ``out`` from what was written; returns the bytes read."""
        if self._data < 0:
            self._open()
        return os.preadv(self._data, [out], offset)

    def commit(self) -> None:
        """Sync the data, then say in the journal that it is there."""
        with self._commit_lock:
            with self._lock:
                extents, self._pending, self._unsynced_bytes = merged(self._pending), [], 0
            if not extents or self._data < 0:
                return
            os.fdatasync(self._data)
            line = "".join(f"{begin} {end}\n" for begin, end in extents).encode("ascii")
            os.ftruncate(self._journal, self._journal_bytes)  # an unfinished line must not join the next one
            if os.write(self._journal, line) != len(line):
                raise OSError(28, "the journal could not be written in full", str(self._journal_path))
            os.fdatasync(self._journal)
            self._journal_bytes += len(line)

    def finish(self, target: Path) -> None:
        """Put the whole, verified file in its place: data first, then the name, then the journal goes."""
        if self._data < 0:
            self._open()
        with self._commit_lock:
            os.fsync(self._data)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path, target)
            sync(target.parent)
            self._journal_path.unlink()
            self._close()

    def start_over(self) -> None:
        """Believe nothing of what is there."""
        with self._commit_lock, self._lock:
            self._close()
            self._journal_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self._pending, self._written, self._journal_bytes, self._unsynced_bytes = [], [], 0, 0

    def close(self) -> None:
        with self._commit_lock:
            self._close()

    def _close(self) -> None:
        for descriptor in (self._data, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._journal = -1

    def _open(self) -> None:
        with self._commit_lock:
            if self._data >= 0:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if not self._journal_bytes:
                # In this order: a journal that can be read means that the file has its length.
                os.ftruncate(data, 0)
                os.ftruncate(data, self.size_bytes)
                os.fsync(data)
                os.ftruncate(self._journal, 0)
                self._journal_bytes = os.write(self._journal, self._header.encode("ascii"))
                os.fsync(self._journal)
                sync(self.path.parent)
            self._data = data

    def _read_journal(self) -> tuple[list[Extent], int]:
        """What it vouches for, and how many of its bytes are to be believed."""
        try:
            with open(self._journal_path, "rb") as file:
                lines = file.readlines()
            whole = self.path.stat().st_size == self.size_bytes
        except OSError:
            return [], 0
        if not whole or not lines or lines[0] != self._header.encode("ascii"):
            return [], 0
        extents, believed = [], len(lines[0])
        for line in lines[1:]:
            extent = _parse_line(line, self.size_bytes)
            if extent is None:
                break
            extents.append(extent)
            believed += len(line)
        return merged(extents), believed


def _parse_line(line: bytes, size: int) -> Extent | None:
    fields = _LINE.fullmatch(line)
    if fields is None:
        return None
    begin, end = int(fields[1]), int(fields[2])
    return (begin, end) if 0 <= begin < end <= size else None
