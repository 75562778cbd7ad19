"""Output items of a response, and the events that tell of them: one item is open at a time."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmlocal.server.model import ServedModel
from glmlocal.server.reply import Call, Reply, token_logprobs
from glmlocal.server.responses_input import seal
from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallEnd, ToolCallStart

Event = tuple[str, dict[str, Any]]


@dataclass(slots=True)
class Items:
    """``done`` holds the items that are complete, in order. ``seals``: reasoning goes out as encrypted_content too;
    ``with_logprobs``: those of a message's tokens stand beside its text."""

    model: ServedModel
    seals: bool = False
    with_logprobs: bool = False
    done: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, Any] | None = None
    _text: str = ""
    _logprobs: list[dict[str, Any]] = field(default_factory=list)  # of the open message
    _call: Call | None = None

    def take(self, event: object, reply: Reply) -> Iterator[Event]:
        match event:
            case ReasoningDelta(text):
                yield from self._append("reasoning", text)
            case ContentDelta(text):
                yield from self._append("message", text, self._spelling(text, reply))
            case ToolCallStart(index, _):
                yield from self.close()
                self._call = reply.calls[index]
                yield from self._begin(_call_item(self._call, "in_progress", ""))
            case ToolCallDelta(_, arguments):
                self._text += arguments
                yield "response.function_call_arguments.delta", {**self._place(), "delta": arguments}
            case ToolCallEnd():
                yield from self.close()

    def close(self) -> Iterator[Event]:
        """Complete the open item; what was cut off is incomplete."""
        item, self._open = self._open, None
        if item is None:
            return
        place = {"item_id": item["id"], "output_index": len(self.done)}
        status = "completed"
        if item["type"] == "function_call":
            assert self._call is not None
            status = "completed" if self._call.is_complete else "incomplete"
            item = {**item, "status": status, "arguments": self._text}
            yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": self._text}
        else:
            part = _part(item["type"], self._text, self._logprobs)
            item = {**item, "content": [part], **({} if item["type"] == "reasoning" else {"status": status})}
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            logprobs: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": self._logprobs}
            yield f"response.{name}.done", {**place, "content_index": 0, "text": self._text, **logprobs}
            yield "response.content_part.done", {**place, "content_index": 0, "part": part}
            if item["type"] == "reasoning" and self.seals:
                item["encrypted_content"] = seal(self._text)
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._text, self._logprobs, self._call = "", [], None

    def _spelling(self, text: str, reply: Reply) -> list[dict[str, Any]]:
        """The logprobs of the tokens that wrote ``text``; those before it were markup, or belong to another item."""
        entries, reply.logprobs = reply.logprobs, []
        if not self.with_logprobs:
            return []
        first, missing = len(entries), len(text.encode())
        while first and missing > 0:
            first -= 1
            missing -= len(self.model.tokenizer.token_bytes(entries[first].token_id))
        return token_logprobs(self.model.tokenizer, entries[first:])

    def _append(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin(_reasoning_item() if kind == "reasoning" else _message_item())
            yield "response.content_part.added", {**self._place(), "content_index": 0, "part": _part(kind, "", [])}
        self._text += text
        self._logprobs += logprobs
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        beside: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": list(logprobs)}
        yield f"response.{name}.delta", {**self._place(), "content_index": 0, "delta": text, **beside}

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._open, self._text, self._logprobs = item, "", []
        yield "response.output_item.added", {"output_index": len(self.done), "item": item}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}


def _message_item() -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _reasoning_item() -> dict[str, Any]:
    return {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": []}


def _call_item(call: Call, status: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": status,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": arguments,
    }


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
