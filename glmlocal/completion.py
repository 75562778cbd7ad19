"""What a caller of LLM gets, and how an engine's tokens become it. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from glmlocal.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from glmlocal.text.detokenizer import IncrementalDetokenizer
from glmlocal.text.stop import StopStrings
from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta, ReasoningParser
from glmlocal.text.tokenizer import Tokenizer
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallEnd, ToolCallParser, ToolCallStart

Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``completion_tokens`` includes the reasoning and the token that ended it."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0  # of the prompt: not computed again

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds and rates of one request. Rates are 0 where nothing was measured, as for a single token's decode."""

    load_s: float  # reading the model, once per LLM
    time_to_first_token_s: float
    prefill_tokens_per_s: float  # prompt tokens over time to first token
    decode_tokens_per_s: float  # tokens after the first over the time they took
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop", "length" or "abort"
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None
    stop: str | None = None  # the stop string that ended it
    error: str | None = None  # of an answer whose finish_reason is "error"


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """A piece of an answer. The last one carries the whole in ``completion``.

    ``events`` has reasoning, content and tool calls in the order in which they were written; ``text`` and ``reasoning``
    are the sums of two of its kinds.
    """

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt from its second token on, where they were asked for
    prefill_progress: float | None = None  # 0 … 1 while the prompt is processed
    events: tuple[Event, ...] = ()
    completion: Completion | None = None


@dataclass(slots=True)
class CompletionBuilder:
    """RequestOutputs of one request → CompletionDeltas: text is decoded, cut at stop strings, split from reasoning.

    ``parser`` is None for a model that does not reason, or for raw completion; ``tools`` for a request without tools.
    With ``single_call`` the answer ends with its first tool call.
    """

    tokenizer: Tokenizer | None  # None: token ids without text
    params: SamplingParams
    parser: ReasoningParser | None
    load_s: float
    tools: ToolCallParser | None = None
    single_call: bool = False
    _detokenizer: IncrementalDetokenizer | None = field(init=False)
    _stops: StopStrings = field(init=False)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _reasoning_tokens: int = 0
    _start_s: float = field(default_factory=time.perf_counter)
    _first_token_s: float | None = None

    def __post_init__(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self.tokenizer) if self.tokenizer else None
        self._stops = StopStrings(self.params.stop)

    def push(self, output: RequestOutput) -> CompletionDelta:
        """Take one step's output. A delta with ``completion`` set is the last: the request is to be dropped."""
        if not output.token_ids and output.finish_reason is None:
            progress = output.num_computed_tokens / output.num_prompt_tokens
            return CompletionDelta(prompt_logprobs=output.prompt_logprobs, prefill_progress=progress)
        if self._first_token_s is None and output.token_ids:
            self._first_token_s = time.perf_counter()
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        if self.parser is not None and self.parser.in_reasoning:
            self._reasoning_tokens += len(output.token_ids)
        text, stopped = self._stops.push(self._decode(output))
        if output.finish_reason is not None and not stopped:
            text += self._stops.finish()
        finish_reason = FinishReason.STOP if stopped else output.finish_reason
        events = self._split(
            text, is_last=finish_reason is not None, truncated=stopped or finish_reason is not FinishReason.STOP
        )
        if self.single_call:
            events, is_over = _first_call(events)
            finish_reason = FinishReason.STOP if is_over else finish_reason
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
        self._text.append(text)
        self._reasoning.append(reasoning)
        completion = None if finish_reason is None else self._completion(finish_reason, output)
        return CompletionDelta(
            text,
            reasoning,
            output.token_ids,
            output.logprobs,
            output.prompt_logprobs,
            events=tuple(events),
            completion=completion,
        )

    def _decode(self, output: RequestOutput) -> str:
        """The text that a step made certain, without the token that stopped it; all that is left if it is the last."""
        if self._detokenizer is None:
            return ""
        pieces = [self._detokenizer.push(token) for token in output.token_ids if token != output.stop_token_id]
        if output.finish_reason is not None:
            pieces.append(self._detokenizer.finish())
        return "".join(pieces)

    def _split(self, text: str, *, is_last: bool, truncated: bool) -> list[Event]:
        """Reasoning, content and tool calls in a piece of text; all that was held back if it is the last."""
        if self.parser is None:
            parts: list[ReasoningDelta | ContentDelta] = [ContentDelta(text)] if text else []
        else:
            parts = [*self.parser.push(text), *(self.parser.finish() if is_last else ())]
        if self.tools is None:
            return [*parts]
        events: list[Event] = []
        for part in parts:
            events += [part] if isinstance(part, ReasoningDelta) else self.tools.push(part.text)
        if is_last:
            events += self.tools.finish(truncated=truncated)
        return events

    def _completion(self, finish_reason: FinishReason, output: RequestOutput) -> Completion:
        num_prompt_tokens = output.num_prompt_tokens
        now = time.perf_counter()
        first = self._first_token_s if self._first_token_s is not None else now
        ttft_s, decode_s, num_decoded = first - self._start_s, now - first, max(0, len(self._token_ids) - 1)
        return Completion(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            token_ids=tuple(self._token_ids),
            finish_reason=finish_reason.value,
            usage=Usage(num_prompt_tokens, len(self._token_ids), self._reasoning_tokens, output.num_cached_tokens),
            timings=Timings(
                load_s=self.load_s,
                time_to_first_token_s=ttft_s,
                prefill_tokens_per_s=num_prompt_tokens / ttft_s if ttft_s > 0 else 0.0,
                decode_tokens_per_s=num_decoded / decode_s if decode_s > 0 else 0.0,
                total_s=now - self._start_s,
            ),
            logprobs=tuple(self._logprobs) if self.params.logprobs is not None else None,
            stop=self._stops.matched,
            error=output.error,
        )


def _first_call(events: list[Event]) -> tuple[list[Event], bool]:
    """The events up to the end of the first tool call, and whether it is among them."""
    for number, event in enumerate(events, 1):
        if isinstance(event, ToolCallEnd):
            return events[:number], True
    return events, False
