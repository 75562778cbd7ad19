"""Measuring our own kernels: the rates that ``glmlocal doctor`` keeps for the forecast.

Only the native ones: importing this raises ImportError where they were not built. Shapes are none that a released
model has. Everything is done until it settles, a few times at most, and the lower quartile counts: what disturbs a
measurement only makes it slower, so a quarter of undisturbed turns is enough, while the fastest of all is a piece of
luck that whole models, which the forecast is compared with, do not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from statistics import median
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.formats.forms import FORMS
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import Activations, QuantScheme
from glmlocal.kernels.cpu import ops
from glmlocal.kernels.cpu.linear import bind_experts
from glmlocal.kernels.cpu.packing import duplicate, pack
from glmlocal.layers.kv_cache import TORCH_DTYPE
from glmlocal.machine.cpu import last_level_cache_bytes
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate, build_id
from glmlocal.skeleton import Skeleton
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
MANY_ROWS = 512  # of one matrix
BEYOND_CACHE = 4  # weights of one row's products are this much larger than the last-level cache
BLOCK_SIZE, CHUNK = 32, 512
SMALL_HIDDEN, SMALL_VOCAB, SMALL_SCHEME = 384, 4096, "Q4_0"  # of the model whose layers' overhead is measured
_LEAST_TURNS, _SETTLED = 3, 1.02  # median over lower quartile
# Calls of some microseconds take more turns: when the first run, OpenMP's threads that filled the matrices still spin.
_LEAST_S, _MOST_TURNS = 0.03, 200


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention is measured at; ``context`` for one query, ``prefill_context`` for the last of a chunk."""

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    prefill_context: int

    @property
    def numbers(self) -> int:
        """Of one position's keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def operations(self) -> int:
        """Of one query with one position."""
        return 4 * self.heads * self.head_dim


# As many query heads per kv head as every GLM-4 has; and few, short ones, as small models have.
ATTENTION = (AttentionShape(48, 4, 128, 6000, 1500), AttentionShape(8, 4, 64, 1500, 1500))


def lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


def measure(
    *,
    quick: bool = False,
    schemes: Sequence[str] | None = None,
    clock: Clock = time.perf_counter,
    pick: Callable[[Sequence[float]], float] = lower_quartile,
    on_step: Callable[[str], None] = lambda step: None,
) -> KernelRates:
    """All rates of the native kernels, with the threads and the instruction set in use.

    ``schemes`` limits them to those that somebody needs, and SMALL_SCHEME; ``pick`` chooses among the times of a call.
    """
    best = _Turns(clock, most=1 if quick else 2, pick=pick)
    products = {}
    for scheme in dict.fromkeys((*(schemes or (QUICK_SCHEMES if quick else SCHEMES)), SMALL_SCHEME)):
        on_step(f"measuring the kernels: {scheme}")
        both: tuple[Activations, ...] = ("int8", "fp32") if FORMS[scheme].is_integer else ("fp32",)
        for activations in both:
            products[f"{scheme} {activations}"] = _product(scheme, activations, best)
    on_step("measuring the kernels: attention")
    dtypes = tuple(TORCH_DTYPE)
    decode = {dtype: _attention(dtype, 1, best) for dtype in dtypes}
    prefill = {dtype: _attention(dtype, CHUNK, best) for dtype in dtypes}
    on_step("measuring what a layer and a token cost beside their products")
    layer_s, token_s = _overheads(best, products)
    row_s = {activations: _row_s(activations, best, products, prefill["bf16"]) for activations in get_args(Activations)}
    return KernelRates(build_id(), products, decode, prefill, layer_s, token_s, row_s)


class _Turns:
    """Seconds of a call: what ``pick`` says of some turns, fewer where they agree soon."""

    def __init__(self, clock: Clock, most: int, pick: Callable[[Sequence[float]], float] = lower_quartile) -> None:
        self._clock, self._most, self._pick = clock, most, pick

    def of(self, calls: Iterable[Callable[[], object]], times: int) -> float:
        """The calls take turns, so that none finds its weights in a cache; the first turn does not count."""
        taken: list[float] = []
        turns = cycle(calls)
        next(turns)()
        while not self._is_enough(taken, times):
            call = next(turns)
            start = self._clock()
            call()
            taken.append(self._clock() - start)
        return max(self._pick(taken), 1e-9)

    def _is_enough(self, taken: Sequence[float], times: int) -> bool:
        if sum(taken) < _LEAST_S and len(taken) < _MOST_TURNS:
            return False
        return len(taken) >= max(_LEAST_TURNS, times * self._most) or _is_settled(taken)

    def rounds(self, calls: Sequence[Callable[[], object]], times: int) -> list[tuple[float, ...]]:
        """Seconds of each call in rounds of all of them, to be subtracted within a round: a machine that is slower for
        a while is so for all calls of a round. The first round does not count."""
        taken: list[tuple[float, ...]] = []
        for _ in range(1 + times * self._most):
            marks = [self._clock()]
            for call in calls:
                call()
                marks.append(self._clock())
            taken.append(tuple(end - begin for begin, end in pairwise(marks)))
        return taken[1:]


def _is_settled(taken: Sequence[float]) -> bool:
    return len(taken) > _LEAST_TURNS and median(taken) <= _SETTLED * lower_quartile(taken)


def _product(scheme: str, activations: Activations, best: _Turns) -> ProductRate:
    wide, tall = (_matrix(scheme, *shape) for shape in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    nbytes = 3 * FORMS[scheme].held_bytes(INTERMEDIATE, HIDDEN)
    wanted = max(BEYOND_CACHE * last_level_cache_bytes(), 64 * MIB)
    num_experts = min(64, max(2, -(-wanted // (nbytes * TOP_K)))) * TOP_K
    gate, down = pack(wide, activations), pack(tall, activations)
    copies = (tuple(duplicate(weight) for _ in range(num_experts)) for weight in (gate, gate, down))
    experts = bind_experts(*copies)
    rates = []
    is_asked_for = activations == "fp32" and FORMS[scheme].is_integer
    chosen_rows = FEW_ROWS if is_asked_for else ROWS
    for rows in chosen_rows:
        top_k = TOP_K if rows < ARITHMETIC_ROWS else TOP_K // 2
        weights = top_k * 3 * HIDDEN * INTERMEDIATE
        x, topk_weights = torch.randn(rows, HIDDEN), torch.rand(rows, top_k)
        ids = [(torch.arange(top_k, dtype=torch.int32) + first).repeat(rows, 1) for first in _firsts(num_experts)]
        calls = [partial(ops.experts_ffn, x, i, topk_weights, experts) for i in ids]
        rates.append(weights / best.of(calls, 8 if rows <= 4 else 2))
    x = torch.randn(MANY_ROWS, HIDDEN)
    many = best.of([lambda: ops.linear(x, experts.gate[0])], 2)
    return ProductRate((*chosen_rows, MANY_ROWS), (*rates, HIDDEN * INTERMEDIATE / many))


def _firsts(num_experts: int) -> range:
    return range(0, num_experts, TOP_K)


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


def _attention(kv_dtype: str, new: int, best: _Turns) -> AttentionCost:
    """Of each of ``new`` queries."""
    first, second = (
        (float(shape.numbers), float(shape.operations), _attention_s(kv_dtype, shape, new, best)) for shape in ATTENTION
    )
    return AttentionCost.of_two(first, second)


def _attention_s(kv_dtype: str, shape: AttentionShape, new: int, best: _Turns) -> float:
    """Seconds of a query for each of its positions. One query finds no key in a cache, and a chunk finds all."""
    context = shape.context if new == 1 else shape.prefill_context
    num_blocks, dtype = -(-context // BLOCK_SIZE), TORCH_DTYPE[kv_dtype]
    nbytes = num_blocks * BLOCK_SIZE * shape.numbers * dtype.itemsize
    copies = min(64, 1 + 2 * last_level_cache_bytes() // nbytes) if new == 1 else 1
    one = torch.ones(1, shape.kv_heads, shape.head_dim, BLOCK_SIZE).to(dtype)
    # Written, not only allocated: pages that nobody wrote to are all the same page of zeros.
    keys, values = (one.expand(copies * num_blocks, *one.shape[1:]).contiguous() for _ in range(2))
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
    return best.of(calls, 8 if new == 1 else 2) / pairs


def _overheads(best: _Turns, products: Mapping[str, ProductRate]) -> tuple[dict[str, float], float]:
    """Seconds of a layer by activations, and of a step around the layers, beside products.

    Around: from models of tiny layers and a whole vocabulary. A layer: from layers like a small model's, whose products
    are large enough to be shared by all threads and too narrow to be done as fast as large ones; what they take beyond
    the rate of large ones counts as the layer's, which for a large model is next to nothing.
    """
    few, many = 2, 18
    rounds = best.rounds([Skeleton(few).step, Skeleton(many).step, Skeleton(few).head], 8)
    tiny_s = max(median(deep_s - shallow_s for shallow_s, deep_s, _ in rounds) / (many - few), 1e-7)
    token_s = median(shallow_s - head_s for shallow_s, _, head_s in rounds) - few * tiny_s
    layer_s = {}
    for activations in get_args(Activations):
        beyond_s = _small_layer_s(activations, best)
        weights = Skeleton.layer_weights(SMALL_HIDDEN)
        layer_s[activations] = max(beyond_s - weights / products[f"{SMALL_SCHEME} {activations}"].at(1), tiny_s)
    return layer_s, max(token_s, 1e-6)


def _row_s(
    activations: Activations, best: _Turns, products: Mapping[str, ProductRate], attention: AttentionCost
) -> float:
    """Seconds of a small model's layer for each number of each hidden state of a chunk, beyond what its products would
    take as large ones and its attention does: norms, rotation, routing, rounding, sums, and matrices that are narrow.

    All of that grows with the width of the hidden state, products with its square: little for a large model.
    """
    square, few = _matrix(SMALL_SCHEME, SMALL_HIDDEN, SMALL_HIDDEN), 2
    chunks = [partial(Skeleton(few + more, square, activations, SMALL_VOCAB).chunk, CHUNK) for more in (0, 8)]
    layer_s = median(deep_s - shallow_s for shallow_s, deep_s in best.rounds(chunks, 2)) / 8
    product_s = Skeleton.layer_weights(SMALL_HIDDEN) / products[f"{SMALL_SCHEME} {activations}"].at(CHUNK)
    attention_s = attention.seconds(*Skeleton.attention_work(SMALL_HIDDEN)) * CHUNK * (CHUNK + 1) / 2
    return max(layer_s - product_s - attention_s, 0.0) / (CHUNK * SMALL_HIDDEN)


def _small_layer_s(activations: Activations, best: _Turns) -> float:
    """Seconds of a layer that is like a small model's, of a model that no cache holds."""
    square = _matrix(SMALL_SCHEME, SMALL_HIDDEN, SMALL_HIDDEN)
    nbytes = FORMS[SMALL_SCHEME].held_bytes(SMALL_HIDDEN, SMALL_HIDDEN) * Skeleton.layer_weights(1)
    few = min(32, 4 + 2 * last_level_cache_bytes() // nbytes)
    steps = [Skeleton(few + more, square, activations, SMALL_VOCAB).step for more in (0, 16)]
    return median(deep_s - shallow_s for shallow_s, deep_s in best.rounds(steps, 8)) / 16
