from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.cli.terminal import Console, bar, one_line, safe_text

ANY_TEXT = st.text(st.characters(codec=None), max_size=80)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


@given(st.lists(ANY_TEXT, max_size=5))
def test_safe_text_leaves_no_control_character_whatever_the_chunks(chunks: list[str]) -> None:
    safe = "".join(map(safe_text, chunks))
    assert safe == safe_text("".join(chunks))
    assert not [c for c in safe if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_safe_text_shows_what_was_there() -> None:
    assert safe_text("\x1b[31mred\x1b]0;title\x07\r\n\t\x7f\x9b2J 中") == "␛[31mred␛]0;title␇\n\t␡�2J 中"


@given(ANY_TEXT)
def test_one_line_is_one_short_line(text: str) -> None:
    line = one_line(text)
    assert len(line) <= 1000
    assert not [c for c in line if unicodedata.category(c) == "Cc"]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Screen()


def test_answer_is_neutralised_on_a_screen_and_untouched_elsewhere(screen: Screen) -> None:
    Console(screen, io.StringIO()).answer("\x1b[2Jx")
    assert screen.getvalue() == "␛[2Jx"
    file = io.StringIO()
    Console(file, screen).answer("\x1b[2Jx\r\n")
    assert file.getvalue() == "\x1b[2Jx\r\n"


def test_without_a_screen_there_is_no_escape_sequence_and_no_status() -> None:
    err = io.StringIO()
    console = Console(io.StringIO(), err)
    console.status("reading the prompt 10%")
    console.dim("thinking")
    console.note("footer")
    assert err.getvalue() == "thinking\nfooter\n"


def test_note_starts_a_line_of_its_own_after_an_answer_on_the_same_screen(screen: Screen) -> None:
    console = Console(screen, screen)
    console.answer("no newline")
    console.note("footer")
    assert screen.getvalue() == "no newline\n\x1b[2mfooter\n\x1b[22m"


def test_note_does_not_break_the_line_of_an_answer_that_went_to_a_file(screen: Screen) -> None:
    Console(io.StringIO(), screen).note("footer")
    assert screen.getvalue() == "\x1b[2mfooter\n\x1b[22m"


def test_status_is_cleared_before_anything_else_is_drawn(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda fd: __import__("os").terminal_size((20, 10)))
    console = Console(screen, screen)
    console.status("a status line that is wider than the screen")
    console.answer("text")
    assert screen.getvalue() == "\r\x1b[K\x1b[2ma status line that \x1b[22m\r\x1b[Ktext"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_dim_is_plain_where_it_is_not_wanted(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    Console(screen, screen).dim("x")
    assert screen.getvalue() == "x"


@pytest.mark.parametrize(("fraction", "filled"), [(-1, 0), (0, 0), (0.5, 12), (1, 24), (7, 24)])
def test_bar(fraction: float, filled: int) -> None:
    assert bar(fraction).count("━") == filled
    assert len(bar(fraction)) == 24
