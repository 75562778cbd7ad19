"""Finds the tool calls in the content that a model writes, incrementally. The second half of the stream's parsing:
``stream_parser`` has taken the reasoning away.

GLM-4.5 and 4.6 write a newline between the tags, GLM-4.7 and 5 do not; both are accepted, mixed too:

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>

* The name ends at the first ``<arg_key>`` or ``</tool_call>`` and is stripped; keys are stripped; values are verbatim
  and end at the first ``</arg_value>``, whatever stands in them.
* Arguments come out as pieces of one JSON object, typed by the tool's schema (``tool_schema``). Strings are passed on
  while they are written, other types when they are complete. A key that comes twice is there twice: the last wins.
* A key without a value is dropped. White space around calls is dropped, other text around them is content.
* A name that is no name at all (empty, blanks inside) makes the whole text content. A function that is not among the
  tools is called all the same: the client's answer, that there is no such tool, puts the model right.
* An answer that was cut off (``truncated``) leaves its last call's JSON open, so that nobody runs half a command. One
  that the model itself ended without ``</tool_call>`` is closed for it.

The result does not depend on how the text is cut into chunks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from glmlocal.text.stop import held_back
from glmlocal.text.stream_parser import ContentDelta
from glmlocal.text.tool_schema import ArgumentTypes, argument_types

_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_KEY, _END_KEY = "<arg_key>", "</arg_key>"
_VALUE, _END_VALUE = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[\w.:/@+-]{1,256}")

_State = Literal["content", "name", "between", "key", "after_key", "value"]
_TAGS: Final[dict[_State, tuple[str, ...]]] = {
    "content": (_CALL, _END_CALL),
    "name": (_KEY, _END_CALL, _CALL),
    "between": (_KEY, _END_CALL, _CALL),
    "key": (_END_KEY, _VALUE, _END_CALL),
    "after_key": (_VALUE, _KEY, _END_CALL, _CALL),
    "value": (_END_VALUE,),
}


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call's name is known. ``index``: the how-manieth call of the answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of the call's arguments; the pieces joined are a JSON object."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is over. ``raw`` is what the model wrote; not ``is_complete``: it was cut off, its JSON is open."""

    index: int
    raw: str
    is_complete: bool


Event = ContentDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


