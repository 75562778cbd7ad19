from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmlocal.errors import RequestError
from glmlocal.text.stop import StopStrings, held_back

# Two letters make overlaps, repetitions and near misses likely.
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
CHUNKS = st.lists(st.text("ab", max_size=6), max_size=8)


def one_shot(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut where the first stop string is complete; of several there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def streamed(chunks: list[str], stops: list[str]) -> tuple[list[str], bool]:
    stream, emitted, stopped = StopStrings(stops), [], False
    for chunk in chunks:
        text, stopped = stream.push(chunk)
        emitted.append(text)
    return [*emitted, stream.finish()], stopped


@given(CHUNKS, STOPS)
@example(["ab", "c"], ["abc", "b"])
@example(["aab"], ["ab", "aab"])
def test_chunks_give_what_the_whole_text_gives(chunks: list[str], stops: list[str]) -> None:
    emitted, stopped = streamed(chunks, stops)
    assert ("".join(emitted), stopped) == one_shot("".join(chunks), stops)


@given(CHUNKS, STOPS)
def test_only_what_could_become_a_stop_is_held_back(chunks: list[str], stops: list[str]) -> None:
    stream, text, emitted = StopStrings(stops), "", ""
    for chunk in chunks:
        piece, stopped = stream.push(chunk)
        if stopped:
            return
        text, emitted = text + chunk, emitted + piece
        held = text[len(emitted) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@given(st.text("ab", max_size=6), STOPS)
def test_held_back_is_the_longest_beginning(text: str, needles: list[str]) -> None:
    lengths = [n for needle in needles for n in range(len(needle)) if text.endswith(needle[:n])]
    assert held_back(text, needles) == max(lengths, default=0)


def test_text_after_the_stop_is_dropped() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("Hello\n") == ("Hello", False)
    assert stream.push("\nUser: more") == ("", True)
    assert stream.push("and more") == ("", True)
    assert stream.finish() == ""


def test_without_stops_everything_passes_at_once() -> None:
    stream = StopStrings()
    assert stream.push("abc") == ("abc", False)
    assert stream.finish() == ""


@pytest.mark.parametrize("stops", ["abc", ["a", ""], [3], [None]])
def test_unusable_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(RequestError, match="stop must be a list of strings"):
        StopStrings(stops)
