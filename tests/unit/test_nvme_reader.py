"""The native reader: the bytes of the file, urgent ones first, nothing in vain, and what went wrong."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu
from glmlocal.offload import host


@pytest.mark.parametrize(
    ("threads", "piece", "most"), [(0, 4096, 1), (65, 4096, 1), (1, 100, 1), (1, 6000, 1), (1, 4096, 0)]
)
def test_readers_that_cannot_be_are_refused(tmp_path: Path, threads: int, piece: int, most: int) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="NvmeReader: wanted"):
        _cpu.NvmeReader(str(tmp_path / "file"), threads, piece, most)
    with pytest.raises(FileNotFoundError):
        _cpu.NvmeReader(str(tmp_path / "nothing"), 1, 4096, 1)


def test_reads_in_pieces_bring_the_bytes_of_the_file_and_no_more_than_the_queue_holds(tmp_path: Path) -> None:
    data = os.urandom(4096 * 37)
    (tmp_path / "file").write_bytes(data)
    pool = host.HostPool(4, 4096 * 16)
    reader = _cpu.NvmeReader(str(tmp_path / "file"), 3, 8192, 2)
    assert reader.next(0.0) is None
    assert reader.submit(7, 4096 * 3, 4096 * 16, pool.address(1))
    assert reader.submit(8, 4096 * 21, 4096 * 16, pool.address(2))
    assert not reader.submit(9, 0, 4096, pool.address(3))
    assert sorted([reader.next(5.0), reader.next(5.0)]) == [(7, 0), (8, 0)]  # type: ignore[type-var]
    assert bytes(pool.view(1)) == data[4096 * 3 : 4096 * 19]
    assert bytes(pool.view(2)) == data[4096 * 21 :]
    assert not pool.view(0).any()
    assert not pool.view(3).any()
    assert reader.bytes_read == 4096 * 32
    assert reader.submit(1, 4096 * 30, 4096 * 16, pool.address(0))
    assert reader.next(5.0) == (1, _cpu.SHORT_READ)
    with pytest.raises(ValueError, match="multiples of 4096"):
        reader.submit(1, 100, 4096, pool.address(0))
    pool.release(1)
    assert not pool.view(1).any()


@pytest.mark.parametrize(
    ("offset", "num_bytes", "shift"),
    [(100, 4096, 0), (-4096, 4096, 0), (0, 0, 0), (0, -4096, 0), (0, 5000, 0), (0, 4096, 512)],
)
def test_reads_that_cannot_be_direct_are_refused(tmp_path: Path, offset: int, num_bytes: int, shift: int) -> None:
    (tmp_path / "file").write_bytes(os.urandom(8192))
    reader, pool = _cpu.NvmeReader(str(tmp_path / "file"), 1, 4096, 1), host.HostPool(2, 8192)
    with pytest.raises(ValueError, match="must be multiples of 4096"):
        reader.submit(0, offset, num_bytes, pool.address(0) + shift)
    assert reader.submit(0, 0, 8192, pool.address(0)), "nothing was queued"
    assert reader.next(5.0) == (0, 0)


def test_an_error_of_the_system_is_passed_on_and_counts_no_bytes(tmp_path: Path) -> None:
    reader, pool = _cpu.NvmeReader(str(tmp_path), 2, 4096, 2), host.HostPool(1, 1 << 20)
    assert reader.submit(3, 0, 1 << 20, pool.address(0))
    assert reader.next(5.0) == (3, errno.EISDIR)
    assert reader.bytes_read == 0
    assert reader.next(0.0) is None


def test_the_disk_is_busy_while_something_is_read(tmp_path: Path) -> None:
    size = 1 << 26
    (tmp_path / "file").write_bytes(os.urandom(size))
    reader, pool = _cpu.NvmeReader(str(tmp_path / "file"), 1, size, 1), host.HostPool(1, size)
    assert reader.busy_s == 0.0
    start_s = time.perf_counter()
    assert reader.submit(0, 0, size, pool.address(0))
    while not reader.bytes_read:
        meanwhile_s = reader.busy_s
        time.sleep(0.0005)
    assert reader.next(5.0) == (0, 0)
    assert 0 < meanwhile_s <= reader.busy_s <= time.perf_counter() - start_s
    ended_s = reader.busy_s
    time.sleep(0.01)
    assert reader.busy_s == ended_s


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system cannot say what is in the page cache")
def test_what_is_read_through_the_page_cache_does_not_stay_there(tmp_path: Path) -> None:
    size, path = 1 << 20, tmp_path / "file"
    path.write_bytes(os.urandom(size))

    def is_cached() -> bool:
        try:
            return os.preadv(file, [bytearray(size)], 0, os.RWF_NOWAIT) == size
        except BlockingIOError:
            return False

    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            if is_cached():
                pytest.skip("this filesystem keeps its pages")
        except OSError as error:
            pytest.skip(f"this filesystem does not say what is in the page cache: {error}")
        reader, pool = _cpu.NvmeReader(str(path), 1, size, 1, False), host.HostPool(1, size)
        assert reader.submit(0, 0, size, pool.address(0))
        assert reader.next(5.0) == (0, 0)
        assert not is_cached()
    finally:
        os.close(file)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_signals_are_left_to_pythons_threads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    reader = _cpu.NvmeReader(str(tmp_path / "file"), 3, 4096, 1)
    found = [task for task in Path("/proc/self/task").iterdir() if task.name not in before]
    assert len(found) == 3
    for task in found:
        blocked = next(line for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk:"))
        assert int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1
    del reader


def test_a_cancelled_read_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    records, size = 40, 1 << 20
    data = os.urandom(size)
    with open(tmp_path / "file", "wb") as file:
        for _ in range(records):
            file.write(data)
    pool = host.HostPool(records, size)
    reader = _cpu.NvmeReader(str(tmp_path / "file"), 1, 4096, records)
    for slot in range(records):
        assert reader.submit(slot, slot * size, size, pool.address(slot))
    cancelled = [slot for slot in range(1, records - 1) if reader.cancel(slot)]
    assert len(cancelled) > records // 2, "in 4 KiB pieces by one thread they cannot be done already"
    assert not reader.cancel(records), "there is no such read"
    found = dict(reader.next(10.0) for _ in range(records))  # type: ignore[misc]
    assert found == {slot: _cpu.CANCELLED if slot in cancelled else 0 for slot in range(records)}
    assert reader.next(0.0) is None
    assert bytes(pool.view(records - 1)) == data
    assert reader.bytes_read < (records - len(cancelled) + 2) * size, "what is cancelled is not read"
    assert reader.submit(cancelled[0], 0, size, pool.address(cancelled[0])), "its place in the queue is free again"
    assert reader.next(10.0) == (cancelled[0], 0)
    assert bytes(pool.view(cancelled[0])) == data


def test_reads_are_told_in_the_order_in_which_they_ended(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 * 4096))
    reader, pool = _cpu.NvmeReader(str(tmp_path / "file"), 1, 4096, 4), host.HostPool(4, 4096)
    for slot in range(4):
        assert reader.submit(slot, 0, 4096, pool.address(slot))
    while reader.bytes_read < 4 * 4096:
        time.sleep(0.0001)
    time.sleep(0.01)
    assert [reader.next(5.0) for _ in range(4)] == [(slot, 0) for slot in range(4)]


def test_a_cancelled_read_ends_with_the_piece_that_is_under_way(tmp_path: Path) -> None:
    """Until then the memory is the reader's."""
    piece = 1 << 26
    (tmp_path / "file").write_bytes(os.urandom(1 << 20) * 128)
    reader, pool = _cpu.NvmeReader(str(tmp_path / "file"), 1, piece, 1), host.HostPool(1, 2 * piece)
    assert reader.submit(5, 0, 2 * piece, pool.address(0))
    while not reader.busy_s:
        time.sleep(0.0001)
    assert reader.cancel(5), "the second piece has not begun"
    assert reader.next(0.0) is None, "the first one takes 20 ms and more"
    assert reader.next(5.0) == (5, _cpu.CANCELLED)
    assert reader.bytes_read == piece
    assert reader.next(0.0) is None


