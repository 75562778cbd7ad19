"""Conversations on disk: kept, found again, and safe from a full, locked or broken file."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmlocal_tui import store as stores
from glmlocal_tui.conversation import Attachment, Conversation, Message, ToolCall, user_message
from glmlocal_tui.sse import Usage
from glmlocal_tui.store import Store, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "deep" / "sessions.db")
    opened.open()
    yield opened
    opened.close()


def talk(text: str, answer: str = "") -> Conversation:
    conversation = Conversation(system="s")
    conversation.add(user_message(None, text, [Attachment("file", "a", "b")]))
    if answer:
        calls = (ToolCall("c", "f", "{}"),)
        parent = conversation.leaf
        conversation.add(Message(answer, parent, "assistant", answer, "hm", (), calls, "stop", "", Usage(1, 2, 3)))
    return conversation


def save(store: Store, conversation: Conversation) -> None:
    store.save(conversation, conversation.messages.values())


def test_a_conversation_comes_back_as_it_was(store: Store) -> None:
    saved = talk("question", "answer")
    save(store, saved)
    assert store.load(saved.id) == saved
    assert store.load("nothing") is None
    assert [(item.id, item.title) for item in store.sessions()] == [(saved.id, "question")]
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_search_finds_english_and_chinese_and_short_words(store: Store) -> None:
    first, second = talk("How do mixture of experts work?"), talk("请解释混合专家模型的原理 100%", "好的")
    save(store, first)
    save(store, second)

    def found(text: str) -> list[str]:
        return [hit.session for hit in store.search(text)]

    assert found("experts") == [first.id]
    assert found("EXPERTS mixture") == [first.id]
    assert found("xpert") == [first.id]
    assert found("混合专家") == [second.id]
    assert found("模型") == [second.id]
    assert found("do") == [first.id]
    assert found("0%") == [second.id]
    assert found('"quoted OR') == []
    assert found("experts 模型") == []
    assert found("  ") == []
    hit = store.search("专家模型")[0]
    assert hit.excerpt[hit.start : hit.end] == "专家模型"
    assert hit.title == second.title


def test_search_follows_changes(store: Store) -> None:
    conversation = talk("question", "first words")
    save(store, conversation)
    answer = conversation.messages["first words"]
    store.save(conversation, [Message(answer.id, answer.parent_id, "assistant", "other text")])
    assert store.search("first words") == []
    assert len(store.search("other text")) == 1


def test_delete_restore_and_the_end_of_a_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk("question", "answer")
    save(store, conversation)
    store.delete(conversation.id)
    assert store.sessions() == []
    assert store.search("question") == []
    store.restore(conversation.id)
    assert len(store.sessions()) == 1
    store.rename(conversation.id, "new title")
    assert store.sessions()[0].title == "new title"
    store.delete(conversation.id)
    store.close()
    store.open()
    assert store.load(conversation.id) is not None  # the day is not over
    store.close()
    later = time.time() + 90000
    monkeypatch.setattr(stores.time, "time", lambda: later)
    store.open()
    assert store.load(conversation.id) is None


def test_prompts_are_remembered_in_order_and_not_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PROMPTS_KEPT", 3)
    for text in "abcde":
        store.remember_prompt(text)
    assert store.prompts() == ["c", "d", "e"]


def test_a_full_disk_is_told_and_nothing_is_half_written(store: Store) -> None:
    conversation = talk("small")
    save(store, conversation)
    assert store._db is not None
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    conversation.add(user_message(conversation.leaf, "large " * 20000))
    with pytest.raises(StoreError, match="full") as caught:
        save(store, conversation)
    assert caught.value.kind == stores.FULL
    kept = store.load(conversation.id)
    assert kept is not None
    assert len(kept.messages) == 1
    store._db.execute("PRAGMA max_page_count = 100000")
    save(store, conversation)
    assert store.load(conversation.id) == conversation


def test_a_locked_file_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store._db is not None
    store._db.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(store.path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        save(store, talk("x"))
    assert caught.value.kind == stores.LOCKED
    other.rollback()
    other.close()
    save(store, talk("x"))
    assert len(store.sessions()) == 1


@pytest.mark.parametrize(
    "content", [b"this is no database, but long enough to be looked at" * 100, b"SQLite format 3\0junk"]
)
def test_a_broken_file_is_kept_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sessions.db"
    path.write_bytes(content)
    store = Store(path)
    store.open()
    save(store, talk("new life"))
    assert len(store.sessions()) == 1
    assert store.set_aside is not None
    assert store.set_aside.read_bytes() == content
    store.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="newer version"):
        Store(path).open()
    assert path.exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "file" / "sessions.db").open()
    assert caught.value.kind == stores.UNUSABLE


def test_what_others_wrote_into_the_file_comes_out_clean(store: Store) -> None:
    saved = talk("escape \x1b[31m red")
    saved.title = "title\x1b]0;x\x07"
    save(store, saved)
    store.remember_prompt("typed\x1b[2J")
    loaded = store.load(saved.id)
    assert loaded is not None
    assert [loaded.title, *(message.content for message in loaded.messages.values())] == [
        "title␛]0;x␇", "escape ␛[31m red",
    ]  # fmt: skip
    assert store.sessions()[0].title == "title␛]0;x␇"
    assert "\x1b" not in store.search("escape")[0].excerpt + store.prompts()[0]


@pytest.mark.parametrize("data", ['{"odd": 1}', "[]", "7", "{", '{"attachments": 1, "tool_calls": [], "usage": null}'])
def test_a_message_that_cannot_be_read_does_not_cost_the_file(store: Store, data: str) -> None:
    bad, good = talk("one"), talk("two")
    save(store, bad)
    save(store, good)
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE messages SET data = ? WHERE session = ?", (data, bad.id))
    with pytest.raises(StoreError, match="cannot be read") as caught:
        store.load(bad.id)
    assert caught.value.kind == stores.UNUSABLE
    assert store.load(good.id) == good