class ToolCallParser:
    """One answer's content. ``push`` text as it comes, then ``finish``."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, suppress: bool = False) -> None:
        """``tools`` in OpenAI's form. ``suppress``: calls are recognised and dropped (``tool_choice`` "none")."""
        self._types = argument_types(tools)
        self._suppress = suppress
        self._state: _State = "content"
        self._held = ""  # may be the beginning of a tag
        self._space = ""  # white space whose fate the next text decides
        self._has_content = False
        self.num_calls = 0  # that were started
        self._reset()

    def _reset(self) -> None:
        self._raw: list[str] = []
        self._text: list[str] = []  # of the name, key or value that is being written
        self._key = ""
        self._call: ArgumentTypes | None = None  # None: not started, or no name
        self._num_arguments = 0
        self._streams = False  # the value is passed on as it comes
        self._pairs: list[tuple[str, str]] = []  # of a union: typed at the end

    def push(self, text: str) -> list[Event]:
        """The events that ``text`` settles, in order."""
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self, *, truncated: bool) -> list[Event]:
        """The stream has ended: a half tag is text after all. ``truncated``: not because the model wanted it to."""
        events: list[Event] = []
        held, self._held = self._held, ""
        self._take(held, events)
        if self._state == "content":
            if self.num_calls == 0:
                self._say(self._space, events)
        elif truncated:
            if self._call is not None:
                self._end(events, is_complete=False)
        else:
            if self._state == "value":
                self._end_value(events)
            self._end_call(events)
        return events

    def _advance(self, events: list[Event]) -> bool:
        """Handle what comes before the next tag, and the tag. False: more text is needed."""
        tags = _TAGS[self._state]
        found = [(start, tag) for tag in tags if (start := self._held.find(tag)) >= 0]
        if not found:
            keep = len(self._held) - held_back(self._held, tags)
            text, self._held = self._held[:keep], self._held[keep:]
            self._take(text, events)
            return False
        start, tag = min(found)
        text, self._held = self._held[:start], self._held[start + len(tag) :]
        self._take(text, events)
        self._pass(tag, events)
        return True

    def _take(self, text: str, events: list[Event]) -> None:
        """Text between tags."""
        if self._state == "content":
            self._content(text, events)
            return
        self._raw.append(text)
        if self._state == "value" and self._streams:
            self._arguments(_escaped(text), events)
        else:
            self._text.append(text)

    def _pass(self, tag: str, events: list[Event]) -> None:
        state = self._state
        if tag == _CALL:
            if state not in ("content", "name"):  # the one before was not closed
                self._end_call(events)
            self._reset()
            self._raw.append(tag)
            self._state = "name"
            return
        if state == "content":  # a stray end
            return
        self._raw.append(tag)
        if state == "name":
            self._start(events)
        if tag == _END_CALL:
            self._end_call(events)
        elif tag == _KEY:
            self._text, self._state = [], "key"
        elif tag == _END_KEY:
            self._key, self._state = "".join(self._text).strip(), "after_key"
        elif tag == _VALUE:
            if state == "key":
                self._key = "".join(self._text).strip()
            self._begin_value(events)
        else:
            self._end_value(events)

    def _content(self, text: str, events: list[Event]) -> None:
        text = self._space + text
        if self.num_calls and not self._has_content:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._say(kept, events)

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            self._has_content = True
            events.append(ContentDelta(text))

    def _start(self, events: list[Event]) -> None:
        name = "".join(self._text).strip()
        self._text = []
        if not _NAME.fullmatch(name):
            return
        self._space = ""
        self._call = self._types.get(name) or ArgumentTypes(None)
        if not self._suppress:
            events.append(ToolCallStart(self.num_calls, name))
        self.num_calls += 1

    def _begin_value(self, events: list[Event]) -> None:
        self._text, self._state = [], "value"
        self._streams = self._call is not None and self._call.streams(self._key)
        if self._streams:
            self._arguments(self._opening(self._key) + '"', events)

    def _end_value(self, events: list[Event]) -> None:
        self._state = "between"
        if self._call is None:
            return
        text, self._text = "".join(self._text), []
        if self._streams:
            self._arguments('"', events)
        elif self._call.is_union:
            self._pairs.append((self._key, text))
        else:
            self._argument(self._key, self._call.value(self._key, text), events)

    def _end_call(self, events: list[Event]) -> None:
        if self._state == "name" and self._call is None and self._raw[-1] != _END_CALL:
            self._start(events)  # the model stopped right after the name
        if self._call is not None:
            for key, text in self._pairs:
                self._argument(key, self._call.value(key, text, self._pairs), events)
            self._arguments("}" if self._num_arguments else "{}", events)
        self._end(events, is_complete=True)

    def _end(self, events: list[Event], *, is_complete: bool) -> None:
        raw, was_call = "".join(self._raw), self._call is not None
        if was_call and not self._suppress:
            events.append(ToolCallEnd(self.num_calls - 1, raw, is_complete))
        self._reset()
        self._state = "content"
        if not was_call and not self._suppress:
            self._content(raw, events)

    def _opening(self, key: str) -> str:
        self._num_arguments += 1
        return f"{'{' if self._num_arguments == 1 else ', '}{json.dumps(key, ensure_ascii=False)}: "

    def _argument(self, key: str, value: object, events: list[Event]) -> None:
        self._arguments(self._opening(key) + json.dumps(value, ensure_ascii=False), events)

    def _arguments(self, text: str, events: list[Event]) -> None:
        if text and not self._suppress:
            events.append(ToolCallDelta(self.num_calls - 1, text))


def _escaped(text: str) -> str:
    """The inside of a JSON string; escaping character by character gives the same."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
