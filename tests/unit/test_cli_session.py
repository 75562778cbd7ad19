from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory

from fakes import FakeLLM, Reply, install
from glmlocal.cli.chat_prompt import CommandCompleter, open_history
from glmlocal.cli.chat_render import AnswerView
from glmlocal.cli.chat_session import COMMANDS, Conversation, Session
from glmlocal.cli.terminal import Console
from glmlocal.errors import RequestError

Line = str | type[BaseException]


class Typist:
    """Types the lines, then Ctrl-D."""

    def __init__(self, lines: tuple[Line, ...]) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


class Talk:
    """A session that has ended."""

    def __init__(self, *lines: Line, model: str = "thinker", context: int | None = None, **options: Any) -> None:
        self.llm = FakeLLM(model, context=context)
        out, err = io.StringIO(), io.StringIO()
        self.typist = Typist(lines)
        thinking = options.pop("thinking", self.llm.supports_thinking)
        self.session = Session(self.llm, Console(out, err), self.typist, thinking=thinking, **options)  # type: ignore[arg-type]
        self.code = self.session.run()
        self.out, self.err = out.getvalue(), err.getvalue()
        self.messages = self.session.conversation.messages


@pytest.fixture(autouse=True)
def _replies(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def test_turns_build_on_each_other_and_reasoning_is_kept_apart() -> None:
    talk = Talk("one", "two")
    assert talk.code == 0
    assert talk.out == "one\ntwo\n"
    assert talk.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one", "reasoning_content": "Let me see."},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "two", "reasoning_content": "Let me see."},
    ]
    assert talk.llm.calls[1]["messages"] == talk.messages[:3]
    assert talk.err.count("generated tokens (3 thinking) · 50.0 tok/s · first token 0.12 s · context ") == 2
    assert "thinker · context 4,096 tokens · thinking on · /help" in talk.err


def test_sampling_options_hold_for_every_turn() -> None:
    talk = Talk("a", "b", sampling={"temperature": 0.0, "max_tokens": 5})
    assert [(c["temperature"], c["max_tokens"]) for c in talk.llm.calls] == [(0.0, 5), (0.0, 5)]


def test_blank_lines_are_not_sent_and_double_slash_escapes() -> None:
    talk = Talk("", "  ", "//etc/hosts is a file", " /think about it")
    assert [m["content"] for m in talk.messages[::2]] == ["/etc/hosts is a file", " /think about it"]


def test_think_and_nothink() -> None:
    talk = Talk("/nothink", "a", "/think", "b")
    assert [call["enable_thinking"] for call in talk.llm.calls] == [False, True]
    assert "thinking is off\n" in talk.err
    assert "thinking is on\n" in talk.err
    assert "talker has no thinking mode" in Talk("/think", model="talker").err


def test_system_prompt_is_set_shown_and_removed_and_outlives_reset() -> None:
    talk = Talk("/system", "/system Be brief. Très.", "a", "/reset", "b", "/system", "/system -", "c")
    system = {"role": "system", "content": "Be brief. Très."}
    assert [call["messages"][0] for call in talk.llm.calls[:2]] == [system, system]
    assert [len(call["messages"]) for call in talk.llm.calls] == [2, 2, 3]
    assert talk.err.count("no system prompt is set") == 2
    assert talk.err.count("system prompt: Be brief. Très.") == 2


def test_reset_forgets_the_conversation() -> None:
    talk = Talk("a", "/reset", "b")
    assert "2 messages forgotten" in talk.err
    assert [m["content"] for m in talk.messages] == ["b", "b"]


@pytest.mark.parametrize("line", ["/quit", "/exit", "/quit now"])
def test_quit_ends_the_session(line: str) -> None:
    talk = Talk(line, "never sent")
    assert talk.code == 0
    assert talk.llm.calls == []


@pytest.mark.parametrize(
    ("line", "hint"),
    [("/sytem x", "did you mean /system?"), ("/Quit", "did you mean /quit?"), ("/usr/bin/env", "/help lists them")],
)
def test_unknown_commands_are_not_sent(line: str, hint: str) -> None:
    talk = Talk(line)
    assert talk.llm.calls == []
    assert f"there is no command {line.split()[0]}" in talk.err
    assert hint in talk.err
    assert "write //" in talk.err


