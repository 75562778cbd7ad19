"""The disk's rates: sizes, refusals, and that nothing stays behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from glmlocal.machine import disk
from glmlocal.machine.disk import DiskProblem
from machines import tree

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PIECE_BYTES", MIB)
    monkeypatch.setattr(disk, "LEAST_FILE_BYTES", 4 * MIB)


def test_rates_of_a_real_directory_and_nothing_left(tmp_path: Path) -> None:
    found = disk.measure(tmp_path / "not yet" / "there", file_bytes=8 * MIB, seconds=0.05)
    assert found.path == str(tmp_path)
    assert found.file_bytes == 8 * MIB
    assert list(found.gb_per_s) == [1, 2, 4]
    assert all(rate > 0 for rate in found.gb_per_s.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["open", "read"])
def test_where_o_direct_is_refused_the_cache_is_read_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real_open, real_preadv, direct = os.open, os.preadv, []
    dropped = []

    def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *arguments, **options)
        if flags & os.O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if where == "read" and direct and not dropped:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: dropped.append(advice))
    found = disk.measure(tmp_path, file_bytes=8 * MIB, seconds=0.02)
    assert not found.direct
    assert min(found.gb_per_s.values()) > 0
    assert os.POSIX_FADV_DONTNEED in dropped


def test_a_disk_that_fails_is_a_problem_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    calls = []

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(DiskProblem, match=r"cannot measure the disk of .*: Input/output error"):
        disk.measure(tmp_path, file_bytes=8 * MIB, seconds=0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_measured_on_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:

        class Full:
            def __init__(self, room: int) -> None:
                self.room = room

            def write(self, piece: Any) -> int:
                if self.room == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.room -= min(self.room, len(piece))
                return len(piece)

            def fileno(self) -> int:
                return file.fileno()

        assert disk._fill(Full(5 * MIB), 8 * MIB) == 5 * MIB  # type: ignore[arg-type]
        with pytest.raises(DiskProblem, match="too little to measure it"):
            disk._fill(Full(2 * MIB), 8 * MIB)  # type: ignore[arg-type]


def test_every_piece_is_read_once_before_any_is_read_again() -> None:
    import random

    offsets = disk._offsets(5 * MIB, random.Random(0))
    first, second = ([next(offsets) for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == [i * MIB for i in range(5)]
    assert first != sorted(first)


def test_the_file_is_a_quarter_of_what_is_free_at_most() -> None:
    assert disk.affordable_bytes(GIB, 100 * GIB) == GIB
    assert disk.affordable_bytes(GIB, 2 * GIB + 5) == GIB // 2
    assert disk.affordable_bytes(GIB, 16 * MIB) == 4 * MIB
    with pytest.raises(DiskProblem, match="free, too little"):
        disk.affordable_bytes(GIB, 16 * MIB - 1)


def test_filesystem_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = "\n".join(
        f"{number} 1 0:1 / {point} rw - {kind} none rw"
        for number, (point, kind) in enumerate(
            [("/", "overlay"), (f"{tmp_path}/a", "xfs"), (f"{tmp_path}/a\\040b", "nfs4"), (f"{tmp_path}/a", "ext4")]
        )
    )
    tree(tmp_path, {"proc/self/mountinfo": mounts})
    assert disk.filesystem(tmp_path / "a" / "c", tmp_path) == "ext4"  # the later mount hides the earlier
    assert disk.filesystem(tmp_path / "a b", tmp_path) == "nfs4"
    assert disk.filesystem(tmp_path / "ab", tmp_path) == "overlay"
    assert disk.filesystem(tmp_path, tmp_path / "none") == ""
