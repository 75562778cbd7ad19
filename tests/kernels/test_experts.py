"""swiglu_ffn and experts_ffn: right within fp32 rounding, and a token's result is its own in any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glmlocal import kernels
from glmlocal.kernels import cpu, reference
from quantized import random_matrix, widened

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu

# (hidden, intermediate, experts, kind of gate and up, kind of down): the demo's shape, ragged ones, mixed schemes.
SHAPES: list[tuple[int, int, int, str, str, reference.Activations]] = [
    (576, 192, 16, "Q8_0", "Q8_0", "int8"),
    (64, 96, 5, "Q4_0", "Q5_0", "fp32"),
    (64, 96, 5, "Q4_0", "Q5_0", "int8"),
    (96, 32, 3, "f32", "bf16", "int8"),
    (64, 80, 3, "Q8_0", "bf16", "int8"),
    (96, 144, 3, "bf16", "Q4_1", "int8"),
    (256, 256, 4, "Q4_K", "Q6_K", "fp32"),
    (256, 256, 4, "Q4_K", "Q6_K", "int8"),
    (33, 17, 3, "f32", "f16", "int8"),
    (7, 1, 2, "bf16", "f32", "int8"),
]


class Layer:
    """Random experts, packed and in float64."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        kind: str,
        down_kind: str,
        activations: reference.Activations = "int8",
    ) -> None:
        self.hidden, self.num_experts = hidden, num_experts
        gate = [random_matrix(kind, intermediate, hidden, 3 * e) for e in range(num_experts)]
        up = [random_matrix(kind, intermediate, hidden, 3 * e + 1) for e in range(num_experts)]
        down = [random_matrix(down_kind, hidden, intermediate, 3 * e + 2) for e in range(num_experts)]
        self.packed = kernels.pack_experts(gate, up, down, activations)
        self.gate, self.up, self.down = ([widened(m).double() for m in group] for group in (gate, up, down))
        self.scale = hidden**-0.5  # keeps gate's outputs around 1, where silu bends

    def inputs(self, tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.hidden, generator=generator) * self.scale
        ids = torch.stack([torch.randperm(self.num_experts, generator=generator)[:top_k] for _ in range(tokens)] or [])
        return x, ids.int(), torch.rand(tokens, top_k, generator=generator) + 0.1

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The result in float64, how far fp32 rounding may take it from there, and how far two steps of the hidden
        values' 8 bits may, which tip over where they lie within fp32 rounding of a half."""
        wanted = torch.zeros(x.shape, dtype=torch.float64)
        size, step = torch.zeros_like(wanted), torch.zeros_like(wanted)
        int8_in, int8_hidden = self.packed.gate[0].int8_activations, self.packed.down[0].int8_activations
        seen = reference.int8_rounded(x) if int8_in else x
        for t, row in enumerate(seen.double()):
            for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                h = F.silu(self.gate[e] @ row) * (self.up[e] @ row)
                bound = (self.gate[e].abs() @ row.abs() + 1) * (self.up[e].abs() @ row.abs())
                if int8_hidden:
                    h = reference.int8_rounded(h.float()[None])[0].double()
                    step[t] += weight * 2 * self.down[e].abs().amax(1) * h.abs().max() / 127
                wanted[t] += weight * (self.down[e] @ h)
                size[t] += weight * (self.down[e].abs() @ bound)
        return wanted, 2.0**-24 * 16 * self.hidden**0.5 * size, step

    def assert_right(self, out: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        wanted, tolerance, step = self.expected(x, ids, weights)
        error = (out.double() - wanted).abs()
        assert bool((error <= tolerance + step).all())
        assert float((error <= tolerance).all(1).double().mean()) >= 0.6  # tokens of which no hidden value tipped over


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(*request.param)


def test_experts_are_right_and_tokens_do_not_meet(isa: str, layer: Layer) -> None:
    top_k = min(3, layer.num_experts)
    x, ids, weights = layer.inputs(23, top_k)
    out = kernels.experts_ffn(x, ids, weights, layer.packed)
    layer.assert_right(out, x, ids, weights)
    for t in range(23):
        assert torch.equal(
            kernels.experts_ffn(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], layer.packed)[0], out[t]
        )
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    shuffled = kernels.experts_ffn(x[order], ids[order], weights[order], layer.packed)
    assert torch.equal(shuffled, out[order])


def test_the_order_of_a_tokens_experts_does_not_matter(isa: str, layer: Layer) -> None:
    top_k = min(3, layer.num_experts)
    x, ids, weights = layer.inputs(4, top_k)
    out = kernels.experts_ffn(x, ids, weights, layer.packed)
    assert torch.equal(
        kernels.experts_ffn(x, ids.flip(1).contiguous(), weights.flip(1).contiguous(), layer.packed), out
    )


