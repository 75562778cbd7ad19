"""Splits what a model writes into reasoning and content, incrementally.

The rules are those of the ``glm45`` reasoning parsers of vLLM and SGLang:

* A stream that starts in reasoning may open with white space and ``<think>``; both are swallowed.
* ``</think>`` ends the reasoning. So does ``<tool_call>``, for models that forget ``</think>``; the tag is content.
* Without either, everything is reasoning.
* A stray ``</think>`` in content is dropped, but not inside ``<tool_call>…</tool_call>``: arguments stay as they are,
  and a ``</tool_call>`` inside ``<arg_value>…</arg_value>`` is part of an argument.

White space: vLLM and today's SGLang pass the newlines around the tags on (older SGLang stripped all white space). GLM's
chat template, when it takes a stored answer apart, strips newlines and nothing else: ``rstrip('\\n')`` and
``lstrip('\\n')`` on the reasoning, ``lstrip('\\n')`` on the content. That is done here, because the newline that
GLM-4.5 writes on both sides of ``</think>`` belongs to the format and not to the answer.

The result does not depend on how the text is cut into chunks. Tool calls are recognised only so far as needed above;
``tool_calls`` takes them out of the content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from glmlocal.text.stop import held_back

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_VALUE, _END_VALUE = "<arg_value>", "</arg_value>"

_State = Literal["opening", "reasoning", "content", "call", "value"]
_TAGS: Final[dict[_State, tuple[str, ...]]] = {
    "opening": (_THINK,),
    "reasoning": (_END_THINK, _CALL),
    "content": (_END_THINK, _CALL),
    "call": (_END_CALL, _VALUE),
    "value": (_END_VALUE,),
}


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer, tool-call markup included; never empty."""

    text: str


Event = ReasoningDelta | ContentDelta


class ReasoningParser:
    """One answer's stream. ``push`` text as it comes, then ``finish``."""

    def __init__(self, starts_in_reasoning: bool) -> None:
        self._state: _State = "opening" if starts_in_reasoning else "content"
        self._held = ""  # may be the beginning of a tag
        self._newlines = ""  # at the end of the reasoning so far: dropped if nothing follows
        self._at_start = True  # of the reasoning or of the content: newlines are dropped

    @property
    def in_reasoning(self) -> bool:
        """Would text that comes now be reasoning?"""
        return self._state in ("opening", "reasoning")

    def push(self, text: str) -> list[Event]:
        """The events that ``text`` settles, in order."""
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The stream has ended: a half tag is text after all."""
        events: list[Event] = []
        if self._state == "opening":
            self._state = "reasoning"
        self._emit(self._held, events)
        self._held = ""
        return events

    def _advance(self, events: list[Event]) -> bool:
        """Handle what comes before the next tag, and the tag. False: more text is needed."""
        if self._state == "opening":
            return self._open()
        tags = _TAGS[self._state]
        found = [(start, tag) for tag in tags if (start := self._held.find(tag)) >= 0]
        if not found:
            keep = len(self._held) - held_back(self._held, tags)
            self._emit(self._held[:keep], events)
            self._held = self._held[keep:]
            return False
        start, tag = min(found)
        self._emit(self._held[:start], events)
        self._held = self._held[start + len(tag) :]
        self._pass(tag, events)
        return True

    def _open(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(_THINK):
            self._held = text[len(_THINK) :]
        elif _THINK.startswith(text):  # only white space so far, or part of the tag
            return False
        self._state = "reasoning"
        return True

    def _pass(self, tag: str, events: list[Event]) -> None:
        if self._state == "reasoning":
            self._newlines, self._at_start = "", True
            self._state = "content"
        if tag in (_CALL, _END_VALUE):
            self._state = "call"
        elif tag == _VALUE:
            self._state = "value"
        elif tag == _END_CALL:
            self._state = "content"
        if tag != _END_THINK:
            self._emit(tag, events)

    def _emit(self, text: str, events: list[Event]) -> None:
        if self._at_start:
            text = text.lstrip("\n")
        if not text:
            return
        self._at_start = False
        if self._state != "reasoning":
            events.append(ContentDelta(text))
            return
        text = self._newlines + text
        kept = text.rstrip("\n")
        self._newlines = text[len(kept) :]
        if kept:
            events.append(ReasoningDelta(kept))


def starts_in_reasoning(rendered_prompt: str, *, thinking_enabled: bool) -> bool:
    """Will the completion of this prompt begin inside the reasoning?

    ``thinking_enabled``: the template knows thinking and the request did not turn it off. GLM-4.7 and later open
    ``<think>`` (or close it) in the prompt; GLM-4.5 and 4.6 end in ``<|assistant|>`` and leave it to the model.
    """
    tail = rendered_prompt.rstrip()
    if tail.endswith(_THINK):
        return True
    return thinking_enabled and tail.endswith("<|assistant|>")
