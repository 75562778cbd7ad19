"""Routed experts of which only some are in memory at a time: what ``experts_ffn`` computes, in parts.

``rows`` computes the experts that are at hand, in any order and any grouping; ``weigh`` adds them up in the order in
which ``experts_ffn`` does. The result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.linear import check_rows, check_tensor
from glmlocal.kernels.cpu.packing import PackedWeight, bind_record, record_buffer, table_of


@dataclass(frozen=True, slots=True, eq=False)
class SlotExperts:
    """The experts of one layer as records in slots: each has gate, up and down at the same places."""

    native: _cpu.SlotExperts

    @property
    def row_floats(self) -> int:
        """Of a row of results: hidden_size, padded as the kernels want it."""
        return self.native.row_floats

    def rows(self, x: Tensor, topk_ids: Tensor, experts: Sequence[int], addresses: Sequence[int], out: Tensor) -> None:
        """Fill the rows of ``out`` fp32 [tokens · top_k, row_floats] whose expert is one of ``experts``.

        ``addresses`` are those of their records, a multiple of 64, whose memory the caller keeps as it is until this
        returns. x fp32 [tokens, hidden], topk_ids int32 [tokens, top_k]. ValueError, or IndexError for a bad id.
        """
        check_rows("rows: x", x, self.native.hidden_size)
        num_tokens, top_k = topk_ids.shape
        check_tensor("rows: topk_ids", topk_ids, torch.int32, (x.shape[0], top_k))
        check_tensor("rows: out", out, torch.float32, (num_tokens * top_k, self.row_floats))
        self.native.rows(
            x.data_ptr(), num_tokens, topk_ids.data_ptr(), top_k, list(experts), list(addresses), out.data_ptr()
        )

    def weigh(self, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """All rows are filled: their weighted sum, fp32 [tokens, hidden]."""
        num_tokens, top_k = topk_ids.shape
        check_tensor("weigh: topk_ids", topk_ids, torch.int32, (num_tokens, top_k))
        check_tensor("weigh: topk_weights", topk_weights, torch.float32, (num_tokens, top_k))
        check_tensor("weigh: rows", rows, torch.float32, (num_tokens * top_k, self.row_floats))
        out = torch.empty((num_tokens, self.native.hidden_size))
        self.native.weigh(
            rows.data_ptr(), num_tokens, topk_ids.data_ptr(), topk_weights.data_ptr(), top_k, out.data_ptr()
        )
        return out


def bind_layout(layout: ExpertLayout, num_experts: int, activations: Activations) -> SlotExperts:
    """Experts whose records are those of an expert pack. ValueError for a layout that these kernels do not have."""
    form = bind_record(layout, record_buffer(layout.record_bytes), activations)  # the form alone counts
    offsets = (layout.gate.offset, layout.up.offset, layout.down.offset)
    return bind_slots(form, offsets, num_experts, layout.record_bytes)


def bind_slots(
    matrices: tuple[PackedWeight, PackedWeight, PackedWeight],
    offsets: tuple[int, int, int],
    num_experts: int,
    record_bytes: int,
) -> SlotExperts:
    """Experts of the form of one (gate, up, down), which lie ``offsets`` bytes into every record of ``record_bytes``.

    Only the form of ``matrices`` is used. ValueError for what does not belong together.
    """
    parts = []
    for weight, offset in zip(matrices, offsets, strict=True):
        zero_point, values = table_of(weight.scheme)
        parts.append(
            _cpu.RecordMatrix(weight.layout, weight.format, offset, zero_point, values, weight.int8_activations)
        )
    gate, up, down = parts
    return SlotExperts(_cpu.SlotExperts(gate, up, down, num_experts, record_bytes))
