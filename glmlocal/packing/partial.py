"""A pack that is being made: its two files, and a journal of the pieces that are known to be in them.

``NAME.partial/`` has both files at their full length from the start, with holes. ``NAME.partial.journal`` is a line
that says what it belongs to, then a line ``piece checksum`` per record or tensor, appended only after the bytes were
synced. A line that was not finished is not believed, and what the others say is compared with the bytes before
anything is built on it. Renaming the directory is what publishes the pack; nothing of it is visible before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from glmlocal.errors import ConfigError

_LINE = re.compile(rb"(\d{1,9}) ([0-9a-f]{16})\n")
_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one of the files that are made and journalled together."""

    file: str
    offset: int
    nbytes: int


class PartialPack:
    """``write`` and ``done`` may be called from several threads, ``commit`` meanwhile from another.

    OSError (a full disk, for one) is the caller's. Raises ConfigError where another process makes the same pack.
    """

    def __init__(self, target: Path, identity: str, sizes: dict[str, int], pieces: Sequence[Piece]) -> None:
        self.target = target
        self.directory = target.with_name(target.name + ".partial")
        self.pieces = pieces
        self._journal_path = target.with_name(target.name + ".partial.journal")
        self._header = f"glmlocal pack 1 {identity}\n".encode("ascii")
        self._lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._pending: dict[int, int] = {}  # piece → checksum, written but not yet in the journal
        self.checksums: dict[int, int] = {}  # piece → checksum of all that are written
        target.parent.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._files: dict[str, int] = {}
        try:
            self._take_lock()
            claimed, self._journal_bytes = self._read_journal(sizes)
            if not self._journal_bytes:
                self._start_over(sizes)
            self._files = {name: os.open(self.directory / name, os.O_RDWR | os.O_CLOEXEC) for name in sizes}
        except BaseException:
            self.close()
            raise
        self.claimed = claimed  # by the journal: ``check_claims`` makes checksums of them

    def check_claims(self, pool: Executor, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read back what the journal says is there, and believe what has the checksum that it says."""

        def check(piece: int) -> bool:
            good = self._checksum(self.pieces[piece]) == self.claimed[piece]
            on_bytes(self.pieces[piece].nbytes)
            return good

        found = zip(self.claimed, pool.map(check, self.claimed), strict=True)
        self.checksums = {piece: self.claimed[piece] for piece, good in found if good}

    def write(self, piece: int, data: NDArray[np.uint8], position: int = 0) -> None:
        """Put bytes into a piece, from ``position`` of it on."""
        where = self.pieces[piece]
        self._write_at(where.file, where.offset + position, data)

    def done(self, piece: int, checksum: int) -> None:
        """All bytes of the piece are written."""
        with self._lock:
            self.checksums[piece] = self._pending[piece] = checksum

    def commit(self) -> None:
        """Sync what was written, then say in the journal that it is there."""
        with self._commit_lock:
            with self._lock:
                pending, self._pending = self._pending, {}
            if not pending:
                return
            try:
                for file in self._files.values():
                    os.fdatasync(file)
                lines = b"".join(b"%d %016x\n" % item for item in pending.items())
                os.ftruncate(self._journal, self._journal_bytes)  # an unfinished line must not join the next one
                if os.pwrite(self._journal, lines, self._journal_bytes) != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._journal_path))
                os.fdatasync(self._journal)
            except OSError:
                with self._lock:
                    self._pending = {**pending, **self._pending}
                raise
            self._journal_bytes += len(lines)

    def publish(self, headers: dict[str, bytes]) -> None:
        """Write the beginnings of the files, and give the directory its name. All pieces must be done."""
        self.commit()
        for name, header in headers.items():
            self._write_at(name, 0, np.frombuffer(header, np.uint8))
        for path in self.directory.iterdir():
            _sync(path)
        _sync(self.directory)
        os.rename(self.directory, self.target)
        _sync(self.target.parent)
        self._journal_path.unlink()
        self.close()

    def close(self) -> None:
        for file in (*self._files.values(), self._journal):
            with suppress(OSError):
                os.close(file)
        self._files = {}
        self._journal = -1

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is making {self.target}; wait for it, or give another --out") from None

    def _read_journal(self, sizes: dict[str, int]) -> tuple[dict[int, int], int]:
        """What it claims, and how many of its bytes are whole lines; 0 when nothing there can be used."""
        try:
            whole = all((self.directory / name).stat().st_size == size for name, size in sizes.items())
        except OSError:
            return {}, 0
        text = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        if not whole or not text.startswith(self._header):
            return {}, 0
        claimed, believed = {}, len(self._header)
        while (line := _LINE.match(text, believed)) and int(line[1]) < len(self.pieces):
            claimed[int(line[1])] = int(line[2], 16)
            believed = line.end()
        return claimed, believed

    def _start_over(self, sizes: dict[str, int]) -> None:
        os.ftruncate(self._journal, 0)
        with suppress(FileNotFoundError):
            shutil.rmtree(self.directory)
        self.directory.mkdir()
        for name, size in sizes.items():
            with open(self.directory / name, "xb") as file:
                file.truncate(size)
                os.fsync(file.fileno())
        _sync(self.directory)
        # Last: a journal that can be read means that the files have their lengths.
        self._journal_bytes = os.pwrite(self._journal, self._header, 0)
        os.fsync(self._journal)
        _sync(self.target.parent)

    def _write_at(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        rest = data.data
        while rest:
            num_bytes = os.pwrite(self._files[name], rest, offset)
            offset, rest = offset + num_bytes, rest[num_bytes:]

    def _checksum(self, piece: Piece) -> int:
        digest, buffer = xxhash.xxh3_64(), np.empty(min(piece.nbytes, _COPY_BYTES), np.uint8)
        for begin in range(0, piece.nbytes, _COPY_BYTES):
            part = buffer[: min(_COPY_BYTES, piece.nbytes - begin)]
            if os.preadv(self._files[piece.file], [part.data], piece.offset + begin) != part.nbytes:
                return -1
            digest.update(part.data)
        return digest.intdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
