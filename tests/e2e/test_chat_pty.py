"""``glmlocal chat`` in a real terminal: what a person sees, judged on rendered cells."""

from __future__ import annotations

import json
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pty_terminal import Terminal

TESTS = Path(__file__).parents[1]
ENTRY = "import sys, fakes; sys.exit(fakes.main())"
CTRL_C, CTRL_D, ENTER, ESC, UP, TAB = "\x03", "\x04", "\r", "\x1b", "\x1b[A", "\t"


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        environment = {"GLMLOCAL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(TESTS)}
        command = options.pop("command", None) or [sys.executable, "-c", ENTRY, "chat", "--plain", *arguments]
        terminal = Terminal(command, **{**environment, **options})
        opened.append(terminal)
        return terminal

    yield start
    for terminal in opened:
        terminal.process.close(force=True)


Open = Callable[..., Terminal]


def test_a_conversation_from_greeting_to_quit(open_terminal: Open) -> None:
    terminal = open_terminal("thinker")
    terminal.say("hello there")
    terminal.wait("context 7/4,096")
    terminal.say("and again")
    terminal.wait("11/4,096")
    lines = [line for line in terminal.lines if line]
    assert lines[:6] == [
        "thinker · context 4,096 tokens · thinking on · /help",
        "> hello there",
        "Let me see.",
        "hello there",
        "2 prompt + 5 generated tokens (3 thinking) · 50.0 tok/s · first token 0.12 s · context 7/4,096",
        "> and again",
    ]
    assert terminal.is_dim("Let me see.")
    assert terminal.is_dim("generated tokens")
    answer = next(y for y, line in enumerate(terminal.screen.display) if line.rstrip() == "hello there")
    assert not terminal.screen.buffer[answer][0].italics
    terminal.say("/quit")
    assert terminal.end() == 0


def test_ctrl_d_quits(open_terminal: Open) -> None:
    terminal = open_terminal("talker")
    terminal.wait(terminal.at_prompt)
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal("talker", columns=400, FAKE_TOKEN_DELAY_S="0.05")
    words = " ".join(f"w{i}" for i in range(60))
    terminal.say(words)
    terminal.wait(lambda: "\nw0 w1 w2 w3" in terminal.text)
    terminal.type(CTRL_C)
    terminal.wait("· stopped")
    assert "^C" not in terminal.text
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.wait("saved 2 messages")
    partial = json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"]
    assert words.startswith(partial)
    assert 4 <= len(partial.split()) < 60
    assert f"\n{partial.strip()}\n" in terminal.text
    terminal.say("go on")  # the engine is free again
    terminal.wait(lambda: "\ngo on\n" in terminal.text)
    terminal.say("/quit")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_empties_it_then_hints(open_terminal: Open) -> None:
    terminal = open_terminal("talker")
    terminal.wait(terminal.at_prompt)
    terminal.type("half a thought")
    terminal.wait("> half a thought")
    terminal.type(CTRL_C)
    terminal.wait(terminal.at_prompt)
    assert "half a thought" not in terminal.text
    terminal.type(CTRL_C)
    terminal.wait("to leave: /quit or Ctrl-D")
    terminal.say("/exit")
    assert terminal.end() == 0


def test_thinking_is_switched_off_and_on(open_terminal: Open) -> None:
    terminal = open_terminal("thinker")
    terminal.say("/nothink")
    terminal.wait("thinking is off")
    terminal.say("quick")
    terminal.wait("first token")
    assert "Let me see." not in terminal.text
    terminal.say("/think")
    terminal.wait("thinking is on")
    terminal.say("slow")
    terminal.wait("Let me see.")
    terminal.wait(terminal.at_prompt)
    assert terminal.is_dim("Let me see.")


def test_save_asks_for_the_bang_before_it_replaces(open_terminal: Open, tmp_path: Path) -> None:
    path = tmp_path / "talk.md"
    path.write_text("mine")
    terminal = open_terminal("talker", columns=200)
    terminal.say("hello")
    terminal.wait("first token")
    terminal.say(f"/save {path}")
    terminal.wait("exists; nothing was written")
    assert path.read_text() == "mine"
    terminal.say(f"/save! {path}")
    terminal.wait("saved 2 messages")
    assert path.read_text() == "# Conversation with talker\n\n## You\n\nhello\n\n## Assistant\n\nhello\n"


@pytest.mark.parametrize("new_line", [ESC + ENTER, "\\" + ENTER])
def test_messages_of_several_lines(open_terminal: Open, new_line: str) -> None:
    terminal = open_terminal("talker")
    terminal.wait(terminal.at_prompt)
    terminal.type("first")
    terminal.type(new_line)
    terminal.wait("\n·")
    terminal.type("second" + ENTER)
    terminal.wait("first token")
    assert "> first\n· second\nfirst\nsecond\n" in terminal.text


def test_pasted_lines_are_one_message(open_terminal: Open) -> None:
    terminal = open_terminal("talker")
    terminal.wait(terminal.at_prompt)
    terminal.type("\x1b[200~one\ntwo\x1b[201~" + ENTER)
    terminal.wait("first token")
    assert "\none\ntwo\n" in terminal.text


def test_history_survives_the_session(open_terminal: Open) -> None:
    terminal = open_terminal("talker")
    terminal.say("remember me")
    terminal.wait("first token")
    terminal.say("/quit")
    assert terminal.end() == 0
    terminal = open_terminal("talker")
    terminal.wait(terminal.at_prompt)
    terminal.type(UP + UP + ENTER)
    terminal.wait(lambda: "\nremember me\n" in terminal.text)


def test_commands_are_completed(open_terminal: Open) -> None:
    terminal = open_terminal("thinker")
    terminal.wait(terminal.at_prompt)
    terminal.type("/no")
    terminal.wait("answer at once")  # the menu says what it does
    terminal.type(TAB)
    terminal.wait("> /nothink")
    terminal.type(ENTER)
    terminal.wait("thinking is off")


def test_the_window_may_change_its_size(open_terminal: Open) -> None:
    terminal = open_terminal("talker", FAKE_TOKEN_DELAY_S="0.02")
    terminal.say("word " * 30)
    terminal.wait(lambda: "\nword word" in terminal.text)
    terminal.screen.resize(24, 50)
    terminal.process.setwinsize(24, 50)
    terminal.wait("first token")
    terminal.wait(terminal.at_prompt)
    terminal.screen.resize(20, 40)
    terminal.process.setwinsize(20, 40)
    terminal.read(0.3)
    terminal.type("x" * 60 + ENTER)  # wraps at the new width
    terminal.wait(lambda: f"\n{'x' * 40}\n{'x' * 20}\n" in terminal.text)
    terminal.say("/quit")
    assert terminal.end() == 0


def test_hostile_text_is_drawn_not_obeyed(open_terminal: Open) -> None:
    terminal = open_terminal("talker", "-p", "\x1b[2J\x1b]0;owned\x07\x9b31mred\r!")
    assert terminal.end() == 0
    assert "␛[2J␛]0;owned␇�31mred!" in terminal.text
    assert terminal.screen.title == ""


def test_typing_ahead_is_not_drawn_into_the_answer(open_terminal: Open) -> None:
    terminal = open_terminal("talker", FAKE_TOKEN_DELAY_S="0.05")
    terminal.say("one two three four five six seven eight")
    terminal.wait(lambda: "\none two" in terminal.text)
    terminal.type("ahead")
    terminal.wait("> ahead")
    assert "\none two three four five six seven eight\n" in terminal.text


def test_a_terminated_session_gives_the_terminal_back(open_terminal: Open) -> None:
    terminal = open_terminal("talker", FAKE_TOKEN_DELAY_S="0.05")
    terminal.say("word " * 100)
    terminal.wait(lambda: "\nword" in terminal.text)
    assert not termios.tcgetattr(terminal.process.child_fd)[3] & termios.ECHO
    terminal.process.kill(signal.SIGTERM)
    while terminal.read(0.5):
        pass
    assert termios.tcgetattr(terminal.process.child_fd)[3] & termios.ECHO
    assert terminal.end() == 128 + signal.SIGTERM


def test_a_pipe_as_stdout_gets_the_answers_alone(open_terminal: Open, tmp_path: Path) -> None:
    script = f'exec {sys.executable} -c "$ENTRY" chat --plain thinker > {tmp_path / "out"}'
    terminal = open_terminal(command=["/bin/sh", "-c", script], ENTRY=ENTRY)
    terminal.say("hello there")
    terminal.wait("first token")
    terminal.say("/quit")
    assert terminal.end() == 0
    assert (tmp_path / "out").read_text() == "hello there\n"
