"""Thinking that a server leaves in the text, as ``<think>…</think>`` or with the closing tag alone (GLM's template
writes the opening one into the prompt), taken out while it streams. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"
_START, _OPENED, _THINKING, _BETWEEN, _UNSURE, _ANSWER = range(6)


class Piece(NamedTuple):
    """What a piece of the text was. ``retracts``: all content before it was thinking too."""

    content: str
    reasoning: str
    retracts: bool = False


@dataclass(slots=True)
class InlineThinking:
    """An opening tag counts where the answer begins: further on it is what the answer is about. A closing tag without
    one counts once, beside a line's end, outside of code. At most a tag and the blanks around it are held back."""

    _state: int = _START
    _held: str = ""
    _said: list[str] = field(default_factory=list)  # content so far, while a closing tag may still make it thinking

    def feed(self, text: str) -> Piece:
        """The next piece of the text."""
        text, self._held = self._held + text, ""
        reasoning, retracts = "", False
        if self._state == _START:
            begun = text.lstrip()
            if begun.startswith(_OPEN):
                self._state, text = _OPENED, begun[len(_OPEN) :]
            elif _OPEN.startswith(begun):  # not enough to tell
                self._held = text
                return Piece("", "")
            else:
                self._state = _UNSURE
        if self._state == _OPENED:
            text = text.lstrip()
            if text:
                self._state = _THINKING
        if self._state == _THINKING:
            reasoning, closed, text = text.partition(_CLOSE)
            if not closed:
                kept = _part_of_tag(reasoning)
                self._held = reasoning[len(reasoning) - kept :]
                return Piece("", reasoning[: len(reasoning) - kept])
            self._state = _BETWEEN
        if self._state == _UNSURE:
            at = self._closing_tag(text)
            if at is None:
                kept = len(_CLOSE) if text.endswith(_CLOSE) else _part_of_tag(text)  # its line's end may follow
                self._held, text = text[len(text) - kept :], text[: len(text) - kept]
                self._said.append(text)
                return Piece(text, "")
            reasoning, text, retracts = text[:at], text[at + len(_CLOSE) :], True
            self._state = _BETWEEN
        if self._state == _BETWEEN:
            text = text.lstrip()
            if text:
                self._state = _ANSWER
        return Piece(text, reasoning, retracts)

    def end(self) -> Piece:
        """What was held back when nothing more comes."""
        held, self._held = self._held, ""
        if self._state == _UNSURE and self._closing_tag(held + " ") == 0:
            return Piece("", "", True)
        return Piece("", held) if self._state == _THINKING else Piece(held, "")

    def switch_off(self) -> None:
        """The server separates thinking itself: tags are text."""
        self._state = _ANSWER

    def _closing_tag(self, text: str) -> int | None:
        """Where in ``text``, which follows what was said, the tag is that ends thinking begun in the prompt."""
        at = text.find(_CLOSE)
        if at < 0:
            return None
        said = "".join(self._said)
        while at >= 0:
            before, after = said + text[:at], text[at + len(_CLOSE) :]
            beside = not before or before.endswith("\n") or after.startswith(("\n", "\r"))
            if beside and after and _OPEN not in before and not _in_code(before):
                return at
            at = text.find(_CLOSE, at + 1)
        return None


def _in_code(text: str) -> bool:
    """Does a text end within a code block or a code span?"""
    lines = text.split("\n")
    fences = sum(1 for line in lines if line.lstrip().startswith(("```", "~~~")))
    return fences % 2 == 1 or lines[-1].count("`") % 2 == 1


def _part_of_tag(text: str) -> int:
    """Characters at the end of a text that may be the beginning of the closing tag."""
    return next((size for size in range(len(_CLOSE) - 1, 0, -1) if text.endswith(_CLOSE[:size])), 0)
