"""From deltas to what a whole answer holds: text, reasoning and tool calls with their ids."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from glmlocal.completion import Completion, CompletionDelta
from glmlocal.engine.request import TokenLogprob
from glmlocal.server.model import ServedModel
from glmlocal.text.tokenizer import Tokenizer
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallEnd, ToolCallStart


@dataclass(slots=True)
class Call:
    """A tool call that is being written."""

    call_id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


@dataclass(slots=True)
class Reply:
    """One answer so far. ``take`` every delta."""

    model: ServedModel
    id_prefix: str = "call_"
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    completion: Completion | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, delta: CompletionDelta) -> None:
        """Complete calls are remembered as the model wrote them, for the next turn's prompt."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        for event in delta.events:
            if isinstance(event, ToolCallStart):
                self.calls.append(Call(self.id_prefix + secrets.token_hex(12), event.name))
            elif isinstance(event, ToolCallDelta):
                self.calls[event.index].arguments += event.arguments
            elif isinstance(event, ToolCallEnd) and event.is_complete:
                call = self.calls[event.index]
                call.is_complete = True
                self.model.raw_calls.keep(call.call_id, call.name, call.arguments, event.raw)
        self.completion = delta.completion or self.completion

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words: a cut-off answer is "length" even if it called tools."""
        assert self.completion is not None
        calls_tools = bool(self.calls) and self.completion.finish_reason == "stop"
        return "tool_calls" if calls_tools else self.completion.finish_reason


def token_logprobs(tokenizer: Tokenizer, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
    """Entries of ``logprobs.content``."""
    return [
        {
            **_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    # JSON has no -inf; OpenAI reports what is impossible as -9999.
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def usage_dict(prompt_tokens: int, completions: list[Completion]) -> dict[str, Any]:
    """OpenAI's ``usage`` over all answers to one prompt."""
    generated = sum(completion.usage.completion_tokens for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": max((completion.usage.cached_tokens for completion in completions), default=0)
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(completion.usage.reasoning_tokens for completion in completions)
        },
    }


def timings_dict(completions: list[Completion]) -> dict[str, float]:
    """Of the first answer; the others ran beside it."""
    timings = completions[0].timings
    return {
        "time_to_first_token_s": timings.time_to_first_token_s,
        "prefill_tokens_per_s": timings.prefill_tokens_per_s,
        "decode_tokens_per_s": timings.decode_tokens_per_s,
        "total_s": timings.total_s,
    }
