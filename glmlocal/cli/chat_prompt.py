"""Where a person types: prompt_toolkit with history, several lines, and completion of slash commands and paths."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output

from glmlocal.cli.chat_session import COMMANDS, LineReader


class TolerantHistory(FileHistory):
    """A history file that stops being written, rather than stopping the chat, when the disk does not take it."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history(path: Path | None) -> History:
    """History in that file, readable by its owner alone, or in memory where it cannot be written."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return TolerantHistory(str(path))


class CommandCompleter(Completer):
    """Slash commands at the start of a message, file names after /save and /load; nothing anywhere else."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        command, space, argument = before.partition(" ")
        if not space:
            for name, (_, meaning) in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=meaning)
        elif command in ("/save", "/save!", "/load"):
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)


def _bindings() -> KeyBindings:
    """Enter sends, Esc Enter or a trailing backslash starts a line, Ctrl-C empties the line before it interrupts."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


def _continuation(width: int, line_number: int, wrap_count: int) -> str:
    """What stands before the second and later lines: a mark for those of the message, blanks for wrapped ones."""
    return " " * width if wrap_count else "· ".rjust(width)


def line_reader(stream: TextIO, history: History) -> LineReader:
    """A reader that draws on that stream, which is a terminal."""
    output = create_output(stream)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # asking where the cursor is costs a round trip and mixes with what is typed ahead
    session: PromptSession[str] = PromptSession(
        history=history,
        output=output,
        multiline=True,
        key_bindings=_bindings(),
        completer=CommandCompleter(),
        complete_while_typing=True,
        prompt_continuation=_continuation,
    )

    def read(prompt: str) -> str:
        text: str = session.prompt(prompt)
        return text.encode("utf-8", "replace").decode()  # bytes that are not UTF-8 arrive as lone surrogates

    return read
