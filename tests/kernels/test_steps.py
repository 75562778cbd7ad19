"""rms_norm, rope_store_ and router_topk against their plain twins, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.kernels import cpu, reference
from glmlocal.layers.kv_cache import TORCH_DTYPE, KVCache

pytestmark = pytest.mark.usefixtures("isa")
NAN = float("nan")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() if got.numel() else 0) <= tolerance * float(
        want.abs().max() if got.numel() else 1
    )


@pytest.mark.parametrize("features", [1, 15, 16, 17, 24, 64, 128, 576, 4096, 5120])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 65])
def test_rms_norm_equals_its_twin(rows: int, features: int) -> None:
    x, weight = random(rows, features) * 3, random(features)
    close(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5).float())
    tiny = torch.full((1, features), 1e-4)  # eps is as large as the mean square
    close(kernels.rms_norm(tiny, weight, 1e-8), reference.rms_norm(tiny, weight, 1e-8))


def rope_case(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, *, norms: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and the rest; positions and slots are scattered, the caches NaN."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        random(tokens, heads, head_dim),
        random(tokens, kv_heads, head_dim),
        random(tokens, kv_heads, head_dim, seed=1),
    )
    angles = random(97, rotary_dim // 2)
    return [q, k, v], {
        "q_norm": random(head_dim) if norms else None,
        "k_norm": random(head_dim, seed=2) if norms else None,
        "eps": 1e-5,
        "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
        "positions": torch.randint(0, 97, (tokens,), generator=generator),
        "k_cache": torch.full((5, 16, kv_heads, head_dim), NAN),
        "v_cache": torch.full((5, 16, kv_heads, head_dim), NAN),
        "slot_mapping": torch.randperm(80, generator=generator)[:tokens],
    }


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(96, 8, 128, 64), (9, 3, 64, 64), (4, 2, 16, 8), (3, 1, 24, 12), (2, 2, 40, 38)],
)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 61])
def test_rope_store_equals_its_twin(
    tokens: int, norms: bool, heads: int, kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    inputs, rest = rope_case(tokens, heads, kv_heads, head_dim, rotary_dim, norms=norms)
    got, want = [x.clone() for x in inputs], [x.clone() for x in inputs]
    caches = {name: rest[name].clone() for name in ("k_cache", "v_cache")}
    kernels.rope_store_(*got, **rest)
    reference.rope_store_(*want, **{**rest, **caches})
    for mine, twin in zip(got, want, strict=True):
        close(mine, twin)
    for name, twin in caches.items():
        assert torch.equal(rest[name].isnan(), twin.isnan())  # nothing but the slots is touched
        close(rest[name].nan_to_num(0), twin.nan_to_num(0))


@pytest.mark.parametrize(
    ("name", "value"), [("positions", 97), ("positions", -1), ("slot_mapping", 80), ("slot_mapping", -1)]
)
def test_rope_store_refuses_what_is_out_of_range_and_writes_nothing(name: str, value: int) -> None:
    inputs, rest = rope_case(4, 4, 2, 16, 8, norms=False)
    rest[name][2] = value
    with pytest.raises(IndexError, match="token 2"):
        kernels.rope_store_(*inputs, **rest)
    assert rest["k_cache"].isnan().all()


ROUTING = {"top_k": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        (160, {}),
        (128, {"routed_scaling_factor": 1.0}),
        (16, {"top_k": 7, "routed_scaling_factor": 7.0}),
        (8, {"top_k": 8}),
        (13, {"top_k": 1, "norm_topk_prob": False}),
        (64, {"n_group": 8, "topk_group": 3}),
        (12, {"n_group": 4, "topk_group": 2, "top_k": 5}),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
def test_router_chooses_and_weighs_like_its_twin(rows: int, experts: int, options: dict[str, Any]) -> None:
    logits, bias = random(rows, experts) * 2, random(experts) * 0.3
    options = {**ROUTING, **options}
    ids, weights = kernels.router_topk(logits, bias, **options)
    want_ids, want_weights = reference.router_topk(logits, bias, **options)
    assert ids.dtype == torch.int32
    order, want_order = ids.argsort(1), want_ids.argsort(1)
    assert torch.equal(ids.gather(1, order), want_ids.gather(1, want_order))
    close(weights.gather(1, order), want_weights.gather(1, want_order))


def test_router_gives_equal_scores_to_the_lower_id() -> None:
    ids, _ = kernels.router_topk(torch.zeros(2, 40), torch.zeros(40), **ROUTING)
    assert ids.tolist() == [list(range(8))] * 2


def test_router_survives_nan_logits() -> None:
    ids, _ = kernels.router_topk(torch.full((2, 16), NAN), torch.zeros(16), **ROUTING)
    assert ((ids >= 0) & (ids < 16)).all()


def test_a_row_does_not_depend_on_its_batch_or_the_threads(threads: Any) -> None:
    x, weight, bias = random(64, 576), random(576), random(160)
    logits = random(64, 160)
    for count in (1, 2):
        threads(count)
        together = kernels.rms_norm(x, weight, 1e-5)
        routed = kernels.router_topk(logits, bias, **ROUTING)
        for row in (0, 13, 63):
            assert torch.equal(kernels.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])
            alone = kernels.router_topk(logits[row : row + 1], bias, **ROUTING)
            assert all(torch.equal(part[0], whole[row]) for part, whole in zip(alone, routed, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.rms_norm(torch.zeros(2, 8).double(), torch.ones(8), 1e-5),
        lambda: kernels.rms_norm(torch.zeros(2, 8), torch.ones(9), 1e-5),
        lambda: kernels.rms_norm(torch.zeros(8, 2).T, torch.ones(8), 1e-5),
        lambda: kernels.router_topk(torch.zeros(2, 16), torch.zeros(15), **ROUTING),
        lambda: kernels.router_topk(torch.zeros(2, 16), torch.zeros(16), **{**ROUTING, "top_k": 17}),
        lambda: kernels.router_topk(torch.zeros(2, 16), torch.zeros(16), **{**ROUTING, "n_group": 3}),
        lambda: kernels.router_topk(torch.zeros(2, 16), torch.zeros(16), **{**ROUTING, "n_group": 4, "topk_group": 1}),
    ],
)
def test_wrong_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"wanted|cannot choose"):
        call()


def test_the_memory_order_of_the_caches_does_not_matter() -> None:
    inputs, rest = rope_case(9, 6, 3, 24, 12, norms=True)
    kernels.rope_store_(*(x.clone() for x in inputs), **rest)
    k_cache = torch.full((5, 3, 24, 16), NAN).permute(0, 3, 1, 2)  # as KVCache has them
    v_cache = torch.full((5, 3, 16, 24), NAN).transpose(1, 2)
    kernels.rope_store_(*(x.clone() for x in inputs), **{**rest, "k_cache": k_cache, "v_cache": v_cache})
    assert torch.equal(k_cache.nan_to_num(9), rest["k_cache"].nan_to_num(9))
    assert torch.equal(v_cache.nan_to_num(9), rest["v_cache"].nan_to_num(9))


NARROW = ["bf16", "fp8", "int8"]


def awkward_numbers() -> Tensor:
    """fp32 [n]: what rounding to bf16 and e4m3 can go wrong with, and any bits at all."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.tensor(
        [0.0, -0.0, 448, 463.9, 464, 464.1, 480, 1e30, -449, 2**-10, 1.5 * 2**-9, 1e-30, 1e-44, 3.4e38]
    )
    special = torch.tensor([float("inf"), float("-inf"), NAN])
    halves = (torch.arange(0x3F00, 0x4100) * 65536 + 0x8000).int().view(torch.float32)  # bf16's ties
    any_bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(5)).int()
    near = torch.cat([ties, edges, halves])
    return torch.cat(
        [
            codes,
            near,
            near.nextafter(torch.tensor(1e38)),
            near.nextafter(torch.tensor(-1e38)),
            special,
            any_bits.view(torch.float32),
        ]
    )


