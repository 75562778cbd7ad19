"""A process in a pseudo-terminal and the screen that a person would see (pexpect + pyte)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import pexpect
import pyte
import pyte.graphics

# pyte does not know SGR 2 (dim); let it draw dim text as italics, which nothing here uses.
pyte.graphics.TEXT[2], pyte.graphics.TEXT[22] = "+italics", "-italics"


class Terminal:
    """A process in a pseudo-terminal and the screen that a person would see."""

    def __init__(self, command: Sequence[str], *, columns: int = 120, rows: int = 30, **environment: str) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        variables = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment}
        for name in ("NO_COLOR", "PYTHONUNBUFFERED"):  # the second would hide a missing flush
            variables.pop(name, None)
        program, *arguments = command
        self.process = pexpect.spawn(program, arguments, env=variables, dimensions=(rows, columns), timeout=20)

    @property
    def lines(self) -> list[str]:
        """All lines so far, those scrolled out of sight included, without blanks at their ends."""
        columns = range(self.screen.columns)
        gone = ["".join(line[x].data for x in columns) for line in self.screen.history.top]
        return [line.rstrip() for line in [*gone, *self.screen.display]]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def type(self, text: str) -> None:
        self.process.send(text)

    def read(self, timeout_s: float = 0.05) -> bool:
        """Draw what has come; False at the end of the process's output."""
        try:
            self._stream.feed(self.process.read_nonblocking(65536, timeout_s))
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            return False
        return True

    def wait(self, condition: str | Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Read until a text is on the screen, or a condition holds."""
        end = time.monotonic() + timeout_s
        while not (condition in self.text if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"never saw {condition!r} in:\n{self.text.rstrip()}"
            assert self.read(), f"ended without {condition!r}:\n{self.text.rstrip()}"

    def say(self, text: str) -> None:
        """Type a message at an empty prompt."""
        self.wait(self.at_prompt)
        self.type(text + "\r")

    def at_prompt(self) -> bool:
        return self.screen.display[self.screen.cursor.y].rstrip() == ">" and self.screen.cursor.x == 2

    def end(self) -> int:
        """Wait for the process to end; its exit code."""
        while self.read(0.5):
            pass
        self.process.close()
        assert self.process.exitstatus is not None, self.process.signalstatus
        return int(self.process.exitstatus)

    def is_dim(self, text: str) -> bool:
        """Is every visible character of that text, which is on the screen, dim?"""
        for y, line in enumerate(self.screen.display):
            if text in line:
                start = line.index(text)
                cells = [self.screen.buffer[y][x] for x in range(start, start + len(text))]
                return all(cell.italics for cell in cells if cell.data != " ")
        raise AssertionError(f"no {text!r} in:\n{self.text.rstrip()}")
