"""How fast a disk reads at random: pieces of an expert's size, past the page cache, on one and on several threads."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from glmlocal.machine.files import read_text
from glmlocal.units import GIB, MIB, format_bytes

PIECE_BYTES = 8 * MIB  # an expert of GLM-4.5-Air in 4 bits is 9.7 MB
FILE_BYTES = GIB
LEAST_FILE_BYTES = 64 * MIB
THREADS = (1, 2, 4)
_WRITE_S = 10.0  # a slow disk is measured on as much of the file as it writes meanwhile


@dataclass(frozen=True, slots=True)
class DiskRates:
    """What was read, how, and how fast."""

    path: str
    filesystem: str
    direct: bool  # O_DIRECT; else through the page cache, which was told to drop the pages first
    file_bytes: int
    gb_per_s: dict[int, float]  # by number of threads


class DiskProblem(Exception):
    """Why a disk could not be measured; in words for a person."""


def measure(directory: Path, *, file_bytes: int = FILE_BYTES, seconds: float = 1.2) -> DiskRates:
    """Write a nameless file into the directory, read it at random for ``seconds`` per number of threads, drop it.

    The file is smaller where free space is scarce, and gone whatever happens. Raises DiskProblem.
    """
    directory = nearest_directory(directory)
    try:
        size = affordable_bytes(file_bytes, shutil.disk_usage(directory).free)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            size = _fill(file, size)
            with _Reader(file.fileno()) as reader:
                rates = {threads: _rate(reader, size, threads, seconds) for threads in THREADS}
                return DiskRates(str(directory), filesystem(directory), reader.direct, size, rates)
    except OSError as error:
        raise DiskProblem(f"cannot measure the disk of {directory}: {error.strerror or error}") from error


def affordable_bytes(wanted: int, free: int) -> int:
    """At most a quarter of what is free, in whole pieces. Raises DiskProblem where that is too little to tell."""
    size = min(wanted, free // 4) // PIECE_BYTES * PIECE_BYTES
    if size < LEAST_FILE_BYTES:
        raise DiskProblem(
            f"the disk has {format_bytes(free)} free, too little to measure it with a file of "
            f"{format_bytes(LEAST_FILE_BYTES)}"
        )
    return size


def nearest_directory(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is a directory."""
    return next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path("/"))


def filesystem(directory: Path, root: Path = Path("/")) -> str:
    """``ext4``, ``tmpfs``, … of the mount that holds the directory; empty where the kernel does not tell."""
    best, kind = -1, ""
    real = os.path.realpath(directory)
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or not kinds:
            continue
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts at one point the later hides the earlier
            best, kind = len(point), kinds[0]
    return kind


def _fill(file: IO[bytes], size: int) -> int:
    """Write data that no filesystem can compress or share; the bytes that are on the disk in the end."""
    noise = os.urandom(PIECE_BYTES + size // PIECE_BYTES)
    end, written = time.monotonic() + _WRITE_S, 0
    try:
        while written < size and (time.monotonic() < end or written < LEAST_FILE_BYTES):
            piece = memoryview(noise)[written // PIECE_BYTES :][:PIECE_BYTES]
            count = file.write(piece)
            written += count
            if count < len(piece):
                break
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    os.fsync(file.fileno())
    size = written // PIECE_BYTES * PIECE_BYTES
    if size < LEAST_FILE_BYTES:
        raise DiskProblem(f"the disk took only {format_bytes(written)}, too little to measure it")
    return size


class _Reader:
    """Reads pieces of an open file past the page cache, with O_DIRECT or, where that is refused, around it."""

    def __init__(self, descriptor: int) -> None:
        self.direct = True
        try:
            self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
        except OSError:
            self._fall_back(descriptor)
            return
        try:
            with mmap.mmap(-1, PIECE_BYTES) as buffer:
                self.read(buffer, 0)
        except OSError:  # some filesystems open it and then refuse to read
            os.close(self._descriptor)
            self._fall_back(descriptor)

    def _fall_back(self, descriptor: int) -> None:
        self.direct, self._descriptor = False, os.dup(descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, buffer: mmap.mmap, offset: int) -> None:
        if not self.direct:
            os.posix_fadvise(self._descriptor, offset, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
        count = os.preadv(self._descriptor, [buffer], offset)
        if count != PIECE_BYTES:
            raise OSError(errno.EIO, f"read {count} of {PIECE_BYTES} bytes")

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def _rate(reader: _Reader, size: int, num_threads: int, seconds: float) -> float:
    """GB/s of so many threads together. Every piece is read once before any is read again."""
    offsets = _offsets(size, random.Random(num_threads))
    lock = threading.Lock()
    counts, failures = [0] * num_threads, list[OSError]()
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        try:
            with mmap.mmap(-1, PIECE_BYTES) as buffer:  # page-aligned, as O_DIRECT wants it
                while counts[number] == 0 or time.perf_counter() < end:
                    with lock:
                        offset = next(offsets)
                    reader.read(buffer, offset)
                    counts[number] += 1
        except OSError as error:
            failures.append(error)

    elapsed_s = _run_threads(work, num_threads)
    if failures:
        raise failures[0]
    return sum(counts) * PIECE_BYTES / elapsed_s / 1e9


def _offsets(size: int, generator: random.Random) -> Iterator[int]:
    order = list(range(0, size, PIECE_BYTES))
    while True:
        generator.shuffle(order)
        yield from order


def _run_threads(work: Callable[[int], None], count: int) -> float:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
