"""Native paged attention against the plain one in float64, and against itself however a prompt is cut up.

Caches of every dtype: what they hold is compared, not what was to be stored. Where the CPU multiplies pairs of bf16,
the definition is given the rounded queries, and probabilities may be off by bf16's 2^-8 of themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmlocal.kernels import cpu, reference

if not cpu.available:
    pytest.skip(f"no native kernels here: {cpu.describe()}", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.attention import paged_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
TILE, SPLIT = _cpu.KEY_TILE, _cpu.KEY_SPLIT
NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 32


AIR = Shape(96, 8, 128)
AIR_PART = Shape(24, 2, 128)
DEMO = Shape(9, 3, 64)
SHAPES = [
    AIR,
    DEMO,
    Shape(4, 2, 16),
    Shape(2, 2, 24, 16),
    Shape(5, 1, 8, 1),
    Shape(7, 1, 40, 3),
    Shape(13, 1, 72, 48),
    Shape(16, 1, 256, 16),
]


# What operands cost of the mean magnitude of the values that a query sees.
ROUNDED = {"fp32": 0.0, "bf16": 2**-8, "int16": 2**-10}


@dataclass(frozen=True)
class Case:
    """Requests with their cache; whatever no query may look at is NaN, has a scale of NaN, or does not exist."""

    shape: Shape
    keys: list[Tensor]  # per request [seq_len, kv_heads, head_dim]
    values: list[Tensor]
    queries: list[Tensor]  # per request [new, heads, head_dim]
    scale: float
    dtype: torch.dtype = torch.float32

    def run(
        self, parts: list[tuple[int, int, int]], order: str = "tokens", op: Callable[..., Tensor] = paged_attention
    ) -> list[Tensor]:
        """Attention for parts (request, first and last + 1 query): one batch, caches in this memory ``order``."""
        shape, size = self.shape, self.shape.block_size
        seq_lens = [len(self.keys[r]) - len(self.queries[r]) + end for r, _, end in parts]
        needed = [-(-seq_len // size) for seq_len in seq_lens]
        num_blocks = sum(needed) + 2
        ids = torch.randperm(num_blocks)[: sum(needed)].split(needed)
        k_cache, v_cache, *scales = caches(shape, num_blocks, order, self.dtype)
        tables = torch.full((len(parts), max(needed, default=0) + 1), -7, dtype=torch.int32)
        for row, (r, _, _) in enumerate(parts):
            tables[row, : needed[row]] = ids[row]
            position = torch.arange(seq_lens[row])
            slots = ids[row][position // size] * size + position % size
            stored = self.keys[r][: seq_lens[row]], self.values[r][: seq_lens[row]]
            reference.kv_write(*stored, k_cache, v_cache, slots, *scales)
        counts = [end - start for _, start, end in parts]
        q = torch.cat([self.queries[r][start:end] for r, start, end in parts])
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        seq_lens_tensor = torch.tensor(seq_lens, dtype=torch.int32)
        out = op(q, k_cache, v_cache, tables, starts, seq_lens_tensor, self.scale, *scales)
        return list(out.split(counts))

    @property
    def operands(self) -> str:
        return "fp32" if self.dtype is torch.float32 else _cpu.attention_operands()

    def expected(self, r: int) -> tuple[Tensor, Tensor]:
        """In float64, by the definition; and what may be lost by rounding, at most."""
        q = self.queries[r] * self.scale
        q = (q.bfloat16() if self.operands == "bf16" else q).double()
        k, v = (stored(x, self.dtype).double() for x in (self.keys[r], self.values[r]))
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k)
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        scores.masked_fill_(torch.arange(len(k)) > position, float("-inf"))
        weights = scores.softmax(-1)
        lost = ROUNDED[self.operands] * torch.einsum("hqk,khd->qhd", weights, v.abs())
        if self.operands == "int16":  # what an integer loses is a part of its row's largest
            lost += 2**-12 * torch.einsum("hqk,kh->qh", weights, v.abs().amax(-1))[..., None]
        return torch.einsum("hqk,khd->qhd", weights, v), lost


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [tokens, kv_heads, head_dim] as a cache of that dtype gives it back."""
    caches = [torch.zeros(len(x), 1, *x.shape[1:], dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(len(x), x.shape[1], 1) for _ in range(2)] if dtype is torch.int8 else []
    reference.kv_write(x, x, *caches, torch.arange(len(x)), *scales)
    return caches[0][:, 0].float() * scales[0] if scales else caches[0][:, 0].float()


def orders(shape: Shape) -> list[str]:
    """The orders in memory that a cache may have: tokens or heads outside, or heads outside and keys innermost."""
    return ["tokens", "heads", *(["keys"] if shape.block_size % 16 == 0 else [])]


def caches(shape: Shape, num_blocks: int, order: str, dtype: torch.dtype) -> list[Tensor]:
    """Caches full of NaN, as [blocks, block_size, kv_heads, head_dim]; for int8 their scales are."""
    n, size, heads, dim = num_blocks, shape.block_size, shape.kv_heads, shape.head_dim

    def full(*sizes: int) -> Tensor:
        return torch.full(sizes, 77 if dtype is torch.int8 else NAN, dtype=dtype)

    scales = [torch.full((n, heads, size), NAN) for _ in range(2)] if dtype is torch.int8 else []
    if order == "tokens":
        return [full(n, size, heads, dim), full(n, size, heads, dim), *scales]
    values = full(n, heads, size, dim).transpose(1, 2)
    if order == "heads":
        return [full(n, heads, size, dim).transpose(1, 2), values, *scales]
    return [full(n, heads, dim, size).permute(0, 3, 1, 2), values, *scales]


def make_case(
    shape: Shape,
    lengths: list[tuple[int, int]],
    seed: int = 0,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Requests of (seq_len, new tokens); ``spread`` is the standard deviation of the scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Case(
        shape,
        [normal(seq_len, shape.kv_heads, shape.head_dim) for seq_len, _ in lengths],
        [normal(seq_len, shape.kv_heads, shape.head_dim) for seq_len, _ in lengths],
        [normal(new, shape.heads, shape.head_dim) * spread for _, new in lengths],
        shape.head_dim**-0.5,
        dtype,
    )


def whole(case: Case) -> list[tuple[int, int, int]]:
    return [(r, 0, len(q)) for r, q in enumerate(case.queries)]


def check(case: Case, results: list[Tensor], spread: float = 1.0) -> None:
    # A score is off by 2^-24 of its size, and its weight by as much of itself.
    for r, result in enumerate(results):
        expected, lost = case.expected(r)
        tolerance = 2e-6 * max(1.0, spread) + 1e-5 * expected.abs() + lost
        assert ((result.double() - expected).abs() <= tolerance).all(), r


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "order"), [(shape, order) for shape in SHAPES for order in orders(shape)], ids=str)
def test_matches_float64(isa: str, shape: Shape, order: str, dtype: torch.dtype) -> None:
    case = make_case(shape, [(1, 1), (TILE + 1, 1), (23, 23), (97, 31), (50, 0), (SPLIT + 2, 3)], dtype=dtype)
    check(case, case.run(whole(case), order))


