"""A download's bytes and its journal, whatever moment it was stopped at."""

from __future__ import annotations

import itertools
import os
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


def test_what_was_committed_is_there_after_reopening_and_nothing_else(tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(10, b"a" * 10)
    file.write(20, b"b" * 5)
    file.commit()
    file.write(50, b"c" * 10)  # not committed: the process dies
    assert file.written == [(10, 25), (50, 60)]
    assert file.unsynced_bytes == 10
    again = open_partial(tmp_path)
    assert again.missing() == [(0, 10), (25, 100)]
    file.close()


def test_a_commit_syncs_the_data_before_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    file.commit()
    file.commit()  # nothing new: nothing to do
    assert order == ["sync .partial", "write .journal", "sync .journal"]
    file.close()


@pytest.mark.parametrize(
    "torn", [b"3", b"30 4", b"30 40", b"\0\0\0\0", b"40 30\n", b"30 101\n", b"30 40 50\n", b"-1 5\n"]
)
def test_a_journal_is_believed_up_to_its_first_bad_line(torn: bytes, tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 20)
    file.commit()
    file.close()
    journal = tmp_path / "x.journal"
    with open(journal, "ab") as stream:
        stream.write(torn)
    again = open_partial(tmp_path)
    assert again.missing() == [(20, 100)]
    again.write(60, b"y" * 10)  # what follows must not join the torn line
    again.commit()
    again.close()
    assert open_partial(tmp_path).missing() == [(20, 60), (70, 100)]


def test_a_line_that_was_written_in_part_does_not_join_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    file = open_partial(tmp_path)
    file.write(0, b"x")
    file.commit()
    file.write(12, b"x" * 18)
    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "write", lambda descriptor, data: write(descriptor, data[:1]))
        with pytest.raises(OSError, match="could not be written in full"):
            file.commit()
    file.write(2, b"x" * 18)  # "2 20" after "1" would be a claim that nobody made
    file.commit()
    file.close()
    assert open_partial(tmp_path).written == [(0, 1), (2, 20)]


@pytest.mark.parametrize("damage", ["other digest", "other size", "no data", "shorter data", "header cut", "garbage"])
def test_a_journal_of_something_else_is_not_believed(damage: str, tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 20)
    file.commit()
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
    again.commit()
    again.close()
    assert data.read_bytes() == b"z" * size


def test_finishing_puts_the_file_in_place_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = open_partial(tmp_path / "work", 5)
    file.write(0, b"hello")
    file.finish(tmp_path / "blobs" / "x")
    assert (tmp_path / "blobs" / "x").read_bytes() == b"hello"
    assert list((tmp_path / "work").iterdir()) == []
    file.commit()  # late, by the thread that reports: harmless


def test_a_file_of_no_bytes_can_be_finished(tmp_path: Path) -> None:
    file = open_partial(tmp_path, 0)
    assert file.missing() == []
    file.finish(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_starting_over_forgets_everything(tmp_path: Path) -> None:
    file = open_partial(tmp_path)
    file.write(0, b"x" * 100)
    file.commit()
    file.start_over()
    assert file.missing() == [(0, 100)]
    assert open_partial(tmp_path).missing() == [(0, 100)]
    file.write(5, b"y")
    file.commit()
    file.close()
    assert open_partial(tmp_path).missing() == [(0, 5), (6, 100)]
    resumed = open_partial(tmp_path)  # one that believed a journal
    resumed.start_over()
    resumed.write(7, b"z")
    resumed.commit()
    resumed.close()
    assert open_partial(tmp_path).missing() == [(0, 7), (8, 100)]
