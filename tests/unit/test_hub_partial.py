"""A download's bytes and its journal, whatever moment it was stopped at."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.hub import partial
from glmlocal.hub.partial import PartialFile, gaps, merged

DIGEST = "ab" * 32
_EXTENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda pair: (pair[0], sum(pair))))


def open_partial(directory: Path, size: int = 100, digest: str = DIGEST) -> PartialFile:
    return PartialFile(directory / "x.partial", digest, size)


@given(_EXTENTS)
def test_merged_extents_cover_the_same_bytes_and_stay_apart(extents: list[tuple[int, int]]) -> None:
    result = merged(extents)
    assert {b for extent in result for b in range(*extent)} == {b for extent in extents for b in range(*extent)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(result))


@given(_EXTENTS)
def test_gaps_are_all_the_other_bytes(extents: list[tuple[int, int]]) -> None:
    covered = {b for extent in extents for b in range(*extent)}
    missing = gaps(merged(extents), 60)
    assert sorted(b for extent in missing for b in range(*extent)) == sorted(set(range(60)) - covered)


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The machine has been down when this returns."""
    boots = (f"boot-{number}" for number in itertools.count())

    def go_down() -> None:
        boot = next(boots)
        monkeypatch.setattr(partial, "boot_id", lambda: boot)

    return go_down


def test_what_was_synced_is_there_after_reopening_and_nothing_else(tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(10, b"a" * 10)
    file.write(20, b"b" * 5)
    file.sync()
    file.write(50, b"c" * 10)  # not noted: the process dies
    assert file.written == [(10, 25), (50, 60)]
    assert file.unsynced_bytes == 10
    again = open_partial(tmp_path)
    assert again.missing() == [(0, 10), (25, 100)]
    file.close()


def test_what_was_noted_is_believed_until_the_machine_goes_down(tmp_path: Path, reboot: Callable[[], None]) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"a" * 10)
    file.sync()
    file.write(20, b"b" * 10)
    file.note()
    file.write(40, b"c" * 10)  # and the process is killed
    assert file.unsynced_bytes == 20
    again = open_partial(tmp_path)
    assert again.written == [(0, 10), (20, 30)]
    again.write(60, b"d" * 5)
    again.note()
    again.close()
    file.close()
    reboot()
    after = open_partial(tmp_path)
    assert after.written == [(0, 10)]
    after.write(10, b"e")
    after.note()
    after.close()
    assert open_partial(tmp_path).written == [(0, 11)]
    reboot()
    assert open_partial(tmp_path).written == [(0, 10)]


def test_what_an_earlier_process_noted_is_synced_by_a_later_one(tmp_path: Path, reboot: Callable[[], None]) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"a" * 10)
    file.note()
    file.close()
    again = open_partial(tmp_path)
    again.write(50, b"b" * 5)
    again.sync()
    again.close()
    reboot()
    assert open_partial(tmp_path).written == [(0, 10), (50, 55)]


def test_notes_go_on_while_the_disk_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, may_go_on = threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(descriptor: int) -> None:
        busy.set()
        assert may_go_on.wait(20)
        fdatasync(descriptor)

    file = open_partial(tmp_path)
    file.write(0, b"a" * 10)
    monkeypatch.setattr(partial.os, "fdatasync", slow)
    thread = threading.Thread(target=file.sync)
    thread.start()
    assert busy.wait(20)
    file.write(10, b"b" * 10)
    file.note()
    assert open_partial(tmp_path).written == [(0, 20)]
    may_go_on.set()
    thread.join()
    file.close()


@pytest.mark.parametrize("then", ["start over", "finish"])
def test_a_sync_that_returns_late_says_nothing_of_what_came_after(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reboot: Callable[[], None]
) -> None:
    fdatasync, file = os.fdatasync, open_partial(tmp_path)

    def meanwhile(descriptor: int) -> None:
        fdatasync(descriptor)
        monkeypatch.setattr(partial.os, "fdatasync", fdatasync)
        if then == "finish":
            os.close(file.finish(tmp_path / "done"))
        else:
            file.start_over()
            file.write(50, b"y")
            file.note()

    file.write(0, b"x" * 100)
    monkeypatch.setattr(partial.os, "fdatasync", meanwhile)
    file.sync()
    assert open_partial(tmp_path).written == ([(50, 51)] if then == "start over" else [])
    reboot()
    assert open_partial(tmp_path).written == []
    file.close()


def test_a_sync_brings_the_data_to_the_disk_before_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, write = os.fdatasync, os.write

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix

    def watched_sync(descriptor: int) -> None:
        order.append(f"sync {name(descriptor)}")
        sync(descriptor)

    def watched_write(descriptor: int, data: bytes) -> int:
        order.append(f"write {name(descriptor)}")
        return write(descriptor, data)

    file = open_partial(tmp_path)
    file.write(0, b"x")
    monkeypatch.setattr(partial.os, "fdatasync", watched_sync)
    monkeypatch.setattr(partial.os, "write", watched_write)
    monkeypatch.setattr(partial, "sync", lambda path: order.append("sync the names"))
    file.sync()
    file.sync()  # nothing new: nothing to do
    assert order == ["write .journal", "sync .partial", "write .journal", "sync .journal", "sync the names"]
    file.close()