def test_narrow_caches_are_multiplied_as_the_cpu_is_fastest(isa: str) -> None:
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    pairs = "bf16" if {"avx512_bf16", "AuthenticAMD"} <= set(words) else "int16"
    assert _cpu.attention_operands() == (pairs if isa in ("avx512", "amx") else "fp32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "seq_len", [1, 2, 15, 16, 17, TILE - 1, TILE, TILE + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 77]
)
def test_decode_of_every_length_matches_float64(isa: str, seq_len: int, dtype: torch.dtype) -> None:
    case = make_case(DEMO, [(seq_len, 1)], dtype=dtype)
    check(case, case.run(whole(case)))


def test_prefill_over_several_query_tiles_matches_float64(isa: str) -> None:
    case = make_case(Shape(4, 2, 16), [(2 * SPLIT + 5, 2 * SPLIT + 5)])
    check(case, case.run(whole(case)))


def test_sharp_and_flat_scores_match_float64(isa: str) -> None:
    # Standard deviations of 30 and 0: one key takes all, every key takes the same, the maximum grows from tile to tile.
    for spread in (30.0, 0.0):
        case = make_case(DEMO, [(300, 7)], spread=spread)
        check(case, case.run(whole(case)), spread)
    case = make_case(Shape(2, 1, 16), [(400, 400)])
    rising = Case(
        case.shape,
        [torch.arange(400.0)[:, None, None].expand(400, 1, 16) / 16],
        case.values,
        [torch.ones(400, 2, 16)],
        0.2,
    )
    check(rising, rising.run(whole(rising)), spread=80.0)


