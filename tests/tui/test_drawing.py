"""What is drawn in a quicker way than Textual's, against Textual's own; and how much is drawn at all."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from textual._compositor import Compositor
from textual.geometry import Region
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import TextArea

from glmlocal_tui import answer_runner, connection
from glmlocal_tui.widgets.prompt import Prompt
from glmlocal_tui.widgets.transcript import SHOWN, Earlier, Transcript
from tui.driving import Driver, running
from tui.scripted_server import GATE, ScriptedServer, finish, progress, says, text, think, tool, usage

pytestmark = pytest.mark.anyio
ANSWER = "A *few* words.\n\n```py\nx = 1\n```\n\n| 模型 | b |\n|---|---|\n| 你好 | 2 |\n\n"


def drawn(screen: Screen[object], crop: Region, lines: set[int], how: type[Compositor]) -> list[tuple[int, int, Strip]]:
    """(line, column, cells) of every piece within a part of the screen."""
    compositor = screen._compositor
    chops = how._render_chops(compositor, crop, lines.__contains__)
    found = []
    for y in sorted(lines & set(crop.line_range)):
        ends = compositor.cuts[y][1:]
        found += [(y, x, strip) for end, (x, strip) in zip(ends, chops[y].items(), strict=True)
                  if x < crop.right and end > crop.x]  # fmt: skip
    return found


def agrees_with_textual(app: Driver) -> None:
    screen, rng = app.app.screen, random.Random(0)
    width, height = screen.size
    crops = [screen.size.region, Region(0, height - 4, width, 3), Region(width - 10, 0, 10, height)]
    for _ in range(30):
        x, y = rng.randrange(width), rng.randrange(height)
        crops.append(Region(x, y, rng.randint(1, width - x), rng.randint(1, height - y)))
    for crop in crops:
        lines = {y for y in crop.line_range if rng.random() < 0.7} or {crop.y}
        expected = drawn(screen, crop, lines, Compositor)
        assert all(strip is not None for _, _, strip in expected)
        found = drawn(screen, crop, lines, type(screen._compositor))
        assert found == expected, crop


async def test_the_compositor_draws_what_textuals_does(tmp_path: Path, server: ScriptedServer) -> None:
    long = [think("hm " * 50), text(ANSWER * 6), tool(0, "f", '{"a": 1}'), GATE, text("more"), finish(), usage()]
    server.script(long)
    async with running(tmp_path, server.url) as app:
        assert type(app.app.screen._compositor) is not Compositor
        await app.wait("ready: ask")
        agrees_with_textual(app)
        await app.say("go")
        await app.wait("tool call")
        agrees_with_textual(app)
        server.open_gate()
        await app.wait("12 + 34 tokens")
        await app.press("pageup")
        await app.wait("↓ newest")
        agrees_with_textual(app)
        await app.press("f4", "f2")  # panels that lie over the conversation
        await app.wait("u undo")
        await app.wait("KV cache")
        agrees_with_textual(app)
        await app.press("f2", "/")
        await app.wait("/search [TEXT]")
        agrees_with_textual(app)
        app.app.say("a toast")
        await app.wait("a toast")
        agrees_with_textual(app)


async def test_a_new_line_is_one_layout_and_a_key_draws_no_message(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script([text("one\n\n"), GATE, text("two\n\n"), GATE, finish()])
    layouts: list[bool] = []
    original = Screen._refresh_layout
    monkeypatch.setattr(
        Screen, "_refresh_layout", lambda self, *a, **k: (layouts.append(True), original(self, *a, **k))
    )
    async with running(tmp_path, server.url, size=(140, 40)) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("one")
        await app.pilot.pause(0.5)
        layouts.clear()
        server.open_gate()
        await app.wait("two")
        await app.pilot.pause(0.5)
        assert len(layouts) == 1
        asked: list[str] = []
        for widget in app.app.screen._compositor.visible_widgets:

            def render_lines(crop: Region, widget: Widget = widget, original: Any = widget.render_lines) -> list[Strip]:
                asked.append(type(widget).__name__)
                return original(crop)  # type: ignore[no-any-return]

            monkeypatch.setattr(widget, "render_lines", render_lines)
        app.app.screen._compositor._render_chops(app.app.query_one(Prompt).region, lambda y: True)
        assert asked == ["Prompt"]
        server.open_gate()


def row(app: Driver, word: str) -> int:
    return next(y for y, line in enumerate(app.lines) if word in line)


async def test_the_first_token_and_the_end_of_an_answer_move_nothing(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first line and the line under it are kept free: laying out the screen anew costs more than drawing them."""
    layouts: list[bool] = []
    original = Screen._refresh_layout
    monkeypatch.setattr(
        Screen, "_refresh_layout", lambda self, *a, **k: (layouts.append(True), original(self, *a, **k))
    )
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        for question in ("in the place of the start screen", "with widgets that were made ahead"):
            server.script([GATE, text("first"), GATE, finish(), usage()])
            await app.wait(lambda: app.app.query_one(Transcript)._ready is not None)
            await app.say(question)
            await app.wait(question)
            await app.wait(lambda: app.app.answering is not None)
            await app.wait("▌ …")
            await app.pilot.pause(0.5)
            place = row(app, "▌ …")
            layouts.clear()
            server.open_gate()
            await app.wait("▌ first")
            assert row(app, "▌ first") == place
            assert layouts == []
            server.open_gate()
            await app.wait("12 + 34 tokens")
            assert row(app, "12 + 34 tokens") == place + 1
            assert layouts == []
            server.script(says("another"))
            await app.press("ctrl+n")
            await app.wait("ready: ask")


