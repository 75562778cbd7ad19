from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmlocal.cli import transcript
from glmlocal.cli.transcript import FileTaken, Message, Transcript, load, save, to_markdown
from glmlocal.errors import ConfigError

MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4 中", "reasoning_content": "\nadd\n"},
]
TALK = Transcript("a model", MESSAGES)

text = st.text(st.characters(codec="utf-8"), max_size=20)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": text}, optional={"reasoning_content": text}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(model=text, messages=st.lists(turn, max_size=4), system=st.none() | text)
def test_json_round_trip(tmp_path: Path, model: str, messages: list[Message], system: str | None) -> None:
    head = [] if system is None else [{"role": "system", "content": system}]
    save(Transcript(model, head + messages), tmp_path / "x.json", overwrite=True)
    assert load(tmp_path / "x.json") == Transcript(model, head + messages)


def test_markdown() -> None:
    assert to_markdown(TALK) == (
        "# Conversation with a model\n\n## System\n\nBe brief.\n\n## You\n\n2+2?\n\n## Assistant\n\n"
        "<details><summary>Thinking</summary>\n\nadd\n\n</details>\n\n4 中\n"
    )


@pytest.mark.parametrize("name", ["x.md", "x.MARKDOWN", "x.txt"])
def test_markdown_suffixes(tmp_path: Path, name: str) -> None:
    save(TALK, tmp_path / name)
    assert (tmp_path / name).read_text("utf-8") == to_markdown(TALK)


@pytest.mark.parametrize("name", ["x", "x.doc", ".md"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"has to end in \.md \(to read\) or \.json"):
        save(TALK, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("mine")
    with pytest.raises(FileTaken, match="exists; nothing was written"):
        save(TALK, path)
    assert path.read_text() == "mine"
    save(TALK, path, overwrite=True)
    assert path.read_text("utf-8") == to_markdown(TALK)


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileTaken):
        save(TALK, tmp_path / "x.md")


def test_somebody_faster_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    (tmp_path / "x.md").write_text("faster")
    with pytest.raises(FileTaken):
        save(TALK, tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text() == "faster"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_filesystem_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save(TALK, tmp_path / "x.md")
    assert [p.name for p in tmp_path.iterdir()] == ["x.md"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["fsync", "link", "replace"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, overwrite: bool
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if overwrite:
        (tmp_path / "x.md").write_text("before")
    before = [(p.name, p.read_text()) for p in tmp_path.iterdir()]
    monkeypatch.setattr(os, failing, full)
    if failing == ("link" if overwrite else "replace"):
        return  # not used on this path
    with pytest.raises(OSError, match="No space"):
        save(TALK, tmp_path / "x.md", overwrite=overwrite)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == before


def test_directories_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "dir.md").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        save(TALK, tmp_path / "dir.md")
    with pytest.raises(FileNotFoundError):
        save(TALK, tmp_path / "none" / "x.md")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


def document(**changes: Any) -> bytes:
    return json.dumps({"format": "glmlocal-chat", "version": 1, "model": "m", "messages": MESSAGES, **changes}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a glmlocal-chat file of version 1"),
        (b"{}", "is not a glmlocal-chat file of version 1"),
        (document(version=2), "of version 1"),
        (document(messages={}), "without a known role or with content that is not text"),
        (document(messages=["hi"]), "without a known role"),
        (document(messages=[{"role": "tool", "content": "x"}]), "without a known role"),
        (document(messages=[{"role": "user", "content": 3}]), "content that is not text"),
        (document(messages=[{"role": "user"}]), "content that is not text"),
        (document(messages=[{"role": "user", "content": "x", "tool_calls": []}]), "without a known role"),
        (document(messages=[{"role": "user", "content": "x", "reasoning_content": 1}]), "not text"),
        (document(messages=[*MESSAGES, MESSAGES[0]]), "system message after the first"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_huge_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_FILE_BYTES", 100)
    (tmp_path / "x.json").write_bytes(document())
    with pytest.raises(ConfigError, match="is larger than 100 B"):
        load(tmp_path / "x.json")