def test_huge_scores_stay_finite(isa: str) -> None:
    case = make_case(DEMO, [(130, 2)], spread=1e15)
    results = case.run(whole(case))
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [AIR_PART, DEMO, Shape(4, 2, 24, 16), Shape(5, 1, 8, 3)], ids=str)
def test_bits_depend_on_neither_chunks_nor_batch_nor_threads_nor_cache_order(
    isa: str, threads: Callable[[int], None], shape: Shape, dtype: torch.dtype
) -> None:
    length = SPLIT + TILE + 3
    case = make_case(shape, [(length, length), (70, 70), (SPLIT + 9, 2)], dtype=dtype)
    threads(1)
    together = case.run(whole(case))
    for count in (1, 2):
        threads(count)
        for order in orders(shape):
            for expected, result in zip(together, case.run(whole(case), order), strict=True):
                assert torch.equal(expected, result)
        for chunks in ([0, 1, 5, 6, 133, SPLIT - 1, SPLIT, SPLIT + 1, length], [0, 64, 128, length]):
            for start, end in pairwise(chunks):
                (part,) = case.run([(0, start, end)])
                assert torch.equal(together[0][start:end], part), (start, end)
        # One token at a time, beside other requests: decoding.
        for token in (0, 1, TILE - 1, TILE, 200, SPLIT - 1, SPLIT, SPLIT + 1, length - 1):
            part, other, _ = case.run([(0, token, token + 1), (1, min(token, 60), min(token, 60) + 3), (2, 1, 2)])
            assert torch.equal(together[0][token : token + 1], part), token
            assert torch.equal(together[1][min(token, 60) : min(token, 60) + 3], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verifying_drafts_gives_the_bits_of_decoding(isa: str, dtype: torch.dtype) -> None:
    case = make_case(AIR, [(2 * SPLIT + 2, 5)], dtype=dtype)
    alone = [case.run([(0, token, token + 1)])[0] for token in range(5)]
    for count in (2, 3, 4, 5):
        (drafts,) = case.run([(0, 5 - count, 5)])
        assert torch.equal(drafts, torch.cat(alone[5 - count :]))


def test_agrees_with_the_plain_op(isa: str) -> None:
    """The twin reads no NaN either where none is cached, so a cache of zeros serves both."""
    shape, size = Shape(6, 3, 32), 32
    k_cache, v_cache = torch.randn(4, size, 3, 32), torch.randn(4, size, 3, 32)
    q = torch.randn(9, 6, 32)
    arguments = (
        torch.tensor([[2, 0, 3], [1, 0, 0], [3, 3, 3]], dtype=torch.int32),
        torch.tensor([0, 5, 5, 9], dtype=torch.int32),
        torch.tensor([70, 3, 4], dtype=torch.int32),
        shape.head_dim**-0.5,
    )
    expected = reference.paged_attention(q, k_cache, v_cache, *arguments)
    torch.testing.assert_close(paged_attention(q, k_cache, v_cache, *arguments), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [70, 71])  # either of a pair of keys
def test_nan_of_a_visible_key_or_value_shows_in_exactly_the_queries_that_see_it(
    isa: str, position: int, dtype: torch.dtype
) -> None:
    case = make_case(DEMO, [(100, 100)], dtype=dtype)
    for tensor in (case.keys[0], case.values[0]):
        kept = tensor[position, 1, 5].item()
        tensor[position, 1, 5] = NAN
        (result,) = case.run(whole(case))
        tensor[position, 1, 5] = kept
        seen = torch.isnan(result).any(-1)
        assert seen[position:, 3:6].all()
        assert not seen[:position].any()
        assert not seen[:, :3].any()
        assert not seen[:, 6:].any()


def test_no_tokens_and_no_requests(isa: str) -> None:
    for requests in (0, 3):
        k_cache = torch.empty(2, 32, 1, 16)
        out = paged_attention(
            torch.empty(0, 2, 16),
            k_cache,
            k_cache,
            torch.zeros((requests, 0), dtype=torch.int32),
            torch.zeros(requests + 1, dtype=torch.int32),
            torch.zeros(requests, dtype=torch.int32),
            0.25,
        )
        assert out.shape == (0, 2, 16)


def arguments(**changed: Any) -> dict[str, Any]:
    """Two requests of 2 and 1 new tokens, correct but for what is changed."""
    return {
        "q": torch.zeros(3, 4, 16),
        "k_cache": torch.zeros(5, 32, 2, 16),
        "v_cache": torch.zeros(5, 32, 2, 16),
        "block_tables": torch.tensor([[0, 1], [4, -1]], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([64, 32], dtype=torch.int32),
        "scale": 0.25,
    } | changed


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


INT8 = {name: torch.zeros(5, 32, 2, 16, dtype=torch.int8) for name in ("k_cache", "v_cache")}
SCALES = {name: torch.zeros(5, 2, 32) for name in ("k_scales", "v_scales")}


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"block_tables of request 1 wanted blocks from 0 to 4, found 5", {"block_tables": ints([0, 1], [5, 0])}),
        (r"block_tables of request 0 wanted blocks from 0 to 4, found -1", {"block_tables": ints([0, -1], [4, 0])}),
        (r"block_tables of request 0 wanted 3 blocks of 32 for 65 tokens, found 2", {"seq_lens": ints(65, 32)}),
        (r"seq_lens of request 0 wanted at least its 2 new tokens, found 1", {"seq_lens": ints(1, 32)}),
        (r"seq_lens of request 1 wanted at least its 1 new tokens, found -9", {"seq_lens": ints(64, -9)}),
        (r"query_start_loc wanted to go from 0 to the 3 tokens of q, found 0 to 4", {"query_start_loc": ints(0, 2, 4)}),
        (r"query_start_loc wanted .* found 1 to 3", {"query_start_loc": ints(1, 2, 3)}),
        (r"query_start_loc of request 1 falls from 5 to 3", {"query_start_loc": ints(0, 5, 3)}),
        (r"query_start_loc of request 1 falls", {"query_start_loc": ints(0, 5, 3), "seq_lens": ints(64, 32)}),
        (r"query_start_loc wanted contiguous torch.int32 \[3\]", {"query_start_loc": ints(0, 3)}),
        (r"seq_lens wanted contiguous torch.int32 \[2\].* found torch.int64", {"seq_lens": torch.tensor([64, 32])}),
        (r"block_tables wanted contiguous", {"block_tables": ints([0, 4], [1, 0]).t()}),
        (r"q wanted contiguous torch.float32 \[3, 4, 16\].*found torch.float64", {"q": torch.zeros(3, 4, 16).double()}),
        (r"q wanted contiguous .* strides", {"q": torch.zeros(4, 3, 16).transpose(0, 1)}),
        (r"caches wanted fp32, .*bfloat16", {"k_cache": torch.zeros(5, 32, 2, 16, dtype=torch.bfloat16)}),
        (r"caches wanted fp32, .*float64", {n: torch.zeros(5, 32, 2, 16).double() for n in ("k_cache", "v_cache")}),
        (r"caches wanted fp32, .* \[5, 32, 2, 16\]", {"v_cache": torch.zeros(5, 32, 1, 16)}),
        (r"caches wanted fp32, .* 24\]", {"q": torch.zeros(3, 4, 24)}),
        (r"features next to each other", {"v_cache": torch.zeros(5, 2, 16, 32).permute(0, 3, 1, 2)}),
        (r"features next to each other", {"k_cache": torch.zeros(5, 32, 16, 2).transpose(2, 3)}),
        (r"equally many query heads .* 3 heads for 2", {"q": torch.zeros(3, 3, 16)}),
        (r"scales belong to int8 caches, found torch.float32", {"k_scales": torch.zeros(5, 2, 32)}),
        (r"int8 caches wanted k_scales and v_scales", INT8),
        (r"v_scales wanted contiguous torch.float32 \[5, 2, 32\]", INT8 | SCALES | {"v_scales": torch.zeros(5, 32, 2)}),
        (r"caches wanted \[blocks", {"k_cache": torch.zeros(5, 0, 2, 16), "v_cache": torch.zeros(5, 0, 2, 16)}),
        (r"blocks from 0 to -1", {"k_cache": torch.zeros(0, 32, 2, 16), "v_cache": torch.zeros(0, 32, 2, 16)}),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(message: str, changed: dict[str, Any]) -> None:
    paged_attention(**arguments())
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments(**changed))