def test_reads_that_are_not_urgent_come_last_until_they_are(tmp_path: Path) -> None:
    records, size = 6, 1 << 21
    data = os.urandom(records * size)
    (tmp_path / "file").write_bytes(data)
    pool = host.HostPool(records, size)
    reader = _cpu.NvmeReader(str(tmp_path / "file"), 1, 4096, records)  # 512 pieces each
    urgent = (False, False, False, True, True, True)
    for slot in range(records):
        assert reader.submit(slot, slot * size, size, pool.address(slot), urgent[slot])
    assert reader.hurry(2)
    assert not reader.hurry(2), "it is urgent now"
    assert not reader.hurry(3)
    assert not reader.hurry(records), "there is no such read"
    order = [reader.next(10.0) for _ in range(records)]
    assert order == [(slot, 0) for slot in (2, 3, 4, 5, 0, 1)]
    for slot in range(records):
        assert bytes(pool.view(slot)) == data[slot * size : (slot + 1) * size]


def test_few_pieces_that_are_not_urgent_are_under_way_at_a_time(tmp_path: Path) -> None:
    """So that an urgent one finds threads, and the disk free soon."""
    size, piece = 1 << 26, 512 << 10
    (tmp_path / "file").write_bytes(os.urandom(size))
    pool = host.HostPool(1, size)
    reader = _cpu.NvmeReader(str(tmp_path / "file"), 8, size, 1)
    assert reader.submit(0, 0, size, pool.address(0), False)
    while not (before := reader.bytes_read):
        time.sleep(0.0001)
    assert before % piece == 0
    assert reader.cancel(0), "64 MiB take a while"
    after = reader.bytes_read
    assert reader.next(5.0) == (0, _cpu.CANCELLED)
    assert reader.bytes_read <= after + 4 * piece
