"""The multi-turn prompt: a conversation, the slash commands that change it, and the loop that reads and answers.

No failure inside a turn ends the session or loses the conversation; a message that got no answer is taken back, so
that user and assistant keep alternating as chat templates expect.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glmlocal.cli import transcript
from glmlocal.cli.chat_render import Answer, AnswerView, deferred_interrupt, ending, footer
from glmlocal.cli.terminal import Console, no_echo, one_line
from glmlocal.cli.transcript import Message, Transcript
from glmlocal.errors import ConfigError, GlmlocalError, RequestError

if TYPE_CHECKING:
    from glmlocal.completion import CompletionDelta
    from glmlocal.llm import LLM

COMMANDS: dict[str, tuple[str, str]] = {  # name: arguments, what it does
    "/help": ("", "show this list"),
    "/think": ("", "let the model think before it answers"),
    "/nothink": ("", "answer at once"),
    "/system": ("TEXT", "set the system prompt; without TEXT show it, with - remove it"),
    "/raw": ("", "switch between chat and raw completion, where each message is continued as it stands"),
    "/reset": ("", "forget the conversation; the system prompt stays"),
    "/save": ("FILE", "write the conversation as .md or .json; /save! replaces a file that exists"),
    "/load": ("FILE.json", "continue a saved conversation"),
    "/stats": ("", "show what the session has used so far"),
    "/quit": ("", "leave (so do /exit and Ctrl-D)"),
}
_ALIASES = {"/exit": "/quit"}


class LineReader(Protocol):
    """Reads one message. Raises EOFError at the end of input and KeyboardInterrupt for Ctrl-C on an empty line."""

    def __call__(self, prompt: str) -> str: ...


@dataclass(slots=True)
class Conversation:
    """Messages without the system prompt, which outlives them."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def all_messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages


