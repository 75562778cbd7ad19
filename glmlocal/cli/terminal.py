"""What reaches the screen: text without control characters, dim text, one status line that comes and goes.

Answers go to ``out`` (stdout), everything else to ``err`` (stderr). Text that came from a model or a file can carry
escape sequences that would rewrite the screen, the title or the clipboard; they are made visible here, and only here.
"""

from __future__ import annotations

import io
import os
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

MAX_LINE_CHARS = 1000
_DIM, _DIM_OFF, _CLEAR_LINE = "\x1b[2m", "\x1b[22m", "\r\x1b[K"
_REDRAW_EVERY_S = 0.1

# C0 and DEL become their pictures (␛); C1, which some terminals obey as ESC + letter, has none.
_PICTURES: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20)}
_PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}
_SCREEN = _PICTURES | {ord("\n"): ord("\n"), ord("\t"): ord("\t"), ord("\r"): None}


def safe_text(text: str) -> str:
    """Text that a terminal only draws: newline and tab stay, CR goes, other control characters become pictures."""
    return text.translate(_SCREEN)


def one_line(text: str) -> str:
    """Text for a message: safe, without newlines, at most MAX_LINE_CHARS long."""
    line = " ".join(text[: 4 * MAX_LINE_CHARS].split()).translate(_PICTURES)
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"


def use_utf8() -> None:
    """Make stdout and stderr UTF-8 whatever the locale says, and present even when the caller closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller (>&-): the devnull takes the free descriptor before a model file can
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def dimmed(text: str, stream: TextIO) -> str:
    """Text as less important than the rest, where the stream is a screen that can show it."""
    return f"{_DIM}{text}{_DIM_OFF}" if _shows_styles(stream) else text


def _understands_escapes(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _shows_styles(stream: TextIO) -> bool:
    return _understands_escapes(stream) and not os.environ.get("NO_COLOR")


class Console:
    """The two output streams and what is on the current line of the screen.

    ``out_is_screen`` and ``err_is_screen`` say whether a stream is a terminal; styles and the status line need ``err``
    to be one that understands escape sequences.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.out_is_screen, self.err_is_screen = self.out.isatty(), self.err.isatty()
        self.animated = _understands_escapes(self.err)
        self._dims = _shows_styles(self.err)
        self._line_is_open = False  # the screen's cursor is not in the first column
        self._status = ""
        self._status_time = 0.0

    def answer(self, text: str) -> None:
        """Part of an answer, shown at once: as it is to a file or pipe, neutralised on a screen."""
        if not text:
            return
        if self.out_is_screen:
            self.clear_status()
            text = safe_text(text)
            if self.err_is_screen:
                self._line_is_open = not text.endswith("\n")
        self.out.write(text)
        self.out.flush()

    def dim(self, text: str) -> None:
        """Part of something less important than the answer, on stderr."""
        if not text:
            return
        self.clear_status()
        text = safe_text(text)
        self.err.write(f"{_DIM}{text}{_DIM_OFF}" if self._dims else text)
        self.err.flush()
        self._line_is_open = not text.endswith("\n")

    def fresh_line(self) -> None:
        """Move to the first column of stderr's screen unless the cursor is there already."""
        self.clear_status()
        if self._line_is_open:
            self.err.write("\n")
            self.err.flush()
            self._line_is_open = False

    def note(self, text: str) -> None:
        """A dim line of its own on stderr."""
        self.fresh_line()
        if self.err_is_screen:
            text = textwrap.fill(text, self._columns(), break_long_words=False, break_on_hyphens=False)
        self.dim(text + "\n")

    def show(self, text: str) -> None:
        """Lines for a person in a session, in normal weight: replies to commands, errors."""
        self.fresh_line()
        stream = self.out if self.out_is_screen else self.err
        stream.write(safe_text(text) + "\n")
        stream.flush()

    def error(self, text: str) -> None:
        self.show(f"error: {one_line(text)}")

    def status(self, text: str) -> None:
        """Replace the status line, at most ten times a second; nothing at all where there is no screen for it."""
        now = time.monotonic()
        if not self.animated or text == self._status or now - self._status_time < _REDRAW_EVERY_S:
            return
        if not self._status:
            self.fresh_line()
        self._status, self._status_time = text, now
        line = one_line(text)[: self._columns() - 1]  # a line that wrapped could not be cleared
        self.err.write(f"{_CLEAR_LINE}{_DIM}{line}{_DIM_OFF}" if self._dims else f"{_CLEAR_LINE}{line}")
        self.err.flush()

    def _columns(self) -> int:
        try:
            return max(os.get_terminal_size(self.err.fileno()).columns, 2)
        except OSError:
            return 80

    def clear_status(self) -> None:
        if self._status:
            self._status = ""
            self.err.write(_CLEAR_LINE)
            self.err.flush()


@contextmanager
def no_echo(fd: int = 0) -> Iterator[None]:
    """What is typed meanwhile, ``^C`` included, is not drawn into the answer; it waits for the next prompt."""
    try:
        before = termios.tcgetattr(fd)
    except (termios.error, OSError):  # no terminal
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def bar(fraction: float, width: int = 24) -> str:
    """0.5 → ``━━━━━━━━━━━━            `` (the caller adds the numbers)."""
    filled = round(min(max(fraction, 0.0), 1.0) * width)
    return "━" * filled + "╌" * (width - filled)
