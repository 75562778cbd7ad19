"""What a whole answer is, parsed in pieces of any size: for tests of the stream's two parsers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta, ReasoningParser
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallEnd, ToolCallParser, ToolCallStart


@dataclass(frozen=True)
class Parsed:
    """``calls``: (name, text of the arguments) in order; ``raw``: what each complete call was."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]
    raw: tuple[str, ...]
    num_open: int  # calls that were cut off

    @property
    def values(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def tool(name: str, properties: Mapping[str, Any] | None = None, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", **({} if properties is None else {"properties": properties}), **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def pieces(text: str, size: int) -> Iterable[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def parse(
    chunks: Iterable[str],
    tools: Sequence[Mapping[str, Any]],
    *,
    reasons: bool = False,
    truncated: bool = False,
    suppress: bool = False,
) -> Parsed:
    """Both parsers over the chunks; checks what every stream of events must hold to."""
    first, second = ReasoningParser(reasons), ToolCallParser(tools, suppress=suppress)
    events: list[Any] = []
    for chunk in [*chunks, None]:
        parts = first.finish() if chunk is None else first.push(chunk)
        for part in parts:
            events += [part] if isinstance(part, ReasoningDelta) else second.push(part.text)
    events += second.finish(truncated=truncated)
    names: list[str] = []
    arguments: list[str] = []
    raw: list[str] = []
    open_calls: list[int] = []
    for event in events:
        match event:
            case ToolCallStart(index, name):
                assert index == len(names), "calls are numbered in order"
                names.append(name)
                arguments.append("")
                open_calls.append(index)
            case ToolCallDelta(index, text):
                assert open_calls == [index], "pieces belong to the open call"
                assert text, "no empty pieces"
                arguments[index] += text
            case ToolCallEnd(index, text, is_complete):
                assert open_calls.pop() == index
                raw += [text] if is_complete else []
                if is_complete:
                    json.loads(arguments[index])
            case ContentDelta(text) | ReasoningDelta(text):
                assert text, "no empty deltas"
    assert not open_calls, "every call ends"
    return Parsed(
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        "".join(event.text for event in events if isinstance(event, ContentDelta)),
        tuple(zip(names, arguments, strict=True)),
        tuple(raw),
        len(names) - len(raw),
    )
