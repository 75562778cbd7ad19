"""Experts in slots: in whatever parts and order they are computed, the bits are those of experts_ffn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.kernels import cpu
from quantized import random_matrix

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.linear import PackedExperts, bind_experts
from glmlocal.kernels.cpu.packing import pack
from glmlocal.kernels.cpu.slots import SlotExperts, bind_slots

SHAPES = [
    (576, 192, 16, "Q8_0", "Q8_0", "int8"),
    (64, 96, 5, "Q4_0", "Q5_0", "fp32"),
    (96, 80, 6, "Q8_0", "bf16", "int8"),
    (33, 17, 4, "f32", "f16", "int8"),
    (256, 256, 4, "Q4_K", "Q6_K", "int8"),
]


class Layer:
    """Random experts: packed, and as records in slots that lie in no order."""

    def __init__(self, hidden: int, width: int, num_experts: int, kind: str, down_kind: str, activations: str) -> None:
        self.hidden, self.num_experts = hidden, num_experts
        groups = [
            [
                pack(random_matrix(what, *shape, 3 * e + part), activations)  # type: ignore[arg-type]
                for e in range(num_experts)
            ]
            for part, (what, shape) in enumerate(
                [(kind, (width, hidden)), (kind, (width, hidden)), (down_kind, (hidden, width))]
            )
        ]
        self.packed: PackedExperts = bind_experts(*map(tuple, groups))
        sizes = [group[0].nbytes for group in groups]
        self.offsets = (0, sizes[0], sizes[0] + sizes[1])
        self.record_bytes = -(-sum(sizes) // 4096) * 4096
        self.memory = _cpu.allocate(self.record_bytes * num_experts)
        self.slot_of = random.Random(1).sample(range(num_experts), num_experts)
        for e in range(num_experts):
            for group, offset in zip(groups, self.offsets, strict=True):
                begin = self.slot_of[e] * self.record_bytes + offset
                self.memory[begin : begin + group[e].nbytes] = group[e].buffer
        form = tuple(group[0] for group in groups)
        self.slots: SlotExperts = bind_slots(form, self.offsets, num_experts, self.record_bytes)  # type: ignore[arg-type]

    def address(self, expert: int) -> int:
        return int(self.memory.ctypes.data) + self.slot_of[expert] * self.record_bytes

    def inputs(self, tokens: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, self.hidden, generator=generator) * self.hidden**-0.5
        ids = torch.stack([torch.randperm(self.num_experts, generator=generator)[:top_k] for _ in range(tokens)])
        return x, ids.int(), torch.rand(tokens, top_k, generator=generator) + 0.1

    def in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, parts: list[list[int]]) -> Tensor:
        rows = torch.full((ids.numel(), self.slots.row_floats), float("nan"))
        for experts in parts:
            self.slots.rows(x, ids, experts, [self.address(e) for e in experts], rows)
        return self.slots.weigh(rows, ids, weights)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_parts_in_any_order_give_the_bits_of_experts_ffn(shape: tuple, tokens: int) -> None:
    layer = Layer(*shape)
    x, ids, weights = layer.inputs(tokens, 3)
    wanted = kernels.experts_ffn(x, ids, weights, layer.packed)
    everyone = list(range(layer.num_experts))
    assert torch.equal(layer.in_parts(x, ids, weights, [everyone]), wanted)
    assert torch.equal(layer.in_parts(x, ids, weights, [[e] for e in reversed(everyone)]), wanted)
    shuffled = random.Random(tokens).sample(everyone, len(everyone))
    assert torch.equal(layer.in_parts(x, ids, weights, [shuffled[2:], shuffled[:2]]), wanted)


def test_rows_of_experts_that_are_not_there_are_left_alone() -> None:
    layer = Layer(*SHAPES[1])
    x, ids, _ = layer.inputs(6, 3)
    rows = torch.full((ids.numel(), layer.slots.row_floats), -7.0)
    layer.slots.rows(x, ids, [2], [layer.address(2)], rows)
    mine = ids.flatten() == 2
    assert mine.any()
    assert not (rows[mine] == -7.0).all(dim=1).any()
    assert (rows[~mine] == -7.0).all()


def test_bad_arguments_are_refused() -> None:
    layer = Layer(*SHAPES[1])
    x, ids, weights = layer.inputs(2, 3)
    rows = torch.empty((6, layer.slots.row_floats))
    with pytest.raises(IndexError, match="no expert 5"):
        layer.slots.rows(x, ids, [5], [layer.address(0)], rows)
    with pytest.raises(IndexError, match="expert 9 of token 1"):
        layer.slots.rows(x, torch.tensor([[0, 1, 2], [0, 9, 1]], dtype=torch.int32), [0], [layer.address(0)], rows)
    with pytest.raises(ValueError, match="multiple of 64"):
        layer.slots.rows(x, ids, [0], [layer.address(0) + 32], rows)
    with pytest.raises(ValueError, match="an address for each"):
        layer.slots.rows(x, ids, [0, 1], [layer.address(0)], rows)
    with pytest.raises(ValueError, match="rows: out wanted"):
        layer.slots.rows(x, ids, [0], [layer.address(0)], rows[:5])
    with pytest.raises(ValueError, match="weigh: topk_weights"):
        layer.slots.weigh(rows, ids, weights.double())
    form = (layer.packed.gate[0], layer.packed.up[0], layer.packed.down[0])
    with pytest.raises(ValueError, match="do not fit in a record"):
        bind_slots(form, layer.offsets, 5, layer.record_bytes - 4096)
    with pytest.raises(ValueError, match="multiple of 64"):
        bind_slots(form, (1, *layer.offsets[1:]), 5, layer.record_bytes)
    with pytest.raises(ValueError, match="gate's shape"):
        bind_slots((form[0], form[1], form[1]), layer.offsets, 5, layer.record_bytes)


def test_memory_is_read_anew_at_every_call() -> None:
    """A slot holds another expert after an eviction: nothing of the old one may have been kept."""
    layer = Layer(*SHAPES[0])
    x, ids, weights = layer.inputs(4, 3)
    before = layer.in_parts(x, ids, weights, [list(range(layer.num_experts))])
    first, second = (layer.memory[layer.slot_of[e] * layer.record_bytes :][: layer.record_bytes] for e in (0, 1))
    kept = np.array(first)
    first[:], second[:] = np.array(second), kept
    layer.slot_of[0], layer.slot_of[1] = layer.slot_of[1], layer.slot_of[0]
    assert torch.equal(layer.in_parts(x, ids, weights, [list(range(layer.num_experts))]), before)
