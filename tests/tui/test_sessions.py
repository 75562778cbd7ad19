"""Conversations: saved by themselves, listed, renamed, deleted, found; and what happens when they cannot be saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmlocal_tui import keeper
from glmlocal_tui.widgets.transcript import SHOWN, Transcript
from tui.driving import running
from tui.scripted_server import GATE, ScriptedServer, says, text

pytestmark = pytest.mark.anyio


async def test_a_conversation_is_there_the_next_time(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(says("the **first** answer"), says("another"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("remember the milk")
        await app.wait("12 + 34 tokens")
        await app.press("ctrl+q")
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.press("f2")
        await app.wait("remember the milk")
        await app.press("enter")
        await app.wait("the first answer")
        assert "12 + 34 tokens (8 cached)" in app.text
        await app.say("go on")
        await app.wait("another")
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "remember the milk", "the **first** answer", "go on",
    ]  # fmt: skip


async def test_rename_delete_and_undo(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url, size=(120, 30)) as app:
        await app.wait("ready: ask")
        for question in ("first talk", "second talk"):
            await app.press("ctrl+n")
            await app.say(question)
            await app.wait("12 + 34 tokens")
        await app.press("f2")
        await app.wait("● second talk")
        await app.press("down", "r")
        await app.wait("title")
        await app.press("ctrl+u")
        await app.say("老朋友")
        await app.wait("  老朋友")
        await app.gone("first talk")
        await app.press("d")  # the one under the cursor is the open one again
        await app.wait("deleted; /undo brings it back")
        await app.press("f2")
        await app.say("/delete") if "12 + 34" in app.text else None
        await app.say("/undo")
        await app.wait("12 + 34 tokens")
        await app.press("f2")
        await app.wait(lambda: "second talk" in app.text and "老朋友" in app.text)


async def test_search_finds_and_opens_the_message(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(says("专家混合模型的原理"), says("nothing here"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("talk about experts")
        await app.wait("原理")
        await app.press("ctrl+n")
        await app.gone("原理")
        await app.say("other talk")
        await app.wait("nothing here")
        await app.press("f3")
        await app.wait("search all conversations")
        await app.type("混合模型")
        await app.wait("1 message")
        assert "talk about experts" in app.text
        await app.press("enter")
        await app.wait(lambda: "talk about experts" in app.text and "nothing here" not in app.text)
        assert "专家混合模型的原理" in app.text
        assert app.app.focused is not None
        await app.press("f3")
        await app.type("zzz")
        await app.wait("nothing found")
        await app.press("escape")


async def test_export_writes_and_never_replaces(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("hello")
        await app.wait("12 + 34 tokens")
        await app.say("/export talk.md")
        await app.wait("written:")
        await app.say("/export talk.md")
        await app.wait("exists; nothing was written")
        await app.say("/export no/such/dir.json")
        await app.wait("cannot be written")
        await app.say("/export all.json")
        await app.wait(lambda: (tmp_path / "all.json").exists())
    assert "## You\n\nhello\n\n## Assistant (GLM-4.5-Air)\n\nHello.\n" in (tmp_path / "talk.md").read_text()
    assert len(json.loads((tmp_path / "all.json").read_text())["messages"]) == 2


async def test_a_full_disk_is_told_retried_and_nothing_is_lost(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_RETRY_EVERY_S", 0.05)
    monkeypatch.setattr(keeper, "_SAVE_EVERY_S", 0.05)
    server.script(says("words " * 3000))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.wait(lambda: app.app.keeper.store._db is not None)
        database = app.app.keeper.store._db
        assert database is not None
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        await app.say("hello")
        await app.wait("not saved: the disk of")
        assert "/export FILE.md" in app.text
        await app.wait(lambda: app.app.answering is None)
        await app.press("ctrl+q")
        await app.wait("Ctrl+Q again leaves without it")
        database.execute("PRAGMA max_page_count = 100000")
        await app.gone("not saved: the disk")
        assert app.app.keeper.store.sessions()[0].title == "hello"
        assert app.app.keeper.unsaved == 0


async def test_a_broken_file_is_kept_aside_and_told(tmp_path: Path, server: ScriptedServer) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sessions.db").write_bytes(b"not a database at all" * 500)
    async with running(tmp_path, server.url, size=(140, 30)) as app:
        await app.wait("could not be read: kept as")
        await app.say("hello")
        await app.wait("12 + 34 tokens")
        await app.wait(lambda: app.app.keeper.unsaved == 0)
    assert len(list((tmp_path / "data").glob("sessions.db.broken-*"))) == 1


async def test_a_half_written_answer_survives_a_crash(tmp_path: Path, server: ScriptedServer) -> None:
    """Saved while it is written: another process sees it although this one never ended well."""
    from glmlocal_tui.store import Store

    server.script([text("half an answer"), GATE])
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("hello")
        await app.wait("half an answer")
        other = Store(tmp_path / "data" / "sessions.db")
        other.open()
        await app.wait(lambda: len(other.search("half an answer")) == 1)
        other.close()
        await app.press("escape")


async def test_settings_are_kept_and_bad_fields_told(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.press("f5")
        await app.wait("keep the thinking open       ○ off")
        assert "think before answering       ● on" in app.text
        app.app.screen.query_one("#keep_thinking_open").focus()
        await app.press("space")
        await app.wait("keep the thinking open       ● on")
        await app.pilot.click("#keep_thinking_open")
        await app.wait("keep the thinking open       ○ off")
        await app.press("enter")
        await app.wait("keep the thinking open       ● on")
        app.app.screen.query_one("#temperature").focus()
        await app.type("9")
        await app.wait("temperature is a number from 0 to 2")
        await app.press("escape")  # stays: there is something to correct
        await app.wait("temperature is a number")
        await app.press("backspace")
        await app.type("0.25")
        await app.press("escape")
        await app.gone("keep the thinking open")
        await app.say("/theme nord")
        await app.wait(lambda: app.app.theme == "nord")
    data = json.loads((tmp_path / "config" / "chat.json").read_text())
    assert (data["temperature"], data["theme"]) == (0.25, "nord")
    assert data["keep_thinking_open"] is True
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        assert app.app.theme == "nord"
        await app.say("hello")
        await app.wait("Hello.")
    assert server.requests[0]["temperature"] == 0.25


async def test_long_conversations_are_drawn_from_their_end(tmp_path: Path, server: ScriptedServer) -> None:
    from glmlocal_tui.conversation import Conversation, Message, user_message
    from glmlocal_tui.store import Store

    talk = Conversation(title="long")
    for number in range(40):
        talk.add(user_message(talk.leaf, f"question {number:02}"))
        talk.add(Message(f"a{number}", talk.leaf, "assistant", f"answer {number:02}", ending="stop"))
    store = Store(tmp_path / "data" / "sessions.db")
    store.open()
    store.save(talk, talk.messages.values())
    store.close()
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("/load long")
        await app.wait("answer 39")
        assert app.app.query_one(Transcript).drawn() == SHOWN
        for times in (2, 3, 4):  # at the top, more comes above what is there
            await app.press("ctrl+home")
            await app.wait(lambda times=times: app.app.query_one(Transcript).drawn() == times * SHOWN)
        await app.wait("question 28")  # where the reader was
        await app.press("pageup")
        await app.wait("question 25")
