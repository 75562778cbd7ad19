"""A layer in three native calls: the bits of the single ops, for every kind of layer, cache and batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.kernels import blocks, cpu, reference
from quantized import random_matrix

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import ops

HIDDEN, HEADS, KV_HEADS, EXPERTS, MAX_POSITIONS, BLOCK_SIZE = 96, 6, 2, 8, 64, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# (weights, head_dim, biases, head norms, router as (top_k, n_group, topk_group, normalised), cache)
LAYERS: list[tuple[str, int, bool, bool, tuple[int, int, int, bool] | None, str]] = [
    ("f32", 16, False, False, None, "fp32"),
    ("bf16", 24, True, True, (3, 1, 1, True), "bf16"),
    ("Q4_0", 32, True, False, (2, 4, 2, False), "int8"),
    ("Q8_0", 16, False, True, (4, 2, 1, True), "fp8"),
    ("f32", 20, True, True, (3, 1, 1, True), "fp32"),  # a head_dim without native attention
]


class Layer:
    """Random weights of one attention block, for the native kernels and for the reference."""

    def __init__(
        self,
        kind: str,
        head_dim: int,
        biases: bool,
        head_norms: bool,
        router: tuple[int, int, int, bool] | None,
        cache: str,
    ) -> None:
        generator = torch.Generator().manual_seed(head_dim)

        def vector(size: int) -> Tensor:
            return torch.rand(size, generator=generator) + 0.5

        def weights(pack: Any) -> dict[str, Any]:
            shapes = {
                "q_proj": (HEADS * head_dim, HIDDEN),
                "k_proj": (KV_HEADS * head_dim, HIDDEN),
                "v_proj": (KV_HEADS * head_dim, HIDDEN),
                "o_proj": (HIDDEN, HEADS * head_dim),
            }
            return {n: pack(random_matrix(kind, *shape, i)) for i, (n, shape) in enumerate(shapes.items())}

        self.head_dim, self.cache_dtype = head_dim, DTYPES[cache]
        angles = torch.rand(MAX_POSITIONS, head_dim // 4, generator=generator) * 6
        vectors: dict[str, Any] = {
            "input_layernorm": vector(HIDDEN),
            "post_attention_layernorm": vector(HIDDEN),
            "q_bias": vector(HEADS * head_dim) if biases else None,
            "k_bias": vector(KV_HEADS * head_dim) if biases else None,
            "v_bias": vector(KV_HEADS * head_dim) if biases else None,
            "q_norm": vector(head_dim) if head_norms else None,
            "k_norm": vector(head_dim) if head_norms else None,
            "rms_norm_eps": 1e-5,
            "head_dim": head_dim,
            "cos_sin": torch.cat((angles.cos(), angles.sin()), -1),
        }
        gate, correction = torch.randn(EXPERTS, HIDDEN, generator=generator), vector(EXPERTS)

        def block(pack: Any) -> Any:
            made = router and kernels.Router(pack(gate), correction, *router, 2.5)
            return kernels.AttentionBlock(**vectors, **weights(pack), router=made)

        self.native, self.plain = block(kernels.pack), block(reference.pack)

    def cache(self) -> kernels.LayerCache:
        def empty() -> Tensor:
            shape = (8, KV_HEADS, BLOCK_SIZE, self.head_dim)
            return torch.full(shape, float("nan")).to(self.cache_dtype).transpose(1, 2)

        if self.cache_dtype is not torch.int8:
            return kernels.LayerCache(empty(), empty(), None, None)
        scales = [torch.full((8, KV_HEADS, BLOCK_SIZE), float("nan")) for _ in range(2)]
        return kernels.LayerCache(empty(), empty(), *scales)


def step(*spans: tuple[int, int, list[int]]) -> kernels.StepIndex:
    """Requests as (cached tokens before, new tokens, blocks)."""
    positions = [list(range(before, before + new)) for before, new, _ in spans]
    slots = [
        [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in own]
        for own, (_, _, blocks) in zip(positions, spans, strict=True)
    ]
    starts = [0]
    for own in positions:
        starts.append(starts[-1] + len(own))
    return kernels.StepIndex(
        torch.tensor([p for own in positions for p in own]),
        torch.tensor([slot for own in slots for slot in own]),
        torch.tensor([blocks for _, _, blocks in spans], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([before + new for before, new, _ in spans], dtype=torch.int32),
    )


STEPS = [step((0, 19, [5, 2])), step((19, 1, [5, 2]), (0, 4, [1, 7])), step((20, 3, [5, 2]), (4, 1, [1, 7]))]


@pytest.fixture(params=LAYERS, ids=lambda layer: "-".join(map(str, layer)))
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(*request.param)


def outputs(out: kernels.BlockOutput) -> list[Tensor]:
    return [t for t in (out.residual, out.hidden, out.topk_ids, out.topk_weights) if t is not None]


def test_the_block_has_the_bits_of_its_ops_and_the_numbers_of_the_reference(isa: str, layer: Layer) -> None:
    fused, single, plain = layer.cache(), layer.cache(), layer.cache()
    bound, bound_cache = kernels.bind_attention(layer.native), kernels.bind_cache(fused)
    generator = torch.Generator().manual_seed(1)
    for index in STEPS:
        x = torch.randn(len(index.positions), HIDDEN, generator=generator)
        before = x.clone()
        found = kernels.attention_block(bound, x, kernels.bind_step(index), bound_cache)
        wanted = blocks.attention_block(ops, layer.native, x, index, single)
        assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(wanted), strict=True))
        assert torch.equal(x, before)
        close = reference.attention_block(layer.plain, x, index, plain)
        tolerance = 1e-4 if layer.cache_dtype is torch.float32 else 0.05
        error = (found.residual - close.residual).abs().max() / close.residual.abs().max()
        assert error < tolerance
        torch.testing.assert_close(found.hidden, close.hidden, rtol=0, atol=float(close.hidden.abs().max()) * tolerance)
        assert (found.topk_ids is None) == (layer.native.router is None)


def test_a_token_is_the_same_alone_and_among_others(isa: str, layer: Layer) -> None:
    together, alone = kernels.bind_cache(layer.cache()), kernels.bind_cache(layer.cache())
    bound = kernels.bind_attention(layer.native)
    if bound.native is None:
        pytest.skip("attention in plain torch rounds as the batch has it")
    x = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(2))
    all_at_once = outputs(kernels.attention_block(bound, x, kernels.bind_step(step((0, 11, [3]))), together))
    for t in range(11):
        one = kernels.attention_block(bound, x[t : t + 1], kernels.bind_step(step((t, 1, [3]))), alone)
        assert all(torch.equal(a[0], b[t]) for a, b in zip(outputs(one), all_at_once, strict=True))


@pytest.mark.parametrize("kind", ["f32", "Q4_0"])
@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_combine_adds_in_the_order_of_the_ops(isa: str, kind: str, rows: int) -> None:
    gate, up = (kernels.pack(random_matrix(kind, 160, HIDDEN, i)) for i in range(2))
    ffn = (gate, up, kernels.pack(random_matrix(kind, HIDDEN, 160, 2)))
    generator = torch.Generator().manual_seed(rows)
    residual, hidden, routed = (torch.randn(rows, HIDDEN, generator=generator) for _ in range(3))
    for args in ((routed, ffn), (None, ffn), (routed, None)):
        found = kernels.combine(residual, hidden, *args)
        assert torch.equal(found, blocks.combine(ops, residual, hidden, *args))


def test_what_does_not_belong_together_is_refused() -> None:
    layer = Layer(*LAYERS[1])
    good = layer.native
    for change, message in (
        ({"v_proj": good.q_proj}, r"v_proj wanted \[48, 96\], found \[144, 96\]"),
        ({"o_proj": good.q_proj}, r"o_proj wanted \[96, 144\]"),
        ({"q_norm": torch.ones(23)}, "q_norm wanted"),
        ({"input_layernorm": torch.ones(96).double()}, "input_layernorm wanted"),
        ({"head_dim": 96}, "q_norm wanted"),
        ({"cos_sin": torch.ones(64, 26)}, "cos_sin has 26 columns, wanted an even number up to 24"),
        ({"router": replace(good.router, n_group=3)}, "cannot choose 3 of 8 experts in 1 of 3 groups"),
        ({"router": replace(good.router, e_score_correction_bias=torch.ones(7))}, "e_score_correction_bias wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.bind_attention(replace(good, **change))


def test_bad_steps_and_caches_are_refused() -> None:
    layer = Layer(*LAYERS[1])
    bound, cache = kernels.bind_attention(layer.native), kernels.bind_cache(layer.cache())
    x = torch.randn(3, HIDDEN)
    good = step((0, 3, [1]))
    bound_step, short = kernels.bind_step(good), replace(good, positions=good.positions.int())
    with pytest.raises(ValueError, match=r"attention_block: x wanted .* \[3, 96\]"):
        kernels.attention_block(bound, x[:2], bound_step, cache)
    with pytest.raises(ValueError, match="positions wanted"):
        kernels.bind_step(short)
    for change, error, message in (
        ({"positions": torch.tensor([0, 1, 64])}, IndexError, "token 2 has position 64"),
        ({"slot_mapping": torch.tensor([16, 128, 18])}, IndexError, "token 1 has position 1 and slot 128"),
        ({"block_tables": torch.tensor([[9]], dtype=torch.int32)}, ValueError, "block"),
    ):
        bad = kernels.bind_step(replace(good, **change))
        with pytest.raises(error, match=message):
            kernels.attention_block(bound, x, bad, cache)
    other = kernels.bind_cache(Layer(*LAYERS[2]).cache())
    with pytest.raises(ValueError, match="cache of 2 heads of 32, wanted 2 of 24"):
        kernels.attention_block(bound, x, bound_step, other)
    flat = kernels.LayerCache(torch.zeros(3), torch.zeros(3), None, None)
    with pytest.raises(ValueError, match="cache wanted"):
        kernels.bind_cache(flat)
