"""The small files beside a model: whatever stands in their place is an answer at once, and never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glmlocal.errors import CheckpointError
from glmlocal.text.files import read_json_object, read_text_file


def test_a_file_is_its_text_and_none_is_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é\n")
    assert read_text_file(tmp_path / "a") == "é\n"
    assert read_text_file(tmp_path / "b") is None
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_text_file(tmp_path / "link") == "é\n"


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a pipe or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to(path), "cannot read"),
        (lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
        (lambda path: path.write_bytes(b"x" * 101), "larger than 100 B"),
    ],
)
def test_what_is_no_such_file_is_refused(make: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=words):
        read_text_file(tmp_path / "a.json", max_bytes=100)


@pytest.mark.parametrize("text", ["[]", "", "{", "[" * 100_000, '{"a": ' + "9" * 5_000 + "}"])
def test_json_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json_object(tmp_path / "a.json")
