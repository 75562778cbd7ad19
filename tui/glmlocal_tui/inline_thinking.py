"""Thinking that a server leaves in the text as ``<think>…</think>``, taken out while it streams. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_OPEN, _CLOSE = "<think>", "</think>"
_START, _OPENED, _THINKING, _BETWEEN, _ANSWER = range(5)


@dataclass(slots=True)
class InlineThinking:
    """Only tags that begin the answer count: further on they are what the answer is about. At most a part of a tag,
    and the blanks around it, are held back."""

    _state: int = _START
    _held: str = ""

    def feed(self, text: str) -> tuple[str, str]:
        """The next piece of the text → (content, reasoning)."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state == _START:
            begun = text.lstrip()
            if begun.startswith(_OPEN):
                self._state, text = _OPENED, begun[len(_OPEN) :]
            elif _OPEN.startswith(begun):  # not enough to tell
                self._held = text
                return "", ""
            else:
                self._state = _ANSWER
        if self._state == _OPENED:
            text = text.lstrip()
            if text:
                self._state = _THINKING
        if self._state == _THINKING:
            reasoning, closed, text = text.partition(_CLOSE)
            if not closed:
                kept = _part_of_tag(reasoning)
                self._held = reasoning[len(reasoning) - kept :]
                return "", reasoning[: len(reasoning) - kept]
            self._state = _BETWEEN
        if self._state == _BETWEEN:
            text = text.lstrip()
            if text:
                self._state = _ANSWER
        return text, reasoning

    def end(self) -> tuple[str, str]:
        """What was held back when nothing more comes → (content, reasoning)."""
        held, self._held = self._held, ""
        return ("", held) if self._state == _THINKING else (held, "")

    def switch_off(self) -> None:
        """The server separates thinking itself: tags are text."""
        self._state = _ANSWER


def _part_of_tag(text: str) -> int:
    """Characters at the end of a text that may be the beginning of the closing tag."""
    return next((size for size in range(len(_CLOSE) - 1, 0, -1) if text.endswith(_CLOSE[:size])), 0)
