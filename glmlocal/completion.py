"""What a caller of LLM gets, and how an engine's tokens become it. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from glmlocal.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from glmlocal.text.detokenizer import IncrementalDetokenizer
from glmlocal.text.stop import StopStrings
from glmlocal.text.stream_parser import ContentDelta, ReasoningParser
from glmlocal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``completion_tokens`` includes the reasoning and the token that ended it."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int

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


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """A piece of an answer. The last one carries the whole in ``completion``."""

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prefill_progress: float | None = None  # 0 … 1 while the prompt is processed
    completion: Completion | None = None


@dataclass(slots=True)
class CompletionBuilder:
    """RequestOutputs of one request → CompletionDeltas: text is decoded, cut at stop strings, split from reasoning.

    ``parser`` is None for a model that does not reason, or for raw completion.
    """

    tokenizer: Tokenizer | None  # None: token ids without text
    params: SamplingParams
    parser: ReasoningParser | None
    load_s: float
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
            return CompletionDelta(prefill_progress=output.num_computed_tokens / output.num_prompt_tokens)
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
        text, reasoning = self._split(text, is_last=finish_reason is not None)
        self._text.append(text)
        self._reasoning.append(reasoning)
        completion = None if finish_reason is None else self._completion(finish_reason, output.num_prompt_tokens)
        return CompletionDelta(text, reasoning, output.token_ids, output.logprobs, completion=completion)

    def _decode(self, output: RequestOutput) -> str:
        """The text that a step made certain, without the token that stopped it; all that is left if it is the last."""
        if self._detokenizer is None:
            return ""
        pieces = [self._detokenizer.push(token) for token in output.token_ids if token != output.stop_token_id]
        if output.finish_reason is not None:
            pieces.append(self._detokenizer.finish())
        return "".join(pieces)

    def _split(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """Content and reasoning in a piece of text."""
        if self.parser is None:
            return text, ""
        events = [*self.parser.push(text), *(self.parser.finish() if is_last else ())]
        content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        reasoning = "".join(event.text for event in events if not isinstance(event, ContentDelta))
        return content, reasoning

    def _completion(self, finish_reason: FinishReason, num_prompt_tokens: int) -> Completion:
        now = time.perf_counter()
        first = self._first_token_s if self._first_token_s is not None else now
        ttft_s, decode_s, num_decoded = first - self._start_s, now - first, max(0, len(self._token_ids) - 1)
        return Completion(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            token_ids=tuple(self._token_ids),
            finish_reason=finish_reason.value,
            usage=Usage(num_prompt_tokens, len(self._token_ids), self._reasoning_tokens),
            timings=Timings(
                load_s=self.load_s,
                time_to_first_token_s=ttft_s,
                prefill_tokens_per_s=num_prompt_tokens / ttft_s if ttft_s > 0 else 0.0,
                decode_tokens_per_s=num_decoded / decode_s if decode_s > 0 else 0.0,
                total_s=now - self._start_s,
            ),
            logprobs=tuple(self._logprobs) if self.params.logprobs is not None else None,
        )
