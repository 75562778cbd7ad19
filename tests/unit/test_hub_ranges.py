"""How many requests at the same time, and the bytes on their way to the hasher."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glmlocal.hub import ranges
from glmlocal.hub.download import Progress
from glmlocal.hub.partial import PartialFile
from glmlocal.hub.recent import BUFFER_BYTES, Recent
from hub.pulling import QUICK, REPO, fetch, huggingface, visible_files
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {"config.json": b'{"model_type": "glm4_moe"}', BIG: random.Random(1).randbytes(4_000_000)}
MANY = replace(QUICK, connections=8, range_bytes=200_000)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, FILES)
        yield server


class Most:
    """The most requests of the large file that were served at the same time."""

    def __init__(self, server: HubServer, monkeypatch: pytest.MonkeyPatch, delay_s: float = 0.0) -> None:
        from hub.server import _Handler

        self.now = self.most = 0
        lock, send = threading.Lock(), _Handler._send

        def counted(handler: Any, path: str, *rest: Any) -> None:
            with lock:
                self.now += path == BIG
                self.most = max(self.most, self.now)
            try:
                time.sleep(delay_s)
                send(handler, path, *rest)
            finally:
                with lock:
                    self.now -= path == BIG

        monkeypatch.setattr(_Handler, "_send", counted)


def test_near_a_hub_one_request_is_enough(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_WAITING", 2.0)  # a busy machine is not far away
    seen = Most(server, monkeypatch)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most <= 1 + 1  # a server may still be at the end of an answer that was read
    assert visible_files(tmp_path) == FILES


def test_far_from_a_hub_all_are_used(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Most(server, monkeypatch, delay_s=0.1)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most >= 6
    assert visible_files(tmp_path) == FILES


def test_of_a_hub_that_is_near_and_slow_all_are_used(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fail(BIG, bytes_per_s=300_000, times=10_000)
    seen = Most(server, monkeypatch)
    fetch(huggingface(server, tmp_path), options=MANY)
    assert seen.most >= 6
    assert visible_files(tmp_path) == FILES


def test_never_more_than_were_allowed(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Most(server, monkeypatch, delay_s=0.05)
    fetch(huggingface(server, tmp_path), options=replace(MANY, connections=1))
    assert seen.most == 1


def test_what_was_hashed_is_not_written_again(server: HubServer, tmp_path: Path) -> None:
    """A server without ranges that breaks off, and then sends a wrong byte where it was right before."""
    server.fail(BIG, ignore_range=True)  # found out
    server.fail(BIG, ignore_range=True, cut_after=3_000_000, bytes_per_s=10_000_000)
    server.fail(BIG, ignore_range=True, flip_at=1_000)
    fetch(huggingface(server, tmp_path), options=replace(QUICK, connections=1))
    assert visible_files(tmp_path) == FILES
    whole = [t for _, t, headers in server.requests if "/cdn/" in t and BIG in t and "range" not in headers]
    assert len(whole) == 2


# The buffers between the network and the hash


def filled(recent: Recent, position: int, data: bytes) -> None:
    """What a thread that receives does."""
    buffer = recent.borrow(position)
    assert buffer is not None
    buffer[: len(data)] = data
    recent.keep(position, buffer, len(data))


def test_what_was_kept_is_taken_in_order_and_buffers_go_round() -> None:
    recent = Recent(num_buffers=2, buffer_bytes=4)
    assert recent.take(0) == 1 << 62
    for position in range(0, 40, 8):
        filled(recent, position, b"abcd")
        filled(recent, position + 4, b"efg")
        for offset, expected in ((0, b"abcd"), (4, b"efg")):
            data = recent.take(position + offset)
            assert not isinstance(data, int)
            assert bytes(data) == expected
        assert recent.take(position + 7) == 1 << 62


def test_what_was_read_back_instead_leaves_its_buffer_to_others() -> None:
    recent = Recent(num_buffers=2, buffer_bytes=4)
    recent.take(0)
    filled(recent, 0, b"abcd")
    filled(recent, 4, b"efgh")
    assert recent.take(2) == 4  # the first was passed by, the second is to come
    filled(recent, 8, b"ijkl")
    assert recent.borrow(8) is None
    buffer = recent.take(4)
    assert not isinstance(buffer, int)
    assert bytes(buffer) == b"efgh"


def test_what_came_too_late_or_twice_is_not_kept() -> None:
    recent = Recent(num_buffers=3, buffer_bytes=4)
    recent.take(0)
    late, twice = recent.borrow(0), recent.borrow(4)
    assert late is not None
    assert twice is not None
    filled(recent, 4, b"good")
    recent.take(4)
    recent.keep(0, late, 4)
    recent.take(3)
    filled(recent, 4, b"more")
    recent.keep(4, twice, 4)
    data = recent.take(4)
    assert not isinstance(data, int)
    assert bytes(data) == b"more"
    assert recent.take(0) == 1 << 62


def test_bytes_far_from_the_hasher_get_no_buffer() -> None:
    recent = Recent(num_buffers=2, buffer_bytes=4)
    recent.take(100)
    assert recent.borrow(99) is None
    assert recent.borrow(109) is None
    near = recent.borrow(108)
    assert near is not None
    recent.give_back(near)
    assert recent.borrow(100) is not None
    assert recent.borrow(104) is not None


def test_who_is_ahead_of_the_hash_waits_for_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmlocal.hub.recent._WAIT_S", 10.0)
    recent = Recent(num_buffers=1, buffer_bytes=4)
    recent.take(0)
    filled(recent, 0, b"abcd")
    recent.take(0)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(recent.borrow(4)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    recent.take(4)  # nothing there: it is done with the first
    thread.join(5)
    assert len(got) == 1
    assert got[0] is not None


def test_nobody_waits_for_a_hasher_that_waits() -> None:
    recent = Recent(num_buffers=1, buffer_bytes=4)
    recent.take(0)
    assert recent.borrow(0) is not None  # another has it
    start_s = time.monotonic()
    assert recent.borrow(4) is None
    assert time.monotonic() - start_s < 0.04


def test_the_hasher_is_told_of_what_comes() -> None:
    recent = Recent(num_buffers=1, buffer_bytes=4)
    for come in (recent.tell, lambda: filled(recent, 0, b"abcd")):
        seen = recent.arrivals
        threading.Timer(0.1, come).start()
        start_s = time.monotonic()
        recent.wait(seen, 10.0)
        assert time.monotonic() - start_s < 5
        recent.wait(seen, 10.0)  # what came meanwhile counts


def test_everything_near_is_hashed_from_memory(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And written at multiples of the buffers' size, as the page cache likes it."""
    monkeypatch.setattr(ranges, "_WAITING", 2.0)
    monkeypatch.setattr("glmlocal.hub.recent._WAIT_S", 10.0)
    read, store, written, read_back = PartialFile.read, PartialFile.store, list[tuple[int, int]](), list[int]()

    def counted_read(partial: PartialFile, offset: int, out: Any) -> int:
        read_back.append(offset)
        return read(partial, offset, out)

    def counted_store(partial: PartialFile, offset: int, data: Any) -> None:
        written.append((offset, offset + len(data)))
        store(partial, offset, data)

    monkeypatch.setattr(PartialFile, "read", counted_read)
    monkeypatch.setattr(PartialFile, "store", counted_store)
    fetch(huggingface(server, tmp_path), options=replace(MANY, range_bytes=1_500_000))
    assert visible_files(tmp_path) == FILES
    assert not read_back
    assert all(begin // BUFFER_BYTES == (end - 1) // BUFFER_BYTES for begin, end in written)


@pytest.mark.parametrize(("connections", "most"), [(8, 2), (1, 1)])
def test_several_files_come_at_a_time(
    connections: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_WAITING", 2.0)
    monkeypatch.setattr("glmlocal.hub.download._HASHERS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    files = {f"model-{i:05}-of-00004.safetensors": random.Random(i).randbytes(300_000) for i in range(1, 5)}
    index = json.dumps({"weight_map": {path: path for path in files}}).encode()
    with HubServer() as server:
        server.add(REPO, {"config.json": b"{}", **files, "model.safetensors.index.json": index})
        for path in files:
            server.fail(path, bytes_per_s=1_000_000, times=100)
        at_once: list[int] = []

        def on_progress(progress: Sequence[Progress]) -> None:
            at_once.append(sum(file.done_bytes > 0 and not file.is_complete for file in progress))

        fetch(huggingface(server, tmp_path), options=replace(MANY, connections=connections), on_progress=on_progress)
        assert max(at_once) == most
        assert visible_files(tmp_path)[max(files)] == files[max(files)]
