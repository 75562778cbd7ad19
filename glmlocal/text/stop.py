"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from glmlocal.errors import RequestError
from glmlocal.text.files import quoted


def held_back(text: str, needles: Iterable[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning, but not the whole, of a needle."""
    longest = 0
    for needle in needles:
        for length in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:length]):
                longest = length
                break
    return longest


class StopStrings:
    """Cuts a stream at the first stop string, whatever the chunks are.

    "First" is the one that is complete first; of several that are complete at the same character, the longest. That is
    the moment at which generation can stop, and it needs no look at later text. The stop string is not emitted.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Raises RequestError: a stop that is empty, which would end every answer before it begins."""
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop must be a list of strings that are not empty, found {quoted(stops)}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False
        self.matched: str | None = None  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Text that cannot be part of a stop string any more, and whether one was found; all later text is dropped."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held, self._stopped = "", True
            return text[:start], True
        keep = len(text) - held_back(text, self._stops)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """What was held back when the stream ended without a stop string."""
        held, self._held = self._held, ""
        return held
