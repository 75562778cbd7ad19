"""The prompt: lines, history, completion, mentions, pastes."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual import events

from glmlocal_tui.widgets.prompt import Prompt
from tui.driving import Driver, running
from tui.scripted_server import ScriptedServer, says

pytestmark = pytest.mark.anyio


def prompt_lines(driver: Driver) -> list[str]:
    """What the box of the prompt shows."""
    lines = driver.lines
    top = next(y for y, line in enumerate(lines) if line.startswith("╭"))
    bottom = next(y for y, line in enumerate(lines) if line.startswith("╰"))
    return [line.strip("│ \n▁▂▃▄▅▆▇█").rstrip() for line in lines[top + 1 : bottom]]


async def paste(driver: Driver, text: str) -> None:
    driver.app.query_one(Prompt).post_message(events.Paste(text))
    await driver.pilot.pause()


async def test_several_lines_and_history(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.type("one\ntwo")
        await app.press("shift+enter")
        await app.type("three\\")
        await app.press("enter")  # a backslash before Enter: also a new line
        await app.type("four")
        await app.wait(lambda: prompt_lines(app) == ["one", "two", "three", "four"])
        await app.press("enter")
        await app.wait("Hello.")
        assert server.requests[0]["messages"][0]["content"] == "one\ntwo\nthree\nfour"
        await app.say("next")
        await app.wait(lambda: len(server.requests) == 2 and app.app.answering is None)
        await app.type("draft")
        await app.press("up")
        await app.wait(lambda: prompt_lines(app) == ["next"])
        await app.press("up")
        await app.wait(lambda: prompt_lines(app) == ["one", "two", "three", "four"])
        await app.press("up")  # no older one: the text stays
        assert prompt_lines(app) == ["one", "two", "three", "four"]
        await app.press("down", "down", "down", "down", "down")
        await app.wait(lambda: prompt_lines(app) == ["draft"])
    async with running(tmp_path, server.url) as app:  # another day
        await app.wait(lambda: bool(app.app.query_one(Prompt)._history))
        await app.press("up")
        await app.wait(lambda: prompt_lines(app) == ["next"])


async def test_commands_are_completed_and_mistakes_told(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.type("/noth")
        await app.wait("answer at once")  # the menu says what it does
        await app.press("tab")
        await app.wait(lambda: prompt_lines(app) == ["/nothink"])
        await app.press("enter")
        await app.wait("thinking: off")
        await app.type("/the")
        await app.wait("change the colours")
        await app.press("down", "up", "escape")
        await app.gone("change the colours")
        await app.press("ctrl+u")
        await app.say("/temp 9")
        await app.wait("temperature is a number from 0 to 2")
        await app.say("/temp 0.5")
        await app.wait("temperature: 0.5")
        await app.say("/serch")
        await app.wait("there is no command /serch")
        await app.press("ctrl+u")
        await app.say("/system be brief")
        await app.say("//not a command")
        await app.wait("Hello.")
    assert server.requests[0]["temperature"] == 0.5
    assert [message["content"] for message in server.requests[0]["messages"]] == ["be brief", "/not a command"]


async def test_mentioned_files_are_completed_shown_and_sent(tmp_path: Path, server: ScriptedServer) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("print('你好')\n")
    (tmp_path / "huge.log").write_bytes(b"x" * 300_000)
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.type("explain @mai")
        await app.wait("src/main.py")
        await app.press("enter")
        await app.wait(lambda: prompt_lines(app) == ["explain @src/main.py"])
        await app.wait("src/main.py · 16 B ×")
        await app.type(" and @huge.log")
        await app.wait("larger than 256 KiB")
        await app.press("enter")
        await app.wait("@huge.log is larger")
        assert server.requests == []
        await app.pilot.click("Chip.-problem")
        await app.wait(lambda: prompt_lines(app) == ["explain @src/main.py and"])
        await app.press("enter")
        await app.wait("Hello.")
        assert "▐ src/main.py · 16 B ▌" in app.text
    content = server.requests[0]["messages"][0]["content"]
    assert content == "explain @src/main.py and\n\n<file path=\"src/main.py\">\nprint('你好')\n\n</file>"


async def test_a_long_paste_is_folded_and_sent_in_full(tmp_path: Path, server: ScriptedServer) -> None:
    long = "\n".join(f"row {number}\x1b[0m" for number in range(40))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await paste(app, "short\r\npaste ")
        await app.wait(lambda: prompt_lines(app) == ["short", "paste"])
        await paste(app, long)
        await app.wait("paste [paste 1: 40 lines]")
        await app.wait("paste 1: 40 lines ×")
        assert "row 7" not in app.text
        await app.type(" thanks")
        await app.press("enter")
        await app.wait("Hello.")
        assert "▐ 40 lines pasted" in app.text
    content = server.requests[0]["messages"][0]["content"]
    assert content == f"short\npaste {long.replace(chr(27), '␛')} thanks"


async def test_the_palette_and_the_help_know_every_command(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url, size=(100, 60)) as app:
        await app.wait("ready: ask")
        await app.press("f1")
        await app.wait("keys and commands")
        for word in ("/regenerate", "/export FILE", "/max_tokens NUMBER", "/web", "Shift+Enter"):
            assert word in app.text
        await app.press("escape")
        await app.gone("keys and commands")
        await app.press("ctrl+p")
        await app.type("rename")
        await app.wait("/rename")
        await app.press("enter")
        await app.wait(lambda: prompt_lines(app) == ["/rename"])  # it wants words: begun, not run
        await app.press("ctrl+u")
        await app.say("/web")
        await app.wait("textual serve")


async def test_a_second_question_waits_for_the_first_answer(tmp_path: Path, server: ScriptedServer) -> None:
    from tui.scripted_server import GATE, text

    server.script([text("slow"), GATE], says("fast"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("one")
        await app.wait("slow")
        await app.say("two")
        await app.wait("Esc stops it")
        assert prompt_lines(app)[0].startswith("two ")  # what was typed is not lost; the note lies beside it
        await app.press("escape")
        await app.wait("stopped")
        await app.press("enter")
        await app.wait("fast")