def same_numbers(got: Tensor, want: Tensor) -> bool:
    """Equal, the signs of zeros too; NaN is NaN."""
    got, want = got.float(), want.float()
    signs = torch.equal(got.signbit()[~want.isnan()], want.signbit()[~want.isnan()])
    return signs and bool(((got == want) | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_stored_numbers_are_rounded_like_the_twin_rounds(kv_dtype: str) -> None:
    numbers = awkward_numbers()
    v = torch.cat([numbers, torch.zeros(-len(numbers) % 128)]).view(-1, 2, 64)
    v[3] = 0  # int8: a scale of 0
    v[4] = 1e-44
    tokens = len(v)
    cache, twin = (KVCache.allocate(1, -(-tokens // 16), 16, 2, 64, kv_dtype) for _ in range(2))
    slots = torch.randperm(tokens)
    for kv, op in ((cache, kernels.rope_store_), (twin, reference.rope_store_)):
        rest = (kv.keys[0], kv.values[0], slots, kv.key_scales[0], kv.value_scales[0])
        cos_sin, positions = torch.tensor([[1.0, 0.0]]), torch.zeros(tokens).long()
        op(torch.zeros(tokens, 2, 64), torch.zeros(tokens, 2, 64), v, None, None, 1e-5, cos_sin, positions, *rest)
    block, slot = slots // 16, slots % 16
    for mine, theirs in ((cache.keys, twin.keys), (cache.values, twin.values)):
        assert same_numbers(mine[0][block, slot], theirs[0][block, slot])
    for mine, theirs in ((cache.key_scales, twin.key_scales), (cache.value_scales, twin.value_scales)):
        if mine[0] is not None and theirs[0] is not None:
            assert same_numbers(mine[0][block, :, slot], theirs[0][block, :, slot])
    if kv_dtype == "fp8":  # the twin itself, by the format's definition
        finite = v[~v.isnan()].clamp(-448, 448)
        got = cache.values[0][block, slot].float()[~v.isnan()]
        step = torch.maximum(2.0 ** (finite.abs().double().log2().floor().clamp(min=-6) - 3), torch.tensor(2.0**-9))
        assert ((got - finite).abs() <= step / 2).all()
        assert got.abs().max() == 448


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_a_value_alone_is_read_exactly(kv_dtype: str) -> None:
    """One key has a weight of 1: attention gives back what the cache holds, whatever its code is.

    Integers are over the row's largest, so they lose 2^-13 of that; a NaN is all of its row.
    """
    codes = torch.arange(65536 if kv_dtype == "bf16" else 256)
    if kv_dtype == "bf16":
        codes = codes[((codes & 0x7F80) != 0) & ((codes & 0x7F80) < 0x7F00)]  # normal, and no overflow of sums
    codes = torch.cat([codes, codes[: -len(codes) % 128]]).view(-1, 2, 64)
    dtype, requests = TORCH_DTYPE[kv_dtype], len(codes)
    cache = KVCache.allocate(1, requests, 16, 2, 64, kv_dtype)
    stored = codes.to(torch.int16 if kv_dtype == "bf16" else torch.uint8).view(dtype)
    cache.keys[0][:, 0], cache.values[0][:, 0] = torch.zeros(requests, 2, 64).to(dtype), stored
    want = stored.float()
    if kv_dtype == "int8":
        scales = 2.0 ** torch.randint(-8, 8, (requests, 2))
        for scale in (*cache.key_scales, *cache.value_scales):
            assert scale is not None
            scale[:, :, 0] = scales
        want = want * scales[:, :, None]
    out = kernels.paged_attention(
        random(requests, 2, 64),
        cache.keys[0],
        cache.values[0],
        torch.arange(requests, dtype=torch.int32)[:, None],
        torch.arange(requests + 1, dtype=torch.int32),
        torch.ones(requests, dtype=torch.int32),
        0.125,
        cache.key_scales[0],
        cache.value_scales[0],
    )
    if cpu.available and cpu._cpu.attention_operands() == "int16":
        largest = want.abs().amax(-1, keepdim=True)
        lost = torch.where(largest > 2e-31, 1.001 * 2**-13 * largest, 2e-31)  # smaller rows are taken for zeros
        assert ((out - want).abs() <= lost).logical_or(out.isnan() & largest.isnan()).all()
    else:
        assert ((out == want) | (out.isnan() & want.isnan())).all()


@pytest.mark.parametrize("kv_dtype", NARROW)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(96, 8, 128, 64), (9, 3, 64, 64), (4, 2, 24, 8)]
)
def test_keys_are_rotated_before_they_are_rounded(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, kv_dtype: str
) -> None:
    inputs, rest = rope_case(61, heads, kv_heads, head_dim, rotary_dim, norms=True)
    cache, twin = (KVCache.allocate(1, 5, 16, kv_heads, head_dim, kv_dtype) for _ in range(2))
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    scales = {"k_scales": cache.key_scales[0], "v_scales": cache.value_scales[0]}
    kernels.rope_store_(*inputs, **{**rest, "k_cache": cache.keys[0], "v_cache": cache.values[0]}, **scales)
    _, k, v = inputs  # k as rotated
    slots = rest["slot_mapping"]
    reference.kv_write(k, v, twin.keys[0], twin.values[0], slots, twin.key_scales[0], twin.value_scales[0])
    block, slot = slots // 16, slots % 16
    other = torch.ones(5, 16, dtype=torch.bool)
    other[block, slot] = False
    for mine, theirs, old in zip((*cache.keys, *cache.values), (*twin.keys, *twin.values), before, strict=True):
        assert same_numbers(mine[block, slot], theirs[block, slot])
        assert same_numbers(mine[other], old[other])
    if kv_dtype == "int8":
        assert mine.abs().amax() == 127


@pytest.mark.parametrize(
    "changed",
    [
        {"k_cache": torch.zeros(5, 16, 2, 16, dtype=torch.bfloat16)},
        {"k_scales": torch.zeros(5, 2, 16)},
        {name: torch.zeros(5, 16, 2, 16, dtype=torch.int8) for name in ("k_cache", "v_cache")},
        {name: torch.zeros(5, 16, 2, 16, dtype=torch.float16) for name in ("k_cache", "v_cache")},
    ],
)
def test_caches_that_do_not_fit_are_refused(changed: dict[str, Any]) -> None:
    inputs, rest = rope_case(4, 4, 2, 16, 8, norms=False)
    with pytest.raises(ValueError, match=r"wanted|belong"):
        kernels.rope_store_(*inputs, **{**rest, **changed})
