"""An answer on its way to the reader: streamed text, dim thinking, progress of the prompt; its footer and JSON form."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from glmlocal.cli.terminal import Console
from glmlocal.units import format_bytes

if TYPE_CHECKING:
    from glmlocal.completion import Completion, CompletionDelta
    from glmlocal.offload.stats import OffloadStats


@dataclass(slots=True)
class Answer:
    """What was received of one answer; ``completion`` is None when it was stopped."""

    num_tokens: int = 0
    completion: Completion | None = None
    first_token_s: float | None = None  # time.monotonic of the first token
    last_token_s: float | None = None
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.completion.text if self.completion is not None else "".join(self._text)

    @property
    def reasoning(self) -> str:
        return self.completion.reasoning if self.completion is not None else "".join(self._reasoning)

    @property
    def has_text(self) -> bool:
        return bool(self._text)

    @property
    def has_reasoning(self) -> bool:
        return bool(self._reasoning)

    def add(self, delta: CompletionDelta) -> None:
        if delta.text:
            self._text.append(delta.text)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        self.num_tokens += len(delta.token_ids)
        self.completion = delta.completion
        if delta.token_ids:
            self.last_token_s = time.monotonic()
            self.first_token_s = self.first_token_s or self.last_token_s


@dataclass(slots=True)
class Interrupt:
    """Has Ctrl-C been pressed?"""

    seen: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Ctrl-C is noted instead of raised, so that it never unwinds the engine in the middle of a step.

    A second Ctrl-C raises KeyboardInterrupt after all: the way out of a step that does not end.
    """
    interrupt = Interrupt()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if interrupt.seen:
            raise KeyboardInterrupt
        interrupt.seen = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield interrupt
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(slots=True)
class AnswerView:
    """Draws one answer. With ``quiet`` it only collects, and shows progress where there is a screen for it."""

    console: Console
    quiet: bool = False
    answer: Answer = field(default_factory=Answer)

    def run(self, start: Callable[[], Iterator[CompletionDelta]]) -> Answer:
        """Draw until the end or Ctrl-C; closing the iterator aborts the request in the engine."""
        deltas: Iterator[CompletionDelta] | None = None
        try:
            with deferred_interrupt() as interrupt:
                deltas = start()
                for delta in deltas:
                    self._draw(delta)
                    if interrupt.seen and delta.completion is None:
                        break
        except KeyboardInterrupt:
            pass
        finally:
            if isinstance(deltas, Generator):
                deltas.close()
            self.console.clear_status()
        return self.answer

    def _draw(self, delta: CompletionDelta) -> None:
        had_text = self.answer.has_text
        self.answer.add(delta)
        if delta.prefill_progress is not None:
            self.console.status(f"reading the prompt {delta.prefill_progress:.0%}")
        if self.quiet:
            if delta.token_ids:
                self.console.status(f"{self.answer.num_tokens} tokens")
        else:
            self.console.dim(delta.reasoning)
            if delta.text and not had_text and self.answer.has_reasoning:
                self.console.fresh_line()
                self.console.dim("\n")
            self.console.answer(delta.text)


def footer(answer: Answer, context: int, offload: OffloadStats | None = None) -> str:
    """The line under an answer: prompt tokens, generated tokens, tok/s, time to first token, context; with ``offload``
    how many experts were found on GPUs and in RAM, and what was read of the others."""
    completion = answer.completion
    if completion is None:
        elapsed_s = (answer.last_token_s or 0.0) - (answer.first_token_s or 0.0)
        speed = (answer.num_tokens - 1) / elapsed_s if answer.num_tokens > 1 and elapsed_s > 0 else 0.0
        return " · ".join([f"{answer.num_tokens:,} generated tokens", *_rate(speed), "stopped"])
    usage, timings = completion.usage, completion.timings
    thinking = f" ({usage.reasoning_tokens:,} thinking)" if usage.reasoning_tokens else ""
    parts = [
        f"{usage.prompt_tokens:,} prompt + {usage.completion_tokens:,} generated tokens{thinking}",
        *_rate(timings.decode_tokens_per_s),
        f"first token {timings.time_to_first_token_s:.2f} s",
        f"context {usage.total_tokens:,}/{context:,}",
    ]
    if offload is not None:
        if offload.gpu is not None:
            parts.append(f"{offload.gpu.hit_rate:.0%} of experts on GPU, {offload.hit_rate:.0%} of the others in RAM")
        else:
            parts.append(f"{offload.hit_rate:.0%} of experts in RAM")
        parts.append(f"{format_bytes(round(offload.read_bytes_per_token))} read per token")
    return " · ".join(parts)


def _rate(tokens_per_s: float) -> list[str]:
    return [f"{tokens_per_s:.1f} tok/s"] if math.isfinite(tokens_per_s) and tokens_per_s > 0 else []


def ending(completion: Completion, context: int) -> str | None:
    """Why an answer is shorter than the model wanted, and what to do; None when it ended by itself."""
    if completion.finish_reason != "length":
        return None
    used = completion.usage.total_tokens
    if used >= context:
        return f"the context is full: {used:,} of {context:,} tokens are used"
    if completion.reasoning and not completion.text:
        return "cut off while thinking: a larger --max-tokens or --no-think leaves room for an answer"
    return f"cut off after {completion.usage.completion_tokens:,} tokens (--max-tokens)"


def as_json(model: str, completion: Completion) -> str:
    """One line of JSON, safe to print on a terminal too."""
    usage = {**asdict(completion.usage), "total_tokens": completion.usage.total_tokens}
    fields: dict[str, Any] = {
        "model": model,
        "text": completion.text,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "usage": usage,
        "timings": {name: _finite(value) for name, value in asdict(completion.timings).items()},
    }
    return dump_json(fields)


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def dump_json(value: object) -> str:
    """One line of JSON. C1 controls and DEL, which JSON allows as they are, are escaped, as are lone surrogates."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
