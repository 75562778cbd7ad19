"""Bytes of a streamed chat completion → events. Pure: no network, no widgets; every text comes out clean."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glmlocal_tui.cleaning import clean

MAX_LINE_CHARS = 8 << 20  # a line longer than this is no chat server's
_FIELDS = (":", "event:", "id:", "retry:")
_MOST_OTHERS = 100_000  # lines of another kind of answer that are looked at


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer, of the thinking before it, or both."""

    content: str
    reasoning: str


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of the ``index``-th tool call; id and name come with its first piece. None: the server did not say which;
    a new id begins another one."""

    index: int | None
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the prompt has been processed, in tokens."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost. None: the server did not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    first_token_s: float | None = None
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The server ended the stream with an error."""

    message: str
    code: str


Event = Delta | ToolDelta | Progress | Finish | Usage | Failure


class ProtocolError(Exception):
    """What came is not a stream of chat completion chunks."""


class Lines:
    """Bytes, cut anywhere → the data of each event; comments and other fields are skipped. ``[DONE]`` ends it.

    ``instead`` is what came before the first event and is nothing that a stream has: where none follows, another kind
    of answer.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)  # a line ends with CR, LF or both
        self._parts: list[str] = []  # of the line that has not ended yet
        self._chars = 0
        self._others: list[str] = []
        self.began = False
        self.done = False

    @property
    def instead(self) -> str:
        return "" if self.began else "\n".join([*self._others, "".join(self._parts)]).strip()

    def feed(self, data: bytes) -> Iterator[str]:
        for number, part in enumerate(self._decoder.decode(data).split("\n")):
            if number:
                line, self._parts, self._chars = "".join(self._parts), [], 0
                yield from self._take(line)
            self._parts.append(part)
            self._chars += len(part)
            if self._chars > MAX_LINE_CHARS:
                raise ProtocolError(f"a line of the stream is longer than {MAX_LINE_CHARS:,} characters")

    def _take(self, line: str) -> Iterator[str]:
        if line.startswith("data:"):
            self.began, self._others = True, []
            payload = line[5:].strip()
            if payload == "[DONE]":
                self.done = True
            elif payload:
                yield payload
        elif not self.began and line and not line.startswith(_FIELDS) and len(self._others) < _MOST_OTHERS:
            self._others.append(line)


def events(payload: str) -> Iterator[Event]:
    """The events of one chunk, or of a whole chat completion. Raises ProtocolError for what is not JSON or not an
    object."""
    try:
        chunk = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a chunk of the stream is not JSON: {clean(payload[:80])!r}") from None
    if not isinstance(chunk, dict):
        raise ProtocolError(f"a chunk of the stream is not an object: {clean(payload[:80])!r}")
    if chunk.get("error"):
        yield failure(chunk["error"])
        return
    progress = chunk.get("prefill_progress")
    if isinstance(progress, dict):
        yield Progress(number(progress.get("done_tokens")), number(progress.get("total_tokens")))
    choices = chunk.get("choices")
    for choice in choices[:1] if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            yield from _choice(choice)
    if isinstance(chunk.get("usage"), dict):
        yield _usage(chunk["usage"], chunk.get("timings"))


def failure(error: Any) -> Failure:
    """OpenAI's error object, or whatever stands in its place."""
    if not isinstance(error, dict):
        return Failure(text(error) or clean(str(error)), "")
    return Failure(text(error.get("message")) or "no reason given", text(error.get("code")) or text(error.get("type")))


def text(value: Any) -> str:
    """A string of the wire, clean; what is not a string is nothing."""
    return clean(value) if isinstance(value, str) else ""


def number(value: Any) -> int:
    """A whole number of the wire; anything else is 0."""
    return int(value) if isinstance(value, (int, float)) and abs(value) < 1 << 62 else 0


def rate(value: Any) -> float | None:
    """A number of the wire; None for anything else, and for what no clock can have measured."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1 << 62 else None


def _choice(choice: dict[str, Any]) -> Iterator[Event]:
    delta = choice.get("delta", choice.get("message"))
    if isinstance(delta, dict):
        content, reasoning = text(delta.get("content")), text(delta.get("reasoning_content") or delta.get("reasoning"))
        if content or reasoning:
            yield Delta(content, reasoning)
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                function = call.get("function")
                function = function if isinstance(function, dict) else {}
                yield ToolDelta(
                    None if call.get("index") is None else number(call["index"]),
                    text(call.get("id")),
                    text(function.get("name")),
                    text(function.get("arguments")),
                )
    if choice.get("finish_reason"):
        yield Finish(text(choice["finish_reason"]))


def _usage(usage: dict[str, Any], timings: Any) -> Usage:
    def detail(group: str, name: str) -> int | None:
        details = usage.get(group)
        value = details.get(name) if isinstance(details, dict) else None
        return number(value) if isinstance(value, int) else None

    timings = timings if isinstance(timings, dict) else {}
    return Usage(
        number(usage.get("prompt_tokens")),
        number(usage.get("completion_tokens")),
        detail("prompt_tokens_details", "cached_tokens"),
        detail("completion_tokens_details", "reasoning_tokens"),
        rate(timings.get("time_to_first_token_s")),
        rate(timings.get("decode_tokens_per_s")),
    )