async def test_a_question_is_one_layout_and_nothing_else_happens_then(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_runner, "QUIET_S", 2.0)
    monkeypatch.setattr(connection, "_ASK_READY_S", 0.05)
    layouts: list[bool] = []
    original = Screen._refresh_layout
    monkeypatch.setattr(
        Screen, "_refresh_layout", lambda self, *a, **k: (layouts.append(True), original(self, *a, **k))
    )
    server.script(says("a\n\n" * 6), [GATE, text("so"), finish(), usage()])
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("a first question, so that the conversation is there")
        await app.wait("12 + 34 tokens")
        await app.wait(lambda: app.app.query_one(Transcript)._ready is not None)
        await app.pilot.pause(0.5)
        await app.type("second")
        await app.pilot.pause(0.3)
        layouts.clear()
        await app.press("enter")
        await app.wait("▌ …")
        await app.pilot.pause(0.3)
        assert layouts == [True]
        asked = len(server.paths)
        assert not gc.isenabled()
        await app.pilot.pause(0.5)
        assert len(server.paths) <= asked + 1  # one may have been on its way
        server.open_gate()
        await app.wait("so")
        await app.wait(lambda: app.app.answering is None)
        assert gc.isenabled()
        await app.wait(lambda: len(server.paths) > asked + 2)


async def test_widgets_that_were_made_ahead_show_their_own_message(tmp_path: Path, server: ScriptedServer) -> None:
    (tmp_path / "notes.txt").write_text("x")
    async with running(tmp_path, server.url, size=(80, 40)) as app:
        await app.wait("ready: ask")
        seen: list[str] = []
        transcript = app.app.query_one(Transcript)
        for number in range(3):
            await app.wait(lambda: transcript._ready is not None)
            server.script([think(f"thought {number}"), text(f"answer {number}"), finish(), usage()])
            await app.say(f"question {number} @notes.txt" if number == 1 else f"question {number}")
            await app.wait(f"answer {number}")
            await app.wait(lambda: app.app.answering is None)
            seen += [f"question {number}", f"answer {number}"]
            places = [row(app, word) for word in seen]
            assert places == sorted(places)
            assert app.text.count("Thought for") == number + 1
            assert app.text.count("notes.txt · 1 B") == (number > 0)
            transcript.keep_thinking_open = True  # a setting that is newer than the widgets
        assert "thought 0" not in app.text
        assert "thought 2" in app.text
        await app.wait(lambda: transcript._ready is not None)
        await app.pilot.pause(0.3)
        lines = app.lines
        end = next(y for y in reversed(range(len(lines))) if "12 + 34 tokens" in lines[y])
        assert not any(line.strip() for line in lines[end + 1 : end + 7])  # the next question's takes no room yet


