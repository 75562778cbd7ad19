"""Measuring our own kernels: the rates that ``glmlocal doctor`` keeps for the forecast.

Only the native ones: importing this raises ImportError where they were not built. Shapes are none that a released
model has. Everything is done until it settles, a few times at most, and the median counts, as it does of a model's
runs: what was lucky once is no forecast. All of it is done three times, some ten seconds apart, and of each figure the
median is kept, because machines that share their memory with others are slower for seconds.

In a virtual machine, memory that was just written for the first time is read at half its speed for a second or more,
until the host has put large pages under it. A model's weights have long been there: so everything that is measured over
is made before, and read until that is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from statistics import fmean, median
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal import kernels
from glmlocal.formats.forms import FORMS
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import Activations, QuantScheme
from glmlocal.kernels.cpu import ops
from glmlocal.kernels.cpu.linear import PackedExperts, bind_experts
from glmlocal.kernels.cpu.packing import PackedWeight, duplicate, pack, record_buffer
from glmlocal.layers.kv_cache import TORCH_DTYPE
from glmlocal.machine.cpu import last_level_cache_bytes
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate, build_id
from glmlocal.skeleton import SMALL, Heads, Skeleton
from glmlocal.units import MIB

Clock = Callable[[], float]

# One scheme of every kind of kernel; ``planner.efficiency.kernel_class`` says which stands for which others.
SCHEMES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "fp8_block128", "bf16", "f32")
QUICK_SCHEMES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "fp8_block128", "bf16", "f32")
HIDDEN, INTERMEDIATE = 3072, 1024
TOP_K = 8
ROWS = (1, 2, 4, 8, 16, 32, 64)  # per expert, of those that all tokens go to
ARITHMETIC_ROWS = 16  # from so many on half of the experts are enough: arithmetic binds, and takes long
FEW_ROWS = (1, 4, 16, 64)  # the same with fp32 activations, which integers meet where somebody asks for it
MANY_ROWS, MANY_OUT = 512, 6144  # of one matrix, as large as those that so many rows meet in a model
BEYOND_CACHE = 4  # weights of one row's products are this much larger than the last-level cache
BLOCK_SIZE, CHUNK = 32, 512
SMALL_VOCAB, SMALL_SCHEME = 4096, "Q4_0"  # of the model whose layers' overhead is measured
PASSES = 3
_LEAST_TURNS, _SETTLED = 3, 1.02  # median over lower quartile
# Calls of some microseconds take more turns: when the first run, OpenMP's threads that filled the matrices still spin.
_LEAST_S, _MOST_TURNS = 0.03, 200
_LEAST_WARM_S, _MOST_WARM_S = 2.0, 8.0
_WARM_ROUNDS_S = 0.2  # rounds that do not count: what was not read for some ten seconds is slow again


@dataclass(frozen=True, slots=True)
class AttentionShape(Heads):
    """What attention is measured at; ``context`` for one query, ``prefill_context`` for the last of a chunk."""

    context: int
    prefill_context: int


# As many query heads per kv head as every GLM-4 has; and few, short ones, as small models have.
ATTENTION = (AttentionShape(48, 4, 128, 6000, 1500), AttentionShape(8, 4, 64, 1500, 1500))


def measure(
    *,
    quick: bool = False,
    schemes: Sequence[str] | None = None,
    clock: Clock = time.perf_counter,
    on_step: Callable[[str], None] = lambda step: None,
) -> KernelRates:
    """All rates of the native kernels, with the threads and the instruction set in use.

    ``schemes`` limits them to those that somebody needs, and SMALL_SCHEME; ``quick`` means fewer of them, once.
    """
    wanted = dict.fromkeys((*(schemes or (QUICK_SCHEMES if quick else SCHEMES)), SMALL_SCHEME))
    subjects = {
        f"{scheme} {activations}": _Subject.of(scheme, activations)
        for scheme in wanted
        for activations in (get_args(Activations) if FORMS[scheme].is_integer else ("fp32",))
    }
    on_step("measuring the kernels: small models")
    models = _Models.of(tuple(get_args(Activations)))
    weights = record_buffer(max(subject.nbytes for subject in subjects.values()))
    # In small pages, as torch gives them to a KV cache too.
    cache = torch.empty(max(_cache_bytes(d, shape) for d in TORCH_DTYPE for shape in ATTENTION), dtype=torch.uint8)
    measured, turns = _Measured(subjects, models, weights, cache), _Turns(clock)
    on_step("measuring the kernels: waiting for memory to be as fast as it gets")
    for memory in (weights, cache.numpy()):
        _warm(memory, clock)
    return median_of([_measure_once(measured, turns, on_step) for _ in range(1 if quick else PASSES)])


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """What is measured, and the memory that it is measured over."""

    subjects: Mapping[str, _Subject]  # by "SCHEME ACTIVATIONS"
    models: _Models
    weights: NDArray[np.uint8]  # of any one of the subjects
    cache: Tensor  # uint8; keys and values of any dtype and shape of ATTENTION


def _warm(memory: NDArray[np.uint8], clock: Clock) -> None:
    """Write it, and read it until three reads in a row take the same time."""
    memory[:] = 1
    words, begin = memory[: len(memory) // 8 * 8].view(np.uint64), clock()
    taken: list[float] = []
    while (now := clock()) < begin + _MOST_WARM_S:
        if now >= begin + _LEAST_WARM_S and len(taken) >= 3 and max(taken[-3:]) <= _SETTLED * min(taken[-3:]):
            return
        words.max()
        taken.append(clock() - now)


def _measure_once(measured: _Measured, turns: _Turns, on_step: Callable[[str], None]) -> KernelRates:
    products, models = {}, measured.models
    for name, subject in measured.subjects.items():
        on_step(f"measuring the kernels: {name}")
        products[name] = _product(subject, measured.weights, turns)
    on_step("measuring the kernels: attention")
    dtypes = tuple(TORCH_DTYPE)
    decode = {dtype: _attention(dtype, 1, measured.cache, turns) for dtype in dtypes}
    prefill = {dtype: _attention(dtype, CHUNK, measured.cache, turns) for dtype in dtypes}
    on_step("measuring what a layer and a token cost beside their products")
    layer_s, token_s = _overheads(models, turns, products)
    row_s = {each: _row_s(each, models, turns, products, prefill["bf16"]) for each in get_args(Activations)}
    return KernelRates(build_id(), products, decode, prefill, layer_s, token_s, row_s)


def median_of(passes: Sequence[KernelRates]) -> KernelRates:
    """Of several measurements of the same kernels: the median seconds of everything, and how far they lay apart."""
    first, distances = passes[0], []

    def middle(seconds: Iterable[float]) -> float:
        ordered = sorted(seconds)
        found = median(ordered)
        distances.append(min((b - a for a, b in pairwise(ordered)), default=0.0) / found)
        return found

    def product(name: str) -> ProductRate:
        by_rows = zip(*(each.products[name].weights_per_s for each in passes), strict=True)
        return ProductRate(first.products[name].rows, tuple(1 / middle(1 / r for r in rates) for rates in by_rows))

    def attention(costs: Sequence[AttentionCost]) -> AttentionCost:
        """Both figures of one pass, because they come from one equation: of that which is the middle one for GLM-4."""
        shape = ATTENTION[0]
        ordered = sorted(costs, key=lambda cost: cost.seconds(shape.numbers, shape.operations))
        middle(cost.seconds(shape.numbers, shape.operations) for cost in costs)
        return ordered[len(ordered) // 2]

    return KernelRates(
        first.kernels_id,
        {name: product(name) for name in first.products},
        {dtype: attention([each.attention_decode[dtype] for each in passes]) for dtype in first.attention_decode},
        {dtype: attention([each.attention_prefill[dtype] for each in passes]) for dtype in first.attention_prefill},
        {name: middle(each.layer_s[name] for each in passes) for name in first.layer_s},
        middle(each.token_s for each in passes),
        {name: median(each.row_s[name] for each in passes) for name in first.row_s},
        fmean(distances),
    )


class _Turns:
    """Seconds of a call: the median of some turns, fewer where they agree soon."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def of(self, calls: Iterable[Callable[[], object]], times: int) -> float:
        """The calls take turns, so that none finds its weights in a cache; the first turn does not count."""
        taken: list[float] = []
        turns = cycle(calls)
        next(turns)()
        while not _is_enough(taken, times):
            call = next(turns)
            start = self._clock()
            call()
            taken.append(self._clock() - start)
        return max(median(taken), 1e-9)

    def rounds(self, calls: Sequence[Callable[[], object]], times: int) -> list[tuple[float, ...]]:
        """Seconds of each call in rounds of all of them, to be subtracted within a round: a machine that is slower for
        a while is so for all calls of a round. The first does not count, nor do others that begin soon after."""
        begin = self._clock()
        self._round(calls)
        while self._clock() - begin < _WARM_ROUNDS_S:
            self._round(calls)
        return [self._round(calls) for _ in range(times)]

    def _round(self, calls: Sequence[Callable[[], object]]) -> tuple[float, ...]:
        marks = [self._clock()]
        for call in calls:
            call()
            marks.append(self._clock())
        return tuple(end - begin for begin, end in pairwise(marks))