def test_several_python_threads_at_once(isa: str, threads: Callable[[int], None]) -> None:
    threads(2)
    cases = [make_case(DEMO, [(150 + i, 40)], seed=i) for i in range(4)]
    expected = [case.run(whole(case))[0] for case in cases]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not torch.equal(cases[i].run(whole(cases[i]))[0], expected[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_head_dim_that_is_no_multiple_of_8_runs_on_the_twin() -> None:
    cache = torch.randn(5, 32, 2, 12, generator=torch.Generator().manual_seed(1))
    q = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(2))
    odd = arguments(q=q, k_cache=cache, v_cache=cache.flip(0))
    assert torch.equal(paged_attention(**odd), reference.paged_attention(**odd))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_operands_lose_no_more_than_the_cache_where_one_feature_outgrows_the_others(
    isa: str, dtype: torch.dtype
) -> None:
    # As keys with a bias have it: most of a row's numbers are small beside its largest.
    case = make_case(AIR_PART, [(3 * TILE + 5, 9)], dtype=dtype)
    for keys in case.keys:
        keys[..., 3] += 40
    for values in case.values:
        values[..., 5] *= 40
    exact = Case(case.shape, case.keys, case.values, case.queries, case.scale).expected(0)[0]
    with_rounded_cache = Case(
        case.shape, *([stored(x, dtype) for x in rows] for rows in (case.keys, case.values)), case.queries, case.scale
    ).expected(0)[0]
    of_the_cache = (with_rounded_cache - exact).abs().mean()
    of_all = (case.run(whole(case))[0].double() - exact).abs().mean()
    assert of_all <= 1.5 * of_the_cache


@pytest.mark.parametrize("head_dim", [128, 256])
def test_the_largest_sums_of_products_fit(isa: str, head_dim: int) -> None:
    # All features are as large as their row's largest; keys of odd tokens point the other way.
    case = make_case(Shape(2, 1, head_dim, 16), [(9, 1)], dtype=torch.bfloat16)
    case.queries[0].fill_(1.0)
    case.keys[0].fill_(1.0)
    case.keys[0][1::2] = -1.0
    case.values[0].fill_(1.0)
    case.values[0][1::2] = -1.0
    check(case, case.run(whole(case)))