@pytest.mark.parametrize(
    "torn",
    [
        b"3",
        b"30 4",
        b"30 40",
        b"\0\0\0\0",
        b"40 30\n",
        b"30 101\n",
        b"30 40 50 60\n",
        b"-1 5\n",
        b"30 40 ../x\n",
        b"30 40 \n",
    ],
)
def test_a_journal_is_believed_up_to_its_first_bad_line(torn: bytes, tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 20)
    file.sync()
    file.close()
    journal = tmp_path / "x.journal"
    with open(journal, "ab") as stream:
        stream.write(torn)
    again = open_partial(tmp_path)
    assert again.missing() == [(20, 100)]
    again.write(60, b"y" * 10)  # what follows must not join the torn line
    again.sync()
    again.close()
    assert open_partial(tmp_path).missing() == [(20, 60), (70, 100)]


def test_a_line_that_was_written_in_part_does_not_join_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    file = open_partial(tmp_path)
    file.write(0, b"x")
    file.sync()
    file.write(12, b"x" * 18)
    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "write", lambda descriptor, data: write(descriptor, data[:1]))
        with pytest.raises(OSError, match="could not be written in full"):
            file.sync()
    file.write(2, b"x" * 18)  # "2 20" after "1" would be a claim that nobody made
    file.note()
    file.close()
    assert open_partial(tmp_path).written == [(0, 1), (2, 20)]


@pytest.mark.parametrize("damage", ["other digest", "other size", "no data", "shorter data", "header cut", "garbage"])
def test_a_journal_of_something_else_is_not_believed(damage: str, tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 20)
    file.sync()
    file.close()
    data, journal = tmp_path / "x.partial", tmp_path / "x.journal"
    match damage:
        case "no data":
            data.unlink()
        case "shorter data":
            os.truncate(data, 99)
        case "header cut":
            os.truncate(journal, 10)
        case "garbage":
            journal.write_bytes(b"\xff" * 1000)
    size = 90 if damage == "other size" else 100
    again = open_partial(tmp_path, size, "cd" * 32 if damage == "other digest" else DIGEST)
    assert again.missing() == [(0, size)]
    again.write(0, b"z" * size)
    again.sync()
    again.close()
    assert data.read_bytes() == b"z" * size


def test_finishing_puts_the_file_in_place_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = open_partial(tmp_path / "work", 5)
    file.write(0, b"hello")
    os.close(file.finish(tmp_path / "blobs" / "x"))
    assert (tmp_path / "blobs" / "x").read_bytes() == b"hello"
    assert list((tmp_path / "work").iterdir()) == []
    file.note()  # late, by the thread that reports: harmless
    file.sync()


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_is_on_disk_before_it_gets_its_name_where_that_is_wanted(
    synced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    file = open_partial(tmp_path / "work", 5)
    file.write(0, b"hello")
    monkeypatch.setattr(partial.os, "fsync", lambda descriptor: (order.append("data"), fsync(descriptor)))
    monkeypatch.setattr(partial.os, "replace", lambda old, new: (order.append("name"), replace(old, new)))
    monkeypatch.setattr(partial, "sync", lambda path: order.append("directory"))
    os.close(file.finish(tmp_path / "x", synced=synced))
    assert order == (["data", "name", "directory"] if synced else ["name"])


def test_a_file_of_no_bytes_can_be_finished(tmp_path: Path) -> None:
    file = open_partial(tmp_path, 0)
    assert file.missing() == []
    os.close(file.finish(tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""


def test_what_is_not_believed_takes_no_room(tmp_path: Path) -> None:
    """The free space was compared with what the disk must still give: bytes that nobody vouches for give none."""
    path = tmp_path / "a.partial"
    path.write_bytes(b"x" * 1_000_000)
    file = PartialFile(path, "ab" * 32, 1_000_000)
    file.write(0, b"new")
    assert path.stat().st_size == 1_000_000
    assert path.stat().st_blocks * 512 < 100_000
    assert path.read_bytes() == b"new" + bytes(999_997)
    file.close()


def test_starting_over_forgets_everything(tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 100)
    file.sync()
    file.start_over()
    assert file.missing() == [(0, 100)]
    assert open_partial(tmp_path).missing() == [(0, 100)]
    file.write(5, b"y")
    file.sync()
    file.close()
    assert open_partial(tmp_path).missing() == [(0, 5), (6, 100)]
    resumed = open_partial(tmp_path)  # one that believed a journal
    resumed.start_over()
    resumed.write(7, b"z")
    resumed.sync()
    resumed.close()
    assert open_partial(tmp_path).missing() == [(0, 7), (8, 100)]