@pytest.mark.parametrize("tokens", [1, 23])
def test_nothing_left_over_in_scratch_is_read(isa: str, layer: Layer, tokens: int) -> None:
    x, ids, weights = layer.inputs(tokens, 2)
    out = kernels.experts_ffn(x, ids, weights, layer.packed)
    _cpu.poison_scratch()
    assert torch.equal(kernels.experts_ffn(x, ids, weights, layer.packed), out)


@pytest.mark.parametrize("tokens", [1, 2, 9, 300])
def test_swiglu_is_one_expert_with_weight_one(isa: str, layer: Layer, tokens: int) -> None:
    x, _, _ = layer.inputs(tokens, 1)
    gate, up, down = (group[1] for group in (layer.packed.gate, layer.packed.up, layer.packed.down))
    y = kernels.swiglu_ffn(x, gate, up, down)
    ids, weights = torch.full((tokens, 1), 1, dtype=torch.int32), torch.ones(tokens, 1)
    assert torch.equal(kernels.experts_ffn(x, ids, weights, layer.packed), y)
    layer.assert_right(y[:9], x[:9], ids[:9], weights[:9])


def test_the_same_bits_for_any_number_of_threads(isa: str, threads: Callable[[int], None]) -> None:
    layer = Layer(256, 192, 6, "Q4_0", "Q8_0")
    x, ids, weights = layer.inputs(500, 4)
    threads(1)
    out = kernels.experts_ffn(x, ids, weights, layer.packed)
    for count in (2, 3):
        threads(count)
        assert torch.equal(kernels.experts_ffn(x, ids, weights, layer.packed), out)
        assert torch.equal(kernels.experts_ffn(x[:1], ids[:1], weights[:1], layer.packed), out[:1])


def test_one_expert_for_every_token_and_a_repeated_expert(isa: str) -> None:
    layer = Layer(64, 64, 4, "Q4_0", "Q4_0")
    x, _, weights = layer.inputs(30, 2)
    ids = torch.full((30, 2), 3, dtype=torch.int32)
    layer.assert_right(kernels.experts_ffn(x, ids, weights, layer.packed), x, ids, weights)


def test_no_tokens_and_no_experts_per_token(isa: str) -> None:
    layer = Layer(64, 64, 2, "Q4_0", "Q4_0")
    none = torch.zeros(0, 64)
    assert kernels.experts_ffn(none, torch.zeros(0, 2).int(), torch.zeros(0, 2), layer.packed).shape == (0, 64)
    assert kernels.swiglu_ffn(none, layer.packed.gate[0], layer.packed.up[0], layer.packed.down[0]).shape == (0, 64)
    x = torch.randn(3, 64)
    assert torch.equal(
        kernels.experts_ffn(x, torch.zeros(3, 0).int(), torch.zeros(3, 0), layer.packed), torch.zeros(3, 64)
    )


@pytest.mark.parametrize("large", [50.0, 1e4, 1e20])
def test_silu_saturates_without_nan(isa: str, large: float) -> None:
    identity = torch.eye(32)
    x = torch.linspace(-large, large, 32).view(1, 32)
    gate, up, down = (kernels.pack(m) for m in (identity, torch.ones(32, 32) / (32 * large), identity))
    y = kernels.swiglu_ffn(x, gate, up, down)
    up_value = kernels.linear(x, up)
    torch.testing.assert_close(y, F.silu(x) * up_value, rtol=1e-5, atol=0)


def test_bad_arguments_are_refused() -> None:
    layer = Layer(64, 96, 3, "Q4_0", "Q4_0")
    x, ids, weights = layer.inputs(5, 2)
    for expert in (-1, 3, 1 << 30):
        wrong = ids.clone()
        wrong[4, 1] = expert
        with pytest.raises(IndexError, match=f"expert {expert} of token 4, but there are 3"):
            kernels.experts_ffn(x, wrong, weights, layer.packed)
    with pytest.raises(ValueError, match="topk_ids wanted"):
        kernels.experts_ffn(x, ids.long(), weights, layer.packed)
    with pytest.raises(ValueError, match="topk_ids wanted"):
        kernels.experts_ffn(x, ids[:4], weights, layer.packed)
    with pytest.raises(ValueError, match="topk_weights wanted"):
        kernels.experts_ffn(x, ids, weights[:, :1], layer.packed)
    with pytest.raises(ValueError, match="experts_ffn: x wanted"):
        kernels.experts_ffn(x[:, :63], ids, weights, layer.packed)
    with pytest.raises(ValueError, match="swiglu_ffn"):
        kernels.swiglu_ffn(x, layer.packed.gate[0], layer.packed.up[0], layer.packed.up[0])
    group = [torch.zeros(96, 64)] * 2
    with pytest.raises(ValueError, match="expert 1: down is"):
        kernels.pack_experts(group, group, [torch.zeros(64, 96), torch.zeros(64, 95)])
    with pytest.raises(ValueError, match="as many gate as up as down"):
        kernels.pack_experts(group, group, [torch.zeros(64, 96)])
