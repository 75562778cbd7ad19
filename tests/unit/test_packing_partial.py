"""The journal of a pack that is being made: what is synced before it is said, and what is believed afterwards."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from glmlocal.packing.partial import PartialPack, Piece

SIZES = {"a": 64, "b": 32}
PIECES = (Piece("a", 0, 32), Piece("a", 32, 32), Piece("b", 0, 32))


def opened(directory: Path) -> PartialPack:
    return PartialPack(directory / "pack", "identity", SIZES, PIECES)


def make(partial: PartialPack, piece: int) -> None:
    data = np.full(32, piece + 1, np.uint8)
    partial.write(piece, data[:16])
    partial.write(piece, data[16:], 16)
    partial.done(piece, xxhash.xxh3_64_intdigest(data))


def believed(directory: Path) -> set[int]:
    partial = opened(directory)
    with ThreadPoolExecutor(1) as pool:
        partial.check_claims(pool)
    partial.close()
    return set(partial.checksums)


def journal(directory: Path) -> Path:
    return directory / "pack.partial.journal"


def test_the_bytes_are_synced_before_the_journal_says_that_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, calls = opened(tmp_path), list[str]()
    names = {number: name for name, number in partial._files.items()} | {partial._journal: "journal"}
    fdatasync, pwrite = os.fdatasync, os.pwrite
    monkeypatch.setattr(os, "fdatasync", lambda file: (calls.append(f"sync {names[file]}"), fdatasync(file))[1])
    monkeypatch.setattr(
        os, "pwrite", lambda file, *rest: (calls.append(f"write {names[file]}"), pwrite(file, *rest))[1]
    )
    make(partial, 0)
    partial.commit()
    assert calls == ["write a", "write a", "sync a", "sync b", "write journal", "sync journal"]
    partial.close()
    assert believed(tmp_path) == {0}


def test_an_unfinished_line_does_not_join_the_next(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    make(partial, 0)
    partial.commit()
    partial.close()
    with open(journal(tmp_path), "ab") as file:
        file.write(b"1 00112233445566778899 and much more of what a crash has left")
    partial = opened(tmp_path)
    make(partial, 2)
    partial.commit()
    partial.close()
    assert believed(tmp_path) == {0, 2}
    assert journal(tmp_path).read_bytes().count(b"\n") == 3
    assert journal(tmp_path).read_bytes().endswith(b"\n")


def test_what_could_not_be_journalled_is_said_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = opened(tmp_path)
    make(partial, 1)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="full"):
            partial.commit()
    partial.commit()
    partial.close()
    assert believed(tmp_path) == {1}


@pytest.mark.parametrize("spoil", ["shorter", "gone", "another identity"])
def test_a_journal_of_other_files_is_started_over(tmp_path: Path, spoil: str) -> None:
    partial = opened(tmp_path)
    for piece in range(3):
        make(partial, piece)
    partial.commit()
    partial.close()
    assert believed(tmp_path) == {0, 1, 2}
    if spoil == "shorter":
        os.truncate(tmp_path / "pack.partial" / "a", 32)
    elif spoil == "gone":
        (tmp_path / "pack.partial" / "b").unlink()
    else:
        text = journal(tmp_path).read_bytes()
        journal(tmp_path).write_bytes(text.replace(b"identity", b"entities"))
    assert believed(tmp_path) == set()
    assert (tmp_path / "pack.partial" / "a").stat().st_size == 64


def test_bytes_that_are_not_what_the_journal_says_are_made_again(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    for piece in range(3):
        make(partial, piece)
    partial.commit()
    partial.close()
    with open(tmp_path / "pack.partial" / "a", "r+b") as file:
        file.seek(40)
        file.write(b"?")
    assert believed(tmp_path) == {0, 2}
