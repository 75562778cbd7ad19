from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from glmlocal.engine import kv_files
from glmlocal.engine.kv_files import BlockFiles
from glmlocal.errors import ConfigError

MODEL, OTHER_MODEL = "0123456789abcdef" * 2, "f" * 32
SIZE = 100
FILE_SIZE = SIZE + kv_files._HEADER.size


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int) -> memoryview:
    return memoryview(bytes([number]) * SIZE)


def opened(directory: Path, *, limit: int = 10, model: str = MODEL, size: int = SIZE) -> BlockFiles:
    return BlockFiles(directory, limit * FILE_SIZE, model, size)


def content(files: BlockFiles, number: int) -> bytes | None:
    into = bytearray(SIZE)
    return bytes(into) if files.read(name(number), memoryview(into)) else None


def path_of(directory: Path, number: int) -> Path:
    return directory / MODEL / f"{name(number).hex()}.kv"


def test_what_was_written_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    opened(tmp_path).write(name(1), payload(1))
    files = opened(tmp_path)
    assert name(1) in files
    assert name(2) not in files
    assert content(files, 1) == bytes([1]) * SIZE
    assert files.stored_bytes == FILE_SIZE


def test_only_the_user_may_read_conversations(tmp_path: Path) -> None:
    opened(tmp_path / "kv").write(name(1), payload(1))
    assert stat.S_IMODE((tmp_path / "kv" / MODEL).stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(tmp_path / "kv", 1).stat().st_mode) == 0o600


def test_the_least_recently_used_go_when_the_limit_is_reached(tmp_path: Path) -> None:
    files = opened(tmp_path, limit=3)
    for number in (1, 2, 3):
        files.write(name(number), payload(number))
    files.touch([name(1)])
    files.write(name(4), payload(4))
    assert [number for number in range(1, 5) if name(number) in files] == [1, 3, 4]
    assert not path_of(tmp_path, 2).exists()
    assert files.stored_bytes == 3 * FILE_SIZE
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == 3 * FILE_SIZE


def test_order_of_use_and_limit_hold_over_restarts_and_over_models(tmp_path: Path) -> None:
    files = opened(tmp_path)
    for number in (1, 2, 3):
        files.write(name(number), payload(number))
        os.utime(path_of(tmp_path, number), ns=(number * 10**9, number * 10**9))
    files.touch([name(1)])
    other = opened(tmp_path, limit=2, model=OTHER_MODEL)
    assert other.stored_bytes == 2 * FILE_SIZE
    other.write(name(9), payload(9))
    assert [number for number in (1, 2, 3) if path_of(tmp_path, number).exists()] == [1]
    assert name(1) not in other  # of another model


def test_a_beginning_outlives_its_end(tmp_path: Path) -> None:
    files = opened(tmp_path, limit=3)
    for number in (3, 2, 1):
        files.write(name(number), payload(number))
    files.touch([name(1), name(2), name(3)])
    files.write(name(4), payload(4))
    assert name(3) not in files
    assert name(1) in files
    assert name(2) in files


@pytest.mark.parametrize("position", [0, 9, 30, 44, 60, kv_files._HEADER.size, FILE_SIZE - 1])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, position: int, caplog: pytest.LogCaptureFixture) -> None:
    files = opened(tmp_path)
    files.write(name(1), payload(1))
    damaged = bytearray(path_of(tmp_path, 1).read_bytes())
    damaged[position] ^= 4
    path_of(tmp_path, 1).write_bytes(damaged)
    assert content(files, 1) is None
    assert "damaged" in caplog.text
    assert files.num_ignored == 1
    assert name(1) not in files
    assert files.stored_bytes == 0
    assert not path_of(tmp_path, 1).exists()
    files.write(name(1), payload(1))
    assert content(files, 1) == bytes([1]) * SIZE


@pytest.mark.parametrize("size", [0, 5, FILE_SIZE - 1, FILE_SIZE + 1])
def test_a_file_of_another_length_is_ignored(tmp_path: Path, size: int) -> None:
    files = opened(tmp_path)
    files.write(name(1), payload(1))
    whole = path_of(tmp_path, 1).read_bytes()
    path_of(tmp_path, 1).write_bytes((whole + b"x")[:size])
    assert content(files, 1) is None


def test_a_file_under_another_name_or_of_another_model_is_ignored(tmp_path: Path) -> None:
    opened(tmp_path).write(name(1), payload(1))
    opened(tmp_path, model=OTHER_MODEL).write(name(3), payload(3))
    os.rename(path_of(tmp_path, 1), path_of(tmp_path, 2))
    os.rename(tmp_path / OTHER_MODEL / path_of(tmp_path, 3).name, path_of(tmp_path, 3))
    files = opened(tmp_path)
    assert name(2) in files
    assert [content(files, number) for number in (2, 3)] == [None, None]


def test_a_file_that_vanished_is_a_miss(tmp_path: Path) -> None:
    files = opened(tmp_path)
    files.write(name(1), payload(1))
    path_of(tmp_path, 1).unlink()
    assert content(files, 1) is None
    assert (files.num_ignored, files.stored_bytes) == (0, 0)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(name(1), payload(1))
    assert list((tmp_path / MODEL).iterdir()) == []
    assert name(1) not in files


def test_old_temporary_files_are_swept_and_new_ones_left(tmp_path: Path) -> None:
    opened(tmp_path)
    old, new = tmp_path / MODEL / ".1-0.tmp", tmp_path / MODEL / ".2-0.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    opened(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_block_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, FILE_SIZE - 1, MODEL, SIZE)
    files.write(name(1), payload(1))
    assert name(1) not in files


def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--kv-dir"):
        opened(tmp_path / "file" / "kv")