def _is_enough(taken: Sequence[float], times: int) -> bool:
    if sum(taken) < _LEAST_S and len(taken) < _MOST_TURNS:
        return False
    return len(taken) >= max(_LEAST_TURNS, times) or _is_settled(taken)


def _is_settled(taken: Sequence[float]) -> bool:
    lower_quartile = sorted(taken)[len(taken) // 4]
    return len(taken) > _LEAST_TURNS and median(taken) <= _SETTLED * lower_quartile


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """A kind of weights and activations: an expert's matrices, of which there are copies beyond every cache, and one
    that many rows meet."""

    rows: tuple[int, ...]  # per expert
    gate: PackedWeight
    down: PackedWeight
    large: PackedWeight
    num_experts: int

    @classmethod
    def of(cls, scheme: str, activations: Activations) -> _Subject:
        shapes = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (MANY_OUT, HIDDEN)
        gate, down, large = (pack(_matrix(scheme, *shape), activations) for shape in shapes)
        wanted = max(BEYOND_CACHE * last_level_cache_bytes(), 64 * MIB)
        groups = min(64, max(2, -(-wanted // ((2 * gate.nbytes + down.nbytes) * TOP_K))))
        is_asked_for = activations == "fp32" and FORMS[scheme].is_integer
        return cls(FEW_ROWS if is_asked_for else ROWS, gate, down, large, groups * TOP_K)

    @property
    def nbytes(self) -> int:
        return self.num_experts * (2 * self.gate.nbytes + self.down.nbytes)

    def experts(self, memory: NDArray[np.uint8]) -> PackedExperts:
        """All of them, written to that memory."""
        copies: list[list[PackedWeight]] = [[], [], []]
        end = 0
        for _ in range(self.num_experts):
            for column, weight in zip(copies, (self.gate, self.gate, self.down), strict=True):
                begin, end = end, end + weight.nbytes
                column.append(duplicate(weight, memory[begin:end]))
        return bind_experts(*map(tuple, copies))


def _product(subject: _Subject, memory: NDArray[np.uint8], turns: _Turns) -> ProductRate:
    experts, rates = subject.experts(memory), []
    for rows in subject.rows:
        top_k = TOP_K if rows < ARITHMETIC_ROWS else TOP_K // 2
        x, topk_weights = torch.randn(rows, HIDDEN), torch.rand(rows, top_k)
        firsts = range(0, subject.num_experts, TOP_K)
        ids = [(torch.arange(top_k, dtype=torch.int32) + first).repeat(rows, 1) for first in firsts]
        calls = [partial(ops.experts_ffn, x, i, topk_weights, experts) for i in ids]
        rates.append(top_k * 3 * HIDDEN * INTERMEDIATE / turns.of(calls, 8 if rows <= 4 else 2))
    x = torch.randn(MANY_ROWS, HIDDEN)
    rates.append(MANY_OUT * HIDDEN / turns.of([lambda: ops.linear(x, subject.large)], 2))
    return ProductRate((*subject.rows, MANY_ROWS), tuple(rates))


def _matrix(name: str, rows: int, columns: int) -> Tensor | QuantizedMatrix:
    """Random, of a form of the table."""
    scheme = FORMS[name].scheme
    rng = np.random.default_rng(rows)
    if scheme is None:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[name]
        return torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(dtype)
    return _quantized(scheme, rows, columns, rng)


def _quantized(scheme: QuantScheme, rows: int, columns: int, rng: np.random.Generator) -> QuantizedMatrix:
    groups, supers = -(-columns // scheme.group_size), -(-columns // scheme.super_size)
    scale = np.full((rows, supers), 2.0**-10, np.float32)
    has_min = scheme.offset_codec in ("min", "two_level_min")
    codes = rng.integers(0, 1 << scheme.bits, (rows, columns), dtype=np.uint8)
    if scheme.code_type == "e4m3":
        codes = _fp8_codes(rng.standard_normal((rows, columns), np.float32))
    return QuantizedMatrix(
        scheme,
        codes,
        scale,
        rng.integers(1, 32, (rows, groups), dtype=np.int8) if scheme.scale_codec == "two_level" else None,
        scale if has_min else None,
        rng.integers(0, 16, (rows, groups), dtype=np.uint8) if scheme.offset_codec == "two_level_min" else None,
    )


def _fp8_codes(values: np.ndarray) -> np.ndarray:
    """uint8, of weights as they are: normal, the largest at the end of the range.

    Codes drawn evenly would be of numbers so small that fp32 has no normal ones for them (fp8 is held times 2^-120),
    for which Intel's cores take twenty times as long; of real weights one in some thousands is.
    """
    scaled = torch.from_numpy(values * np.float32(448 / np.abs(values).max()))
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _attention(kv_dtype: str, new: int, memory: Tensor, turns: _Turns) -> AttentionCost:
    """Of each of ``new`` queries."""
    first, second = (
        (float(shape.numbers), float(shape.operations), _attention_s(kv_dtype, shape, new, memory, turns))
        for shape in ATTENTION
    )
    return AttentionCost.of_two(first, second)


def _cache_bytes(kv_dtype: str, shape: AttentionShape) -> int:
    """Of keys and values that one query, or a chunk, is measured over."""
    num_blocks = max(_copies(kv_dtype, shape) * _blocks(shape.context), _blocks(shape.prefill_context))
    return num_blocks * BLOCK_SIZE * shape.numbers * TORCH_DTYPE[kv_dtype].itemsize


def _copies(kv_dtype: str, shape: AttentionShape) -> int:
    """Of a sequence's keys and values, so that one query finds none in a cache."""
    nbytes = _blocks(shape.context) * BLOCK_SIZE * shape.numbers * TORCH_DTYPE[kv_dtype].itemsize
    return min(64, 1 + 2 * last_level_cache_bytes() // nbytes)


def _blocks(context: int) -> int:
    return -(-context // BLOCK_SIZE)


def _attention_s(kv_dtype: str, shape: AttentionShape, new: int, memory: Tensor, turns: _Turns) -> float:
    """Seconds of a query for each of its positions. One query finds no key in a cache, and a chunk finds all."""
    context, dtype = shape.context if new == 1 else shape.prefill_context, TORCH_DTYPE[kv_dtype]
    num_blocks, copies = _blocks(context), _copies(kv_dtype, shape) if new == 1 else 1
    pool = (copies * num_blocks, shape.kv_heads, shape.head_dim, BLOCK_SIZE)
    nbytes = math.prod(pool) * dtype.itemsize
    # Written, not only allocated: pages that nobody wrote to are all the same page of zeros.
    keys, values = (
        memory[begin : begin + nbytes].view(dtype).view(pool).copy_(torch.ones(())) for begin in (0, nbytes)
    )
    scale = torch.ones(copies * num_blocks, shape.kv_heads, BLOCK_SIZE) if kv_dtype == "int8" else None
    query = torch.randn(new, shape.heads, shape.head_dim)
    keys, values = keys.permute(0, 3, 1, 2), values.view(-1, shape.kv_heads, BLOCK_SIZE, shape.head_dim).transpose(1, 2)
    starts, lens = torch.tensor([0, new], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    calls = [
        partial(
            kernels.paged_attention, query, keys, values, table[None], starts, lens, shape.head_dim**-0.5, scale, scale
        )
        for table in torch.arange(copies * num_blocks, dtype=torch.int32).split(num_blocks)  # as one sequence gets them
    ]
    pairs = new * context - new * (new - 1) // 2
    return turns.of(calls, 8 if new == 1 else 2) / pairs


@dataclass(frozen=True, slots=True, eq=False)
class _Models:
    """Engines around small layers: ``few`` and ``many`` of them, by what they are for and by activations."""

    around: tuple[Skeleton, Skeleton]  # tiny layers and a whole vocabulary
    decoding: Mapping[str, tuple[Skeleton, Skeleton]]  # like small models, which no cache holds
    prefilling: Mapping[str, tuple[Skeleton, Skeleton]]

    @classmethod
    def of(cls, activations: Sequence[Activations]) -> _Models:
        nbytes = FORMS[SMALL_SCHEME].held_bytes(1, SMALL.layer_weights)
        cold = min(32, 4 + 2 * last_level_cache_bytes() // nbytes)
        return cls(
            (Skeleton(2), Skeleton(18)),
            {each: (_small(cold, each), _small(cold + 16, each)) for each in activations},
            {each: (_small(2, each), _small(10, each)) for each in activations},
        )


def _of_a_layer(turns: _Turns, few: Skeleton, many: Skeleton, call: Callable[[Skeleton], object], times: int) -> float:
    """Seconds that a layer more takes."""
    rounds = turns.rounds([partial(call, few), partial(call, many)], times)
    return median(deep_s - shallow_s for shallow_s, deep_s in rounds) / (many.layers - few.layers)


def _overheads(models: _Models, turns: _Turns, products: Mapping[str, ProductRate]) -> tuple[dict[str, float], float]:
    """Seconds of a layer by activations, and of a step around the layers, beside products.

    Around: from models of tiny layers and a whole vocabulary. A layer: from layers like a small model's, whose products
    are large enough to be shared by all threads and too narrow to be done as fast as large ones; what they take beyond
    the rate of large ones counts as the layer's, which for a large model is next to nothing.
    """
    few, many = models.around
    rounds = turns.rounds([few.step, many.step, few.head], 8)
    tiny_s = max(median(deep_s - shallow_s for shallow_s, deep_s, _ in rounds) / (many.layers - few.layers), 1e-7)
    token_s = median(shallow_s - head_s for shallow_s, _, head_s in rounds) - few.layers * tiny_s
    layer_s = {}
    for activations, pair in models.decoding.items():
        product_s = SMALL.layer_weights / products[f"{SMALL_SCHEME} {activations}"].at(1)
        layer_s[activations] = max(_of_a_layer(turns, *pair, Skeleton.step, 8) - product_s, tiny_s)
    return layer_s, max(token_s, 1e-6)


def _row_s(
    activations: Activations,
    models: _Models,
    turns: _Turns,
    products: Mapping[str, ProductRate],
    attention: AttentionCost,
) -> float:
    """Seconds of a small model's layer for each number of each hidden state of a chunk, beyond what its products would
    take as large ones and its attention does: norms, rotation, routing, rounding, sums, and matrices that are narrow.

    All of that grows with the width of the hidden state, products with its square: little for a large model.
    """
    layer_s = _of_a_layer(turns, *models.prefilling[activations], lambda model: model.chunk(CHUNK), 4)
    product_s = SMALL.layer_weights / products[f"{SMALL_SCHEME} {activations}"].at(CHUNK)
    attention_s = attention.seconds(SMALL.numbers, SMALL.operations) * CHUNK * (CHUNK + 1) / 2
    return max(layer_s - product_s - attention_s, 0.0) / (CHUNK * SMALL.hidden)


def _small(layers: int, activations: Activations) -> Skeleton:
    return Skeleton(layers, SMALL, partial(_matrix, SMALL_SCHEME), activations, SMALL_VOCAB)