async def test_a_question_before_the_widgets_are_ready_is_drawn_all_the_same(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(self: Transcript) -> None:
        self._ready = None

    monkeypatch.setattr(Transcript, "make_ready", nothing)
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("why?")
        await app.wait("Hello.")
        assert row(app, "why?") < row(app, "Hello.") < row(app, "12 + 34 tokens")


async def test_a_held_line_says_what_is_waited_for_and_goes(tmp_path: Path, server: ScriptedServer) -> None:
    server.script([progress(1, 4), GATE, progress(3, 4), GATE, think("hm"), GATE, text("so"), finish(), usage()])
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("reading the prompt: 1 of 4 tokens (25%)")
        place = row(app, "reading the prompt")
        server.open_gate()
        await app.wait("3 of 4 tokens (75%)")
        assert row(app, "reading the prompt") == place
        server.open_gate()
        await app.wait("hm")
        assert "reading the prompt" not in app.text
        server.open_gate()
        for last in ("Thought for", "so", "12 + 34 tokens"):
            await app.wait(last)
        assert row(app, "so") == row(app, "Thought for") + 2
        assert row(app, "12 + 34 tokens") == row(app, "so") + 1


async def test_a_change_is_drawn_within_a_few_milliseconds() -> None:
    """The app sets Textual's clock, which is read when Textual is imported: in a process of its own."""
    code = (
        "import glmlocal_tui.run as run\n"
        "from glmlocal_tui.options import Options\n"
        "class Ended(Exception): pass\n"
        "def end(*a): raise Ended\n"
        "run.asyncio.run = lambda coroutine: (coroutine.close(), end())\n"
        "try: run.run(Options('m'))\n"
        "except Ended: pass\n"
        "from textual.screen import UPDATE_PERIOD\n"
        "assert UPDATE_PERIOD <= 0.005, UPDATE_PERIOD\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


async def test_a_key_is_drawn_before_the_answer_but_does_not_hold_it_up(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script([text("one\n\n"), GATE, text("two\n\n"), finish()])
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("one")
        monkeypatch.setattr(answer_runner, "KEY_S", 60.0)
        monkeypatch.setattr(answer_runner, "MOST_HOLD_S", 2.0)
        await app.type("k")
        server.open_gate()
        await app.wait("│ k")
        await app.wait(lambda: app.app.answering is not None and app.app.answering.tokens == 2)
        assert "two" not in app.text
        await app.wait("two", 10.0)


async def test_an_append_makes_only_its_lines_dirty(tmp_path: Path, server: ScriptedServer) -> None:
    server.script([text("first\n\n1. one\n2. second"), GATE, text(" and"), GATE, text("\n\nthird"), finish(), usage()])
    async with running(tmp_path, server.url) as app:
        from glmlocal_tui.widgets.markdown_text import MarkdownText

        await app.wait("ready: ask")
        await app.say("go")
        await app.wait("second")
        view = app.app.query_one(MarkdownText)
        y = next(y for y, line in enumerate(app.lines) if "second" in line)
        dirty: list[Region] = []
        original = view.refresh
        view.refresh = lambda *regions, **named: (dirty.extend(regions), original(*regions, **named))[1]  # type: ignore[method-assign,assignment]
        server.open_gate()
        await app.wait("second and")
        assert [region.y + view.region.y for region in dirty] == [y]  # not the line of the list above it
        server.open_gate()
        await app.wait("third")


async def test_the_prompt_takes_new_colours(tmp_path: Path, server: ScriptedServer) -> None:
    """Its colours are worked out when they change, not at each drawing: they must be those of each drawing."""
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.type("word")
        for theme in ("textual-light", "dracula"):
            app.app.theme = theme
            await app.pilot.pause(0.3)
            prompt = app.app.query_one(Prompt)
            crop = prompt.outer_size.region
            assert "word" in "".join(strip.text for strip in prompt.render_lines(crop))
            quick = prompt.render_lines(crop)
            prompt._line_cache.clear()
            prompt._styles_cache.clear()
            assert TextArea.render_lines(prompt, crop) == quick


async def test_messages_far_above_are_not_kept_on_the_screen(tmp_path: Path, server: ScriptedServer) -> None:
    async with running(tmp_path, server.url) as app:
        transcript = app.app.query_one(Transcript)
        await app.wait("ready: ask")
        asks = SHOWN // 2 + 1
        for number in range(asks):
            server.script(says(f"answer {number:02}"))
            await app.say("q")
            await app.wait(f"answer {number:02}")
            await app.wait(lambda: app.app.answering is None)
        await app.wait(lambda: transcript.drawn() == SHOWN)
        assert app.app.query_one(Earlier).count == 2
        await app.press("ctrl+home")
        await app.wait(lambda: transcript.drawn() == 2 * asks)
        await app.press("pageup")
        await app.wait("answer 00")
        server.script(says("the last", " answer"))
        await app.say("q")
        await app.wait("the last answer")
        await app.wait(lambda: transcript.drawn() == SHOWN)
        assert app.app.query_one(Earlier).count == 4
