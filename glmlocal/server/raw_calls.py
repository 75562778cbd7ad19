"""Tool calls as the model wrote them, so that the next turn's prompt repeats them token by token.

A client sends a call back as JSON; the template would write that JSON in its own way, and the prefix cache would end
there. So the text of each call is kept under its id, and used when the client sends the same call back.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_CALLS, _MAX_CHARS = 8_192, 16 << 20
_FIRST_MARK = 0xF0000  # a private-use plane: in no model's text, and one character whatever the number


@dataclass(frozen=True, slots=True)
class _Kept:
    name: str
    arguments: Any  # parsed
    raw: str


class RawCalls:
    """Tool call id → its text; the oldest go first when there are too many."""

    def __init__(self, max_calls: int = _MAX_CALLS, max_chars: int = _MAX_CHARS) -> None:
        self._max_calls, self._max_chars = max_calls, max_chars
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_chars = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, call_id: str, name: str, arguments: str, raw: str) -> None:
        """Remember a complete call; ``arguments`` is its JSON object."""
        self._forget(call_id)
        self._kept[call_id] = _Kept(name, json.loads(arguments), raw)
        self._num_chars += len(raw)
        while self._kept and (len(self._kept) > self._max_calls or self._num_chars > self._max_chars):
            self._forget(next(iter(self._kept)))

    def raw(self, call_id: object, name: str, arguments: object) -> str | None:
        """What the model wrote, if this is the call that it made; None for another, or one that is not known."""
        kept = self._kept.get(call_id) if isinstance(call_id, str) else None
        if kept is None or kept.name != name or kept.arguments != arguments:
            return None
        self._kept.move_to_end(str(call_id))
        return kept.raw

    def _forget(self, call_id: str) -> None:
        kept = self._kept.pop(call_id, None)
        if kept is not None:
            self._num_chars -= len(kept.raw)


def with_marks(
    messages: Sequence[Mapping[str, Any]], calls: RawCalls
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Normalized messages in which every known call is a mark without arguments, and mark → what belongs there.

    The template then writes ``<tool_call>MARK`` … ``</tool_call>``, which ``unmark`` replaces as a whole.
    """
    texts: dict[str, str] = {}
    marked: list[Mapping[str, Any]] = []
    for message in messages:
        tool_calls = message.get("tool_calls")
        if not tool_calls:
            marked.append(message)
            continue
        copies = []
        for call in tool_calls:
            function = call.get("function", call)
            raw = calls.raw(call.get("id"), function["name"], function["arguments"])
            if raw is None:
                copies.append(call)
                continue
            mark = chr(_FIRST_MARK + len(texts))
            texts[mark] = raw
            copies.append({**call, "function": {**function, "name": mark, "arguments": {}}})
        marked.append({**message, "tool_calls": copies})
    return marked, texts


def unmark(prompt: str, texts: Mapping[str, str]) -> str | None:
    """The prompt with the calls in their places; None where the template wrote a mark in a way that is not known."""
    if any(prompt.count(mark) != 1 for mark in texts):  # or somebody's text holds one
        return None
    pieces, position = [], 0
    for mark, raw in texts.items():
        opening = f"<tool_call>{mark}"
        start = prompt.find(opening, position)
        end = prompt.find("</tool_call>", start)
        if start < 0 or end < 0 or prompt[start + len(opening) : end].strip():
            return None
        pieces += [prompt[position:start], raw]
        position = end + len("</tool_call>")
    return "".join([*pieces, prompt[position:]])