@dataclass(slots=True)
class Session:
    """One person at one terminal."""

    llm: LLM
    console: Console
    read_line: LineReader
    conversation: Conversation = field(default_factory=Conversation)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool = True
    raw: bool = False
    debug: bool = False
    context_used: int = 0  # tokens of the conversation at the last answer
    num_answers: int = 0
    generated_tokens: int = 0

    def run(self) -> int:
        """Read and answer until /quit or the end of input. Returns the exit code."""
        self._welcome()
        while True:
            try:
                if self._next():
                    return 0
            except KeyboardInterrupt:
                self.console.note("to leave: /quit or Ctrl-D")
            except EOFError:
                return 0

    def _next(self) -> bool:
        """Read one line and act on it; True when it ends the session."""
        line = self.read_line("complete> " if self.raw else "> ")
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        if line.strip():
            with deferred_interrupt():  # a Ctrl-C just after the last token must not cost the answer
                self.turn(line.removeprefix("/") if line.startswith("//") else line)
        return False

    def _welcome(self) -> None:
        what = "raw completion" if self.raw else f"thinking {'on' if self.thinking else 'off'}"
        if not self.raw and not self.llm.supports_thinking:
            what = "no thinking mode"
        self.console.note(f"{self.llm.model_name} · context {self.llm.context:,} tokens · {what} · /help")

    def turn(self, text: str) -> None:
        """Answer one message, or continue it in raw mode."""
        view = AnswerView(self.console)
        failure: Exception | None = None
        try:
            with no_echo():
                view.run(lambda: self._start(text))
        except BrokenPipeError:
            raise
        except Exception as error:
            failure = error
        answer = view.answer
        if answer.has_text and not answer.text.endswith("\n"):
            self.console.answer("\n")
        kept = answer.completion is not None or answer.has_text or answer.has_reasoning
        if kept:
            self._keep(text, answer)
        if failure is not None:
            self._show_failure(failure)
        elif kept:
            self.console.note(footer(answer, self.llm.context, self.llm.offload_stats))
            self._show_ending(answer)
        else:
            self.console.note("stopped before the first token; the message was taken back")

    def _start(self, text: str) -> Iterator[CompletionDelta]:
        if self.raw:
            return self.llm.generate(text, stream=True, **self.sampling)
        messages = [*self.conversation.all_messages(), {"role": "user", "content": text}]
        return self.llm.chat(messages, stream=True, enable_thinking=self.thinking, **self.sampling)

    def _keep(self, text: str, answer: Answer) -> None:
        self.num_answers += 1
        self.generated_tokens += answer.num_tokens
        if self.raw:
            return
        reply = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            reply["reasoning_content"] = answer.reasoning
        self.conversation.messages += [{"role": "user", "content": text}, reply]
        if answer.completion is not None:
            self.context_used = answer.completion.usage.total_tokens

    def _show_ending(self, answer: Answer) -> None:
        if answer.completion is None:
            return
        reason = ending(answer.completion, self.llm.context)
        if reason is not None:
            full = answer.completion.usage.total_tokens >= self.llm.context and not self.raw
            self.console.show(reason + ("; /save FILE keeps the conversation, /reset starts a new one" if full else ""))

    def _show_failure(self, error: Exception) -> None:
        if self.debug:
            self.console.show("".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, GlmlocalError):
            self.console.error(str(error))
        else:
            hint = "" if self.debug else "; --debug shows the traceback"
            self.console.error(f"the answer failed: {type(error).__name__}: {error}{hint}")
        if isinstance(error, RequestError) and self.conversation.messages and not self.raw:
            self.console.show(
                f"the conversation is unchanged: {self.context_used:,} of {self.llm.context:,} context tokens "
                "were used at its last complete answer; /reset starts a new one"
            )

    def command(self, line: str) -> bool:
        """Run a slash command; True when it ends the session. Nothing a command meets is fatal."""
        name, argument = (*line.split(maxsplit=1), "")[:2]
        argument = argument.strip()
        overwrite = name == "/save!"
        name = "/save" if overwrite else _ALIASES.get(name, name)
        if name == "/quit":
            return True
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            self.console.show(
                f"there is no command {one_line(name)}: {hint} (to send a text that starts with /, write //)"
            )
            return False
        try:
            self._run_command(name, argument, overwrite)
        except GlmlocalError as error:
            self.console.error(str(error))
        except (OSError, ValueError) as error:  # ValueError: a NUL in a path
            self.console.error(f"{name} {argument}: {getattr(error, 'strerror', None) or error}")
        return False

    def _run_command(self, name: str, argument: str, overwrite: bool) -> None:
        handlers: dict[str, Callable[[], None]] = {
            "/help": self._help,
            "/think": lambda: self._set_thinking(True),
            "/nothink": lambda: self._set_thinking(False),
            "/system": lambda: self._system(argument),
            "/raw": self._toggle_raw,
            "/reset": self._reset,
            "/save": lambda: self._save(argument, overwrite),
            "/load": lambda: self._load(argument),
            "/stats": self._stats,
        }
        handlers[name]()

    def _help(self) -> None:
        lines = [f"{f'{name} {arguments}':18}{meaning}" for name, (arguments, meaning) in COMMANDS.items()]
        lines.append("Enter sends; Esc Enter, or \\ at the end of a line, starts a new line; Ctrl-C stops an answer")
        self.console.show("\n".join(lines))

    def _set_thinking(self, thinking: bool) -> None:
        if not self.llm.supports_thinking:
            self.console.show(f"{self.llm.model_name} has no thinking mode")
            return
        self.thinking = thinking
        self.console.note(f"thinking is {'on' if thinking else 'off'}")

    def _system(self, text: str) -> None:
        if self.llm.chat_template is None:
            raise ConfigError(f"{self.llm.model_name} is a base model: it has no chat template and no system prompt")
        if text:
            self.conversation.system = None if text == "-" else text
        current = self.conversation.system
        self.console.show("no system prompt is set" if current is None else f"system prompt: {current}")

    def _toggle_raw(self) -> None:
        if self.llm.chat_template is None:
            raise ConfigError(
                f"{self.llm.model_name} is a base model: without a chat template it only completes raw text"
            )
        self.raw = not self.raw
        self.console.note("raw completion" if self.raw else "chat")

    def _reset(self) -> None:
        count = len(self.conversation.messages)
        self.conversation.messages.clear()
        self.context_used = 0
        self.console.note(f"{count} messages forgotten")

    def _save(self, argument: str, overwrite: bool) -> None:
        path = _path(argument, "/save FILE.md or /save FILE.json")
        messages = self.conversation.all_messages()
        if not messages:
            raise ConfigError("there is nothing to save yet")
        try:
            transcript.save(Transcript(self.llm.model_name, messages), path, overwrite=overwrite)
        except transcript.FileTaken as error:
            raise ConfigError(f"{error}; /save! {argument} replaces it") from error
        self.console.note(f"saved {len(messages)} messages to {path}")

    def _load(self, argument: str) -> None:
        if self.conversation.messages:
            raise ConfigError("a conversation is under way; /save it if it matters, /reset, then /load")
        loaded = transcript.load(_path(argument, "/load FILE.json"))
        messages = list(loaded.messages)
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.conversation = Conversation(messages[0]["content"] if has_system else None, messages[has_system:])
        self.console.note(f"loaded {len(messages)} messages")

    def _stats(self) -> None:
        self.console.show(
            f"{self.num_answers} answers, {self.generated_tokens:,} tokens generated; "
            f"the conversation has {len(self.conversation.messages)} messages and used "
            f"{self.context_used:,} of {self.llm.context:,} context tokens at the last answer; "
            f"the model loaded in {self.llm.load_s:.1f} s"
        )


def _path(argument: str, usage: str) -> Path:
    """A path as people write it at a prompt: with ~ and perhaps in quotes."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    if not argument:
        raise ConfigError(f"name a file: {usage}")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ConfigError(f"{argument!r} starts with a home directory that is not known") from error
