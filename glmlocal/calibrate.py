"""Measuring our own kernels: the rates that ``glmlocal doctor`` keeps for the forecast.

Only the native ones: importing this raises ImportError where they were not built. Shapes are none that a released model
has. Everything is done a few times and the fastest counts: what disturbs a
measurement only ever makes it slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle

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
from glmlocal.machine.kernel_rates import KernelRates, ProductRate, build_id
from glmlocal.skeleton import Skeleton
from glmlocal.units import MIB

Clock = Callable[[], float]

# One scheme of every kind of kernel; ``planner.efficiency.kernel_class`` says which stands for which others.
SCHEMES = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "fp8_block128", "bf16", "f32")
QUICK_SCHEMES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "fp8_block128", "bf16", "f32")
HIDDEN, INTERMEDIATE = 3072, 1024
TOP_K = 8
ROWS = (1, 2, 4, 8, 16, 32, 64)  # per expert, of eight that all tokens go to
MANY_ROWS = 512  # of one matrix
BEYOND_CACHE = 4  # weights of one row's products are this much larger than the last-level cache
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 48, 4, 128, 32  # as many query heads per kv head as every GLM-4 has
DECODE_CONTEXT, PREFILL_CONTEXT, CHUNK = 6000, 1500, 512


def measure(
    *,
    quick: bool = False,
    schemes: Sequence[str] | None = None,
    clock: Clock = time.perf_counter,
    pick: Callable[[Sequence[float]], float] = min,
    on_step: Callable[[str], None] = lambda step: None,
) -> KernelRates:
    """All rates of the native kernels, with the threads and the instruction set in use.

    ``schemes`` limits them to those that somebody needs; ``pick`` chooses among the times of a call: the least, or on
    a machine that stays busy their median.
    """
    best = _Best(clock, rounds=2 if quick else 4, pick=pick)
    products = {}
    for scheme in schemes or (QUICK_SCHEMES if quick else SCHEMES):
        on_step(f"measuring the kernels: {scheme}")
        both: tuple[Activations, ...] = ("int8", "fp32") if FORMS[scheme].is_integer else ("fp32",)
        for activations in both:
            products[f"{scheme} {activations}"] = _product(scheme, activations, best)
    on_step("measuring the kernels: attention")
    dtypes = tuple(TORCH_DTYPE)
    decode = {dtype: _attention(dtype, 1, DECODE_CONTEXT, best) for dtype in dtypes}
    prefill = {dtype: _attention(dtype, CHUNK, PREFILL_CONTEXT, best) for dtype in dtypes}
    on_step("measuring what a layer and a token cost beside their products")
    layer_s, token_s = _overheads(best)
    return KernelRates(build_id(), products, decode, prefill, layer_s, token_s)


class _Best:
    """Seconds of a call: the fastest of some, or what ``pick`` says."""

    def __init__(self, clock: Clock, rounds: int, pick: Callable[[Sequence[float]], float] = min) -> None:
        self._clock, self._rounds, self._pick = clock, rounds, pick

    def of(self, calls: Iterable[Callable[[], object]], times: int) -> float:
        """The calls take turns, so that none finds its weights in a cache; the first turn does not count."""
        taken = []
        turns = cycle(calls)
        next(turns)()
        for _ in range(times * self._rounds):
            call = next(turns)
            start = self._clock()
            call()
            taken.append(self._clock() - start)
        return max(self._pick(taken), 1e-9)


def _product(scheme: str, activations: Activations, best: _Best) -> ProductRate:
    wide, tall = (_matrix(scheme, *shape) for shape in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    nbytes = 3 * FORMS[scheme].held_bytes(INTERMEDIATE, HIDDEN)
    wanted = max(BEYOND_CACHE * last_level_cache_bytes(), 64 * MIB)
    num_experts = min(64, max(2, -(-wanted // (nbytes * TOP_K)))) * TOP_K
    gate, down = pack(wide, activations), pack(tall, activations)
    copies = (tuple(duplicate(weight) for _ in range(num_experts)) for weight in (gate, gate, down))
    experts = bind_experts(*copies)
    weights = TOP_K * 3 * HIDDEN * INTERMEDIATE
    rates = []
    for rows in ROWS:
        x, topk_weights = torch.randn(rows, HIDDEN), torch.rand(rows, TOP_K)
        ids = [(torch.arange(TOP_K, dtype=torch.int32) + first).repeat(rows, 1) for first in _firsts(num_experts)]
        calls = [partial(ops.experts_ffn, x, i, topk_weights, experts) for i in ids]
        rates.append(weights / best.of(calls, 4 if rows <= 4 else 1))
    x = torch.randn(MANY_ROWS, HIDDEN)
    many = best.of([lambda: ops.linear(x, experts.gate[0])], 1)
    return ProductRate((*ROWS, MANY_ROWS), (*rates, HIDDEN * INTERMEDIATE / many))


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
    has_min = scheme.offset_codec == "two_level_min"
    codes = rng.integers(0, 120 if scheme.code_type == "e4m3" else 1 << scheme.bits, (rows, columns), dtype=np.uint8)
    return QuantizedMatrix(
        scheme,
        codes,
        scale,
        rng.integers(1, 32, (rows, groups), dtype=np.int8) if scheme.scale_codec == "two_level" else None,
        scale if has_min else None,
        rng.integers(0, 16, (rows, groups), dtype=np.uint8) if has_min else None,
    )


def _attention(kv_dtype: str, new: int, context: int, best: _Best) -> float:
    """Operations per second of ``new`` queries, the last of which has so many positions."""
    num_blocks, dtype = -(-context // BLOCK_SIZE), TORCH_DTYPE[kv_dtype]
    keys = torch.zeros(num_blocks, KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype=dtype).permute(0, 3, 1, 2)
    values = torch.zeros(num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype).transpose(1, 2)
    scales = [torch.ones(num_blocks, KV_HEADS, BLOCK_SIZE) if kv_dtype == "int8" else None for _ in range(2)]
    arguments = (
        torch.randn(new, HEADS, HEAD_DIM),
        keys,
        values,
        torch.randperm(num_blocks, dtype=torch.int32)[None],
        torch.tensor([0, new], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        HEAD_DIM**-0.5,
        *scales,
    )
    pairs = new * context - new * (new - 1) // 2
    seconds = best.of([lambda: kernels.paged_attention(*arguments)], 4 if new == 1 else 1)
    return 4 * HEADS * HEAD_DIM * pairs / seconds


def _overheads(best: _Best) -> tuple[float, float]:
    """Seconds of a layer and of a step, beside products: two models of tiny layers and a whole vocabulary."""
    few, many = 2, 18
    shallow, deep = (best.of([Skeleton(layers).step], 10) for layers in (few, many))
    layer_s = max((deep - shallow) / (many - few), 1e-7)
    head_s = best.of([Skeleton(few).head], 10)
    return layer_s, max(shallow - few * layer_s - head_s, 1e-6)
