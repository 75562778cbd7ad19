"""The terminal app in a real terminal: with a server of its own over the real engine, and with one that runs."""

from __future__ import annotations

import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
from pty_terminal import Terminal
from tui.scripted_server import GATE, ScriptedServer, finish, scripted, stats, text, think, usage

CTRL_Q, ENTER, ESC, F3, F4 = "\x11", "\r", "\x1b", "\x1bOR", "\x1bOS"
Open = Callable[..., Terminal]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted(stats=stats()) as running:
        yield running


@pytest.fixture
def open_chat(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        command = [sys.executable, "-m", "glmlocal", "chat", *arguments]
        terminal = Terminal(command, **{"columns": 100, "GLMLOCAL_HOME": str(tmp_path / "home"), **options})
        opened.append(terminal)
        return terminal

    yield start
    for terminal in opened:
        terminal.process.close(force=True)


def test_a_model_from_start_to_quit(open_chat: Open, directory: Path) -> None:
    terminal = open_chat(str(directory), "--threads", "1", "--max-tokens", "40", "--seed", "1")
    terminal.wait("Ask something")
    terminal.wait("ready: ask something", 120)
    assert "memory plan" in terminal.text
    child = next(
        process
        for process in psutil.Process(terminal.process.pid).children(recursive=True)
        if "serve" in process.cmdline()
    )
    terminal.type("the quick brown" + ENTER)
    terminal.wait("first token")
    terminal.type(F4)
    terminal.wait("KV cache")
    terminal.type(F4)
    terminal.type(F3)
    terminal.wait("search all conversations")
    terminal.type("quick brown")
    terminal.wait("1 message")
    terminal.type(ESC)
    terminal.type(CTRL_Q)
    assert terminal.end() == 0
    child.wait(10)  # it does not outlive the app
    assert "Traceback" not in terminal.text


def test_a_model_that_cannot_be_loaded_is_told_in_place(open_chat: Open, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    terminal = open_chat(str(broken))
    terminal.wait("The model could not be loaded.", 120)
    terminal.wait("config.json")
    terminal.type(CTRL_Q)
    assert terminal.end() == 0


def test_a_server_that_runs_is_asked_stopped_and_left(open_chat: Open, server: ScriptedServer) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J"
    server.script([think("well"), text(f"half an answer 你好 {hostile}"), GATE, finish(), usage()])
    terminal = open_chat("--url", server.url)
    terminal.wait("ready: ask something")
    terminal.type("why?" + ENTER)
    terminal.wait("half an answer")
    terminal.wait("␛]0;owned␇␛[2J")
    assert "owned" not in terminal.screen.title
    terminal.type(ESC)
    terminal.wait("stopped")
    assert server.aborted.wait(10)
    assert "half an answer" in terminal.text
    terminal.type(CTRL_Q)
    assert terminal.end() == 0


@pytest.mark.parametrize("way", ["SIGTERM", "closed"])
def test_it_ends_and_saves_when_it_is_ended_from_outside(
    open_chat: Open, server: ScriptedServer, tmp_path: Path, way: str
) -> None:
    server.script([text("half an answer"), GATE])
    terminal = open_chat("--url", server.url, XDG_DATA_HOME=str(tmp_path))
    terminal.wait("ready: ask something")
    terminal.type("why?" + ENTER)
    terminal.wait("half an answer")
    process = psutil.Process(terminal.process.pid)
    if way == "closed":
        terminal.process.ptyproc.fileobj.close()  # as a window that is closed
        terminal.process.ptyproc.closed = terminal.process.ptyproc.terminated = True
        assert process.wait(20) == 128 + signal.SIGHUP
    else:
        process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        assert "Traceback" not in terminal.text
    found = sqlite3.connect(next(tmp_path.rglob("sessions.db"))).execute("SELECT text FROM messages ORDER BY n")
    assert [text for (text,) in found] == ["why?", "half an answer"]


def test_a_terminal_that_cannot_be_drawn_on_is_told(open_chat: Open) -> None:
    terminal = open_chat("--url", "http://127.0.0.1:1", TERM="dumb")
    terminal.wait("glmlocal: error: --url opens the terminal app, which TERM=dumb")
    assert terminal.end() == 2


def test_options_that_do_not_go_together_are_one_line(open_chat: Open) -> None:
    for words, problem in (
        (("--url", "localhost:1"), "give the server's root"),
        (("--url", "http://127.0.0.1:1", "--threads", "2"), "--threads is decided by the server"),
        (("--url", "http://127.0.0.1:1", "--raw"), "--raw runs the model in this process"),
        (("--url", "http://127.0.0.1:1", "-p", "x"), "needs a terminal"),
        (("--url", "http://127.0.0.1:1", "--api-key-file", "/nowhere"), "cannot be read"),
        ((), "required: MODEL, or --url"),
        (("demo", "--api-key-file", "x"), "--api-key-file goes with --url"),
    ):
        terminal = open_chat(*words)
        terminal.wait("glmlocal: error:")
        assert terminal.end() == 2
        assert problem in terminal.text
        assert "Traceback" not in terminal.text