def test_help_lists_every_command() -> None:
    text = Talk("/help").err
    assert all(f"\n{name} " in text for name in COMMANDS)


def test_ctrl_c_at_the_prompt_hints_and_goes_on() -> None:
    talk = Talk(KeyboardInterrupt, "a")
    assert "to leave: /quit or Ctrl-D" in talk.err
    assert talk.out == "a\n"


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Presses Ctrl-C while that token is on its way."""

    def at(token: int) -> None:
        count = 0

        def sleep(seconds: float) -> None:
            nonlocal count
            if count == token:
                os.kill(os.getpid(), signal.SIGINT)
            count += 1

        monkeypatch.setattr("fakes.time.sleep", sleep)

    return at


def test_ctrl_c_stops_the_answer_and_keeps_it(interrupting: Callable[[int], None]) -> None:
    interrupting(4)
    handler = signal.getsignal(signal.SIGINT)
    talk = Talk("a b c d e f g h", "next")
    assert talk.messages[1] == {"role": "assistant", "content": "a b ", "reasoning_content": "Let me see."}
    assert talk.out.startswith("a b \n")
    assert "5 generated tokens" in talk.err
    assert "· stopped\n" in talk.err
    assert talk.llm.num_aborted == 1
    assert talk.llm.calls[1]["messages"] == talk.messages[:3]
    assert talk.messages[3]["content"] == "next"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stopped_answer_is_aborted_at_once(interrupting: Callable[[int], None]) -> None:
    interrupting(1)
    llm = FakeLLM("talker")
    deltas = llm.chat([{"role": "user", "content": "a b c d"}], stream=True)
    AnswerView(Console(io.StringIO(), io.StringIO())).run(lambda: deltas)  # type: ignore[arg-type,return-value]
    assert llm.num_aborted == 1  # although somebody still holds the iterator


def test_ctrl_c_while_thinking_keeps_the_thoughts(interrupting: Callable[[int], None]) -> None:
    interrupting(1)
    talk = Talk("a b")
    assert talk.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "Let me "}


def test_ctrl_c_before_the_first_token_takes_the_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "status", lambda self, text: os.kill(os.getpid(), signal.SIGINT))
    talk = Talk("a b")
    assert talk.messages == []
    assert "stopped before the first token; the message was taken back" in talk.err
    assert talk.llm.num_aborted == 1


def test_ctrl_c_just_after_the_last_token_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Session._keep

    def late(self: Session, text: str, answer: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        keep(self, text, answer)

    monkeypatch.setattr(Session, "_keep", late)
    talk = Talk("a", "b")
    assert [m["content"] for m in talk.messages] == ["a", "a", "b", "b"]


def test_ctrl_c_frees_a_command_that_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")  # opening it waits for a writer
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    talk = Talk(f"/load {tmp_path / 'x.json'}", "a")
    timer.join()
    assert talk.messages[0]["content"] == "a"


def test_a_second_ctrl_c_ends_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(seconds: float) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(20)

    monkeypatch.setattr("fakes.time.sleep", hang)
    talk = Talk("a b")
    assert talk.code == 0
    assert talk.llm.num_aborted == 1


def test_a_request_that_is_refused_leaves_the_conversation_as_it_was() -> None:
    talk = Talk("one two", "word " * 30, "/stats", context=24)
    assert [m["content"] for m in talk.messages] == ["one two", "one two"]
    assert "error: the prompt has" in talk.err
    assert (
        "the conversation is unchanged: 7 of 24 context tokens were used at its last complete answer; /reset"
        in talk.err
    )
    assert "used 7 of 24 context tokens" in talk.err


def test_a_full_context_says_so_and_keeps_the_answer() -> None:
    talk = Talk("one two three four", model="talker", context=6)
    assert talk.messages[1]["content"] == "one two "
    assert "the context is full: 6 of 6 tokens are used; /save FILE keeps the conversation, /reset starts" in talk.err


@pytest.mark.parametrize("error", [RequestError("refused"), RuntimeError("bug"), MemoryError("gone"), OSError(5, "io")])
def test_failures_in_a_turn_are_one_line_and_keep_what_was_said(error: Exception) -> None:
    FakeLLM.replies[:] = [Reply("fine"), Reply("half an", error=error), Reply("fine again")]
    talk = Talk("a", "b", "c")
    assert [m["content"] for m in talk.messages] == ["a", "fine", "b", "half an", "c", "fine again"]
    assert talk.out == "fine\nhalf an\nfine again\n"
    assert "error: " in talk.err
    assert "Traceback" not in talk.err


def test_debug_shows_the_traceback_of_a_turn() -> None:
    FakeLLM.replies[:] = [Reply("", error=RuntimeError("bug"))]
    assert "Traceback" in Talk("a", debug=True).err


def test_base_models_complete_each_line_on_its_own() -> None:
    talk = Talk("Once", "Twice", "/system x", "/raw", model="base", raw=True, thinking=False)
    assert [call["prompt"] for call in talk.llm.calls] == ["Once", "Twice"]
    assert talk.messages == []
    assert talk.typist.prompts[0] == "complete> "
    assert talk.err.count("is a base model") == 2


def test_raw_switches_a_chat_model_there_and_back() -> None:
    talk = Talk("a", "/raw", "b", "/raw", "c")
    assert [call.get("prompt") for call in talk.llm.calls] == [None, "b", None]
    assert [m["content"] for m in talk.messages] == ["a", "a", "c", "c"]
    assert talk.typist.prompts[2] == "complete> "


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "with space.json"
    first = Talk("/system Be brief.", "one", f'/save "{path}"', f"/save {tmp_path / 'x.md'}")
    assert f"saved 3 messages to {path}" in first.err
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (tmp_path / "x.md").read_text().startswith("# Conversation with thinker")
    second = Talk(f"/load {path}", "two")
    assert second.messages[:2] == first.messages
    assert second.llm.calls[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(second.llm.calls[0]["messages"]) == 4


def test_save_never_overwrites_silently(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("mine")
    assert f"exists; nothing was written; /save! {path} replaces it" in Talk("a", f"/save {path}").err
    assert path.read_text() == "mine"
    Talk("a", f"/save! {path}")
    assert path.read_text() != "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "name a file: /save FILE.md"),
        ("/save x.doc", "has to end in .md"),
        ("/save /none/x.md", "No such file or directory"),
        ("/save x\0.md", "null"),
        ("/save ~nobody-here/x.md", "home directory that is not known"),
        ("/save " + "x" * 300 + ".md", "File name too long"),
        ("/load /none.json", "a conversation is under way"),
    ],
)
def test_what_save_and_load_cannot_do_is_one_line_and_loses_nothing(line: str, message: str) -> None:
    talk = Talk("a", line, "b")
    assert message in talk.err
    assert "error: " in talk.err
    assert [m["content"] for m in talk.messages] == ["a", "a", "b", "b"]


def test_there_is_nothing_to_save_before_the_first_answer() -> None:
    assert "there is nothing to save yet" in Talk("/save x.md").err
    assert "No such file" in Talk("/load /none.json").err


def test_hostile_answers_and_names_stay_visible_text_on_a_screen() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    llm = FakeLLM("talker\x1b]0;x\x07")
    Session(llm, Console(screen, screen), Typist(("\x1b[2Jhi", "/\x1b[2J")), Conversation()).run()  # type: ignore[arg-type]
    allowed = screen.getvalue().replace("\x1b[2m", "").replace("\x1b[22m", "").replace("\r\x1b[K", "")
    assert "\x1b" not in allowed
    assert "\x07" not in allowed


def completions(text: str) -> list[str]:
    return [c.text for c in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    assert completions("/s") == ["/system", "/save", "/stats"]
    assert completions("hello /s") == completions("/system /s") == completions("text\n/s") == []
    (tmp_path / "notes.json").touch()
    assert completions(f"/load {tmp_path}/no") == ["tes.json"]


def test_history_is_private_and_falls_back_to_memory(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    history = open_history(path)
    history.append_string("secret \ud800")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "secret" in path.read_text()
    path.unlink()
    path.mkdir()
    history.append_string("the file went away")  # not an error
    assert isinstance(open_history(path), InMemoryHistory)
    (tmp_path / "file").touch()
    assert isinstance(open_history(tmp_path / "file" / "history"), InMemoryHistory)
    assert isinstance(open_history(None), InMemoryHistory)
