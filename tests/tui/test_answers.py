"""Asking and answering, judged on the cells of the screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmlocal_tui.settings import Settings, save
from glmlocal_tui.widgets.transcript import Transcript
from tui.driving import Driver, running
from tui.scripted_server import (
    CLOSE,
    GATE,
    Refusal,
    ScriptedServer,
    finish,
    progress,
    says,
    scripted,
    stats,
    text,
    think,
    tool,
    usage,
)

pytestmark = pytest.mark.anyio


def row(driver: Driver, word: str) -> int:
    return next(y for y, line in enumerate(driver.lines) if word in line)


async def test_thinking_is_live_and_folds_when_the_answer_begins(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(
        [progress(300, 1200), GATE, think("let me *see*"), GATE, text("**42**, of"), text(" course"), finish(), usage()]
    )
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask something")
        await app.say("why?")
        await app.wait("reading the prompt: 300 of 1,200 tokens (25%)")
        server.open_gate()
        await app.wait("let me see")
        assert row(app, "Thinking…") < row(app, "let me see")
        server.open_gate()
        await app.wait("42, of course")
        await app.wait("12 + 34 tokens (8 cached) · 20.0 tok/s · first token 0.50 s")
        assert "let me see" not in app.text
        assert "Thought for" in app.text
        assert app.style_at("42").bold
        assert row(app, "why?") < row(app, "Thought for") < row(app, "42, of course")
        await app.wait("context 46/32,768")
    sent = server.requests[0]
    assert sent["messages"] == [{"role": "user", "content": "why?"}]
    assert sent["stream_options"] == {"include_usage": True, "include_progress": True}
    assert sent["chat_template_kwargs"] == {"enable_thinking": True}
    assert sent["model"] == "GLM-4.5-Air"


async def test_inline_thinking_of_a_foreign_server_is_thinking(tmp_path: Path) -> None:
    with scripted(models=["qwen"]) as server:
        server.script([text("<thi"), text("nk>\nlet me see</thi"), text("nk>\n\n42"), GATE, text(" it is"), finish()])
        async with running(tmp_path, server.url) as app:
            await app.wait("ready: ask something")
            await app.say("why?")
            await app.wait("42")
            assert "Thought for" in app.text
            assert "think>" not in app.text
            server.open_gate()
            await app.wait("42 it is")
            await app.say("again")
            await app.wait(lambda: len(server.requests) == 2)
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "42 it is"}


async def test_thinking_that_the_template_began_is_told_by_its_end(tmp_path: Path) -> None:
    with scripted(models=["glm"]) as server:
        server.script([text("let me\n\nsee `a`"), GATE, text(".</think>"), text("\n4"), GATE, text("2"), finish()])
        async with running(tmp_path, server.url) as app:
            await app.wait("ready: ask something")
            await app.say("why?")
            await app.wait("see a")
            assert "Thought for" not in app.text
            server.open_gate()
            await app.wait("Thought for")
            assert "see a" not in app.text
            assert row(app, "Thought for") < row(app, " 4 ")
            await app.pilot.click("CollapsibleTitle")
            await app.wait("see a.", 5)
            assert app.text.count("let me") == 1
            server.open_gate()
            await app.wait("42")
            await app.wait(lambda: app.app.answering is None)
            await app.say("again")
            await app.wait(lambda: len(server.requests) == 2)
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "42"}


async def test_thinking_can_be_kept_open_and_switched_off(tmp_path: Path, server: ScriptedServer) -> None:
    save(tmp_path / "config" / "chat.json", Settings(keep_thinking_open=True))
    server.script([think("deep thought"), text("<think>answer"), finish(), usage()])
    async with running(tmp_path, server.url) as app:
        await app.wait("thinking on")
        await app.say("why?")
        await app.wait("20.0 tok/s · first")
        assert "deep thought" in app.text
        await app.say("/nothink")
        await app.wait("thinking off")
        await app.say("again")
        await app.wait(lambda: len(server.requests) == 2)
    assert server.requests[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "<think>answer"}


async def test_escape_stops_keeps_the_partial_answer_and_the_server_stops_too(
    tmp_path: Path, server: ScriptedServer
) -> None:
    server.script([text("first part"), GATE, text(" never seen")], says("second"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("first part")
        runner, waits = app.app.answers, []
        original = runner._drawn
        runner._drawn = lambda: (waits.append(runner.answering), original())[1]  # type: ignore[method-assign]
        await app.press("escape")
        await app.wait("stopped")
        assert not any(waits)  # the app itself waits for the end of the answer: it would draw nothing until it gave up
        assert "first part" in app.text
        await app.wait(server.aborted.is_set)
        await app.say("go on")
        await app.wait("second")
        assert server.requests[1]["messages"][1]["content"] == "first part"
        await app.app.keeper.flush()
        kept = app.app.keeper.store.search("first part")
        assert len(kept) == 1


async def test_regenerate_makes_a_branch_and_arrows_walk_the_branches(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(says("answer one"), says("answer two"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("question")
        await app.wait("answer one")
        await app.press("ctrl+r")
        await app.wait("answer two")
        assert "answer one" not in app.text
        await app.wait("‹ 2/2 ›")
        assert server.requests[1]["messages"] == [{"role": "user", "content": "question"}]
        await app.press("shift+tab", "left")
        await app.wait("answer one")
        assert "‹ 1/2 ›" in app.text
        assert "answer two" not in app.text
        await app.pilot.click("Branches", offset=(6, 0))  # the right arrow
        await app.wait("answer two")


async def test_edit_and_resend_keeps_the_old_branch(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(says("answer one"), says("answer two"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("wrong")
        await app.wait("answer one")
        await app.press("f6")
        await app.wait("editing: Enter sends it as another branch")
        await app.press("escape")
        await app.gone("editing:")
        await app.press("f6")
        await app.wait("editing:")
        await app.say(" question")
        await app.wait("answer two")
        assert "wrong question" in app.text
        assert "editing:" not in app.text
        assert "‹ 2/2 ›" in app.text
        assert server.requests[1]["messages"] == [{"role": "user", "content": "wrong question"}]
        await app.press("shift+tab", "left")  # on the answer, which is the only one: its question's branches
        await app.wait("answer one")
        assert "‹ 1/2 ›" in app.text


async def test_errors_are_shown_in_place(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(
        Refusal(400, "This model's maximum context length is 100 tokens", "context_length_exceeded"),
        [text("half an answer"), CLOSE],
        [text("part"), {"error": {"message": "out of \x1b[31mmemory", "code": "internal"}}],
        Refusal(500, "boom"),
        says("well again"),
    )
    async with running(tmp_path, server.url, size=(100, 40)) as app:
        await app.wait("ready: ask")
        for expected in (
            "the conversation no longer fits the context",
            "half an answer",
            "out of ␛[31mmemory",
            "the server said no (500): boom",
        ):
            await app.say("go")
            await app.wait(expected)
            await app.wait(lambda: app.app.answering is None)
        assert "half an answer" in app.text
        assert "no answer from" in app.text or "closed the connection in the middle" in app.text
        await app.say("go")
        await app.wait("well again")


async def test_a_busy_server_is_asked_again(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(Refusal(429, "the queue is full", headers={"Retry-After": "0.2"}), says("my turn"))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("my turn")
    assert len(server.requests) == 2


async def test_a_message_waits_for_the_model(tmp_path: Path, server: ScriptedServer) -> None:
    server.stats = stats("loading", loading={"done_bytes": 1, "total_bytes": 4, "eta_s": 3.0, "tier": "ram"})
    async with running(tmp_path, server.url) as app:
        await app.wait("25%")
        await app.say("early")
        await app.wait("waiting for the model")
        assert server.requests == []
        await app.wait("loading the model: 25%")  # with the next word from the server
        server.stats = stats()
        await app.wait("Hello.")
        assert "loading the model" not in app.text


async def test_tool_calls_are_cards(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(
        [tool(0, "get_weather", '{"city": "北'), tool(0, "", '京", "days": 3}'), tool(1, "no_args", "{}"),
         finish("tool_calls"), usage()]
    )  # fmt: skip
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("weather?")
        await app.wait("tool call · no_args")
        await app.wait("12 + 34 tokens")
        assert "tool call · get_weather" in app.text
        assert "│ city: 北京" in app.text
        assert "│ days: 3" in app.text
        assert "(no arguments)" in app.text
        assert "not run by this app" in app.text


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m \u202eevil [bold]markup[/bold] `\x1b[1m`\n\n```py\x1b\nx = '\x1b[5m'\n```\n"


async def test_nothing_from_the_server_reaches_the_terminal_raw(tmp_path: Path, server: ScriptedServer) -> None:
    hostile_stats = stats()
    hostile_stats["model"]["name"] = "na\x1b[7mme[bold]"
    hostile_stats["plan"]["devices"][0]["name"] = "GPU\x1b]0;x\x07[red]"
    server.stats, server.models = hostile_stats, ["mo\x1bdel[/]"]
    call = tool(0, "f\x1b[0m[u]", '{"k": "\\u001b[2J[red]"}')
    server.script([think(HOSTILE), text(HOSTILE), call, finish(), usage()])
    async with running(tmp_path, server.url, size=(100, 40)) as app:
        await app.wait("na␛[7mme[bold]")
        assert "GPU␛]0;x␇[red]" in app.text
        await app.say("[b]go[/b]")
        await app.wait("12 + 34 tokens")
        assert "[b]go[/b]" in app.text
        assert "␛]0;owned␇␛[2J\ufffd31m \ufffdevil [bold]markup[/bold]" in app.text
        assert "tool call · f␛[0m[u]" in app.text
        assert "k: ␛[2J[red]" in app.text
        await app.press("f4", "f2")
        await app.wait("u undo")
        for line in app.lines:
            assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or char == "\u202e" for char in line), repr(
                line
            )


async def test_wide_characters_wrap_on_cells(tmp_path: Path, server: ScriptedServer) -> None:
    server.script(says("混合专家模型" * 20 + "\n\n| 中文 | b |\n|---|---|\n| 你好 | 2 |\n"))
    async with running(tmp_path, server.url, size=(60, 24)) as app:
        await app.wait("ready: ask")
        await app.say("你好吗")
        await app.wait("12 + 34 tokens")
        lines = app.lines  # every line fills the width exactly, or this fails
        start = row(app, "混合专家")
        shown = "".join(line.strip(" ▌▁▂▃▄▅▆▇█").replace(" ", "") for line in lines[start : start + 5])
        assert shown.startswith("混合专家模型" * 20)
        assert any("你好吗" in line for line in lines)
        assert any("你好" in line and "2" in line for line in lines)


async def test_following_does_not_fight_the_reader(tmp_path: Path, server: ScriptedServer) -> None:
    first = "".join(f"line {number}\n\n" for number in range(60))
    server.script([text(first), GATE, text("late arrival\n\n" * 5), GATE, text("the end"), finish(), usage()])
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("line 59")  # followed to the newest
        await app.press("pageup")
        await app.wait("↓ newest")
        before = [line[:70] for line in app.lines if "line " in line]
        server.open_gate()
        await app.wait(lambda: app.app.answering is not None and "late" in app.app.answering.message.content)
        await app.pilot.pause(0.3)
        assert [line[:70] for line in app.lines if "line " in line] == before
        await app.press("ctrl+end")
        await app.wait("late arrival")
        await app.gone("↓ newest")
        server.open_gate()
        await app.wait("the end")
        app.app.query_one(Transcript).scroll_up(animate=False)
        await app.wait("↓ newest")
        await app.pilot.click("Jump")
        await app.gone("↓ newest")


async def test_copy_answer_message_and_code(tmp_path: Path, server: ScriptedServer) -> None:
    answer = "Do this:\n\n```sh\necho 你好\n```\n\nor\n\n```py\nprint(1)\n```\n"
    server.script(says(answer))
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("how?")
        await app.wait("12 + 34 tokens")
        await app.press("f7")
        await app.wait("answer copied")
        assert app.app.clipboard == answer
        await app.say("/copy code")
        await app.wait("code block copied (9 characters)")
        assert app.app.clipboard == "print(1)\n"
        x = app.lines[row(app, "╭ sh")].index("copy")
        await app.pilot.click(offset=(x, row(app, "╭ sh")))
        await app.wait(lambda: app.app.clipboard == "echo 你好\n")
        await app.press("shift+tab", "up", "c")  # a click moves no focus: from the prompt to the answer, and one up
        await app.wait(lambda: app.app.clipboard == "how?")
        await app.press("N")
        await app.type("o key of a message: begins a prompt")
        await app.wait("│ No key of a message: begins a prompt")


async def test_a_long_answer_costs_no_more_per_token_at_its_end(tmp_path: Path, server: ScriptedServer) -> None:
    """10,000 tokens: what is drawn again at each append stays the last block, whatever came before."""
    from glmlocal_tui import render

    paragraph = "The router sends **each token** to a few `experts`.\n\n- one\n- two\n\n```py\nx = 1\n```\n\n"
    server.script([*(text(paragraph) for _ in range(400)), finish(), usage()])
    drawn: list[int] = []
    original = render.block_lines

    def counted(block: render.Block, look: render.Look, number: int) -> list[render.Strip]:
        drawn.append(number)
        return original(block, look, number)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("glmlocal_tui.widgets.markdown_text.block_lines", counted)
    try:
        async with running(tmp_path, server.url) as app:
            await app.wait("ready: ask")
            await app.say("go")
            await app.wait("12 + 34 tokens", 120)
    finally:
        monkeypatch.undo()
    blocks = 3 * 400
    assert max(drawn) == blocks - 1
    assert len(drawn) < 2.5 * blocks  # each once when it is closed, and the last of each frame
