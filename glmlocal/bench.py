"""Measuring a loaded model: prefill and decode rates, their spread, and what part of the machine's ceilings they reach.

Every run has a prompt of its own, different from its first token on, so that no cache of prompts can help. What is
timed is what a user waits for: scheduling, kernels, sampling (greedy) and detokenizing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor

from glmlocal import kernels
from glmlocal.cost import HEAD, ModelCost, Part
from glmlocal.errors import ConfigError, PlanError
from glmlocal.llm import LLM
from glmlocal.peaks import BUSY_ABOVE, Peaks


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. ``context``: None for prefill, else how many tokens come before those that are timed."""

    tokens: int
    context: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """A prompt has at least one token, so decoding at context 0 starts at 1."""
        return self.tokens if self.context is None else max(1, self.context)

    @property
    def generated_tokens(self) -> int:
        """The first comes out of the prefill."""
        return 1 if self.context is None else self.tokens + 1

    @property
    def positions(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg64, tg64 @ d4096."""
        if self.context is None:
            return f"pp{self.tokens}"
        return f"tg{self.tokens}" + (f" @ d{self.context}" if self.context else "")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is not measured."""

    row: Row
    reason: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Rates of a row's repeats, in tokens per second."""

    median: float
    minimum: float
    maximum: float
    stddev: float  # of the sample; 0 for one repeat

    @classmethod
    def of(cls, rates: Sequence[float]) -> Spread:
        deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
        return cls(statistics.median(rates), min(rates), max(rates), deviation)


@dataclass(frozen=True, slots=True)
class Measured:
    """A row, its rates, and how much of its ceiling the median reaches."""

    row: Row
    spread: Spread
    repeats: int
    work: float  # FLOPs of the whole prompt, or bytes of one decode step
    fraction: float

    @property
    def error(self) -> str | None:
        """What is wrong with it; None when nothing is."""
        if self.fraction <= 1.0:
            return None
        what = "peak" if self.row.context is None else "read bandwidth"
        return (
            f"{self.row.name} reaches {self.fraction:.2f} of the measured {what}, which cannot be: "
            "the peak was measured while the machine was busy, or the weights stay in its caches"
        )


class Subject(Protocol):
    """What can be measured."""

    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[float, float]:
        """Answer with that many tokens; seconds to the first, and from the first to the last."""
        ...


class Model:
    """A loaded LLM as a Subject."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        stream = self._llm.generate(
            prompt, stream=True, temperature=0.0, repetition_penalty=1.0, max_tokens=num_tokens, ignore_eos=True
        )
        first, found = None, 0
        for delta in stream:
            found += len(delta.token_ids)
            if first is None and found:
                first = time.perf_counter()
        if first is None or found != num_tokens:
            raise PlanError(f"the model stopped after {found} of {num_tokens} tokens; give a smaller --context")
        return first - start, time.perf_counter() - first


def rows(prefill: Iterable[int], decode: int, context: Iterable[int]) -> list[Row]:
    """The rows that were asked for; a length of 0 asks for none."""
    wanted = [Row(tokens) for tokens in prefill if tokens]
    return wanted + ([Row(decode, depth) for depth in context] if decode else [])


def split(wanted: Iterable[Row], context: int, model_limit: int) -> tuple[list[Row], list[Skipped]]:
    """Rows that fit in ``context`` tokens, and those that do not, with the reason."""
    fitting, skipped = [], []
    for row in wanted:
        if row.positions <= context:
            fitting.append(row)
            continue
        whose = "the model's context is" if row.positions > model_limit else "memory allows a context of"
        limit = model_limit if row.positions > model_limit else context
        skipped.append(Skipped(row, f"needs {row.positions} tokens, {whose} {limit}"))
    return fitting, skipped


def load(
    model: str, wanted: Sequence[Row], *, progress: bool = False, **engine_options: Any
) -> tuple[LLM, list[Row], list[Skipped]]:
    """The model with the context that the rows need, or the largest there is; which rows fit and which do not.

    With a ``plan`` among the options it is the plan's context.
    """
    if "plan" in engine_options:
        llm = LLM(model, progress=progress, **engine_options)
        return llm, *split(wanted, llm.context, llm.config.max_position_embeddings)
    needed = max(row.positions for row in wanted)
    try:
        llm = LLM(model, context=needed, max_batch=1, progress=progress, **engine_options)
    except (ConfigError, PlanError):  # too long for the model or for memory; without a wish it is what fits
        llm = LLM(model, max_batch=1, progress=progress, **engine_options)
    return llm, *split(wanted, llm.context, llm.config.max_position_embeddings)


def plain_ids(llm: LLM) -> list[int]:
    """Ids of ordinary text: no special tokens, no padding of the vocabulary."""
    vocab_size, special = llm.config.vocab_size, set(llm.config.eos_token_id)
    if llm.has_tokenizer:
        vocab_size, special = min(vocab_size, llm.tokenizer.vocab_size), special | llm.tokenizer.special_ids
    return [token for token in range(vocab_size) if token not in special]


def prompts(ids: Sequence[int]) -> Callable[[int], list[int]]:
    """Prompts of a wanted length, always the same ones in the same order, no two with the same first token in a row."""
    generator = random.Random(20261123)
    number = 0

    def prompt(num_tokens: int) -> list[int]:
        nonlocal number
        number += 1
        # Two prompts that differ in their first token share no prefix.
        return [ids[number % len(ids)], *generator.choices(ids, k=num_tokens - 1)]

    return prompt


def warm_up(subject: Subject, wanted: Iterable[Row], prompt: Callable[[int], list[int]]) -> None:
    """The longest prompt once, and some decoding: pages, scratch memory and threads are there before time counts."""
    longest = max(row.prompt_tokens for row in wanted)
    subject.run(prompt(longest), 1)
    subject.run(prompt(1), 4)


def timed(
    subject: Subject, wanted: Sequence[Row], repeat: int, prompt: Callable[[int], list[int]]
) -> Iterator[tuple[Row, float]]:
    """(row, tokens per second), all rows by turns, so that a slow minute slows all of them."""
    for _ in range(repeat):
        for row in wanted:
            to_first_s, after_first_s = subject.run(prompt(row.prompt_tokens), row.generated_tokens)
            yield row, row.tokens / max(to_first_s if row.context is None else after_first_s, 1e-9)


def judge(row: Row, rates: Sequence[float], cost: ModelCost, peaks: Peaks) -> Measured:
    """A row's rates against its ceiling: arithmetic for prefill, read bandwidth for decode."""
    spread = Spread.of(rates)
    if row.context is None:
        work: float = cost.prefill_flops(row.tokens)
        fraction = work * spread.median / row.tokens / (arithmetic_peak(cost, peaks)[1] * 1e9)
    else:
        work = cost.decode_bytes(row.prompt_tokens, row.tokens)
        fraction = work * spread.median / (peaks.read_gb_per_s * 1e9)
    return Measured(row, spread, len(rates), work, fraction)


def arithmetic_peak(cost: ModelCost, peaks: Peaks) -> tuple[str, float]:
    """Which peak limits a prompt, "int8" or "fp32", and its size in 10⁹ operations per second."""
    if cost.computes_with_integers and peaks.int8_gop_per_s is not None:
        return "int8", peaks.int8_gop_per_s
    return "fp32", peaks.fp32_gflop_per_s


def is_busy(before: Peaks, after: Peaks | None) -> bool:
    return after is not None and before.difference(after) > BUSY_ABOVE


def cost_of(llm: LLM) -> ModelCost:
    """What the model's packed weights and its KV cache cost."""
    runner, config = llm.engine.runner, llm.config
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for path, weight in _weights(runner.model, ""):
        if path.startswith((".mtp", ".embed_tokens")):
            continue  # speculation is not measured; of the embeddings a token reads one row
        sums = groups.setdefault((_part_name(path), weight.kind, weight.int8_activations), [0, 0])
        sums[0] += weight.shape[0] * weight.shape[1]
        sums[1] += weight.nbytes
    routed = (config.num_experts_per_tok, config.n_routed_experts)
    parts = [
        Part(name, kind, weights, nbytes, is_integer, *(routed if name == "routed experts" else (1, 1)))
        for (name, kind, is_integer), (weights, nbytes) in groups.items()
    ]
    pool = llm.engine.scheduler.block_pool
    return ModelCost(
        tuple(parts),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.head_dim,
        runner.kv_cache.nbytes // (pool.num_blocks * pool.block_size),
    )


def _weights(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every packed matrix of a model made of dataclasses, with the names that lead to it."""
    if isinstance(value, kernels.Weight):
        yield path, value
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _weights(item, f"{path}.{number}")
    elif is_dataclass(value) and not isinstance(value, Tensor):
        for field in fields(value):
            yield from _weights(getattr(value, field.name), f"{path}.{field.name}")


def _part_name(path: str) -> str:
    for part, name in (
        (".lm_head", HEAD),
        (".router.", "router"),
        (".attention.", "attention"),
        (".shared_experts.", "shared experts"),
        (".experts.", "routed experts"),
    ):
        if part in path:
            return name
    return "dense FFN"
