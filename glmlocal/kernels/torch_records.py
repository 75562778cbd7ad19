"""Experts in an expert pack's records, by torch alone and on any of its devices.

The truth about records on GPUs, and what runs there where ``triton_experts`` has no kernels: weights are widened to
fp32 in full, then multiplied. Activations are rounded as the CPU's are (``reference.int8_rounded``), so that where an
expert is does not show beyond the rounding of fp32 sums; bf16 products would be faster and would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glmlocal.formats.expert_pack_layout import ExpertLayout, MatrixLayout
from glmlocal.formats.packed_size import BLOCK_COLUMNS, TILE_ROWS, Section
from glmlocal.formats.quant import E4M3_VALUES
from glmlocal.formats.schemes import Activations, QuantScheme
from glmlocal.kernels.reference import int8_rounded, takes_int8

_PANEL_TILES = 4
_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # low bits first
_DENSE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_E4M3_UNIT = 2.0**120  # scales of e4m3 are stored times this


def unpack(layout: MatrixLayout, record: Tensor) -> Tensor:
    """A matrix of a record, uint8 [record_bytes], as its kernels see it: fp32 [out, in] on the record's device."""
    (rows, columns), sections = layout.shape, layout.sections
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    data = record[layout.offset : layout.offset + layout.nbytes]
    scheme = layout.scheme
    if scheme is None:
        return _dense(data, layout.kind, tiles, blocks)[:rows, :columns].float()

    def groups(section: Section | None, size: int, dtype: torch.dtype) -> Tensor | None:
        """[rows, columns / size] as stored."""
        if section is None:
            return None
        units = -(-blocks * BLOCK_COLUMNS // size)
        flat = data[section.offset : section.offset + section.nbytes].view(dtype)
        found = _tiles(flat, tiles, units, TILE_ROWS).transpose(1, 2).reshape(tiles * TILE_ROWS, units)
        return found[:rows, : -(-columns // size)]

    codes = _codes(data[: sections.codes.nbytes], scheme.bits, tiles, blocks)[:rows, :columns]
    floats = _DENSE[scheme.scale_type]
    scale = groups(sections.scales, scheme.super_size, floats)
    sub_scale = groups(sections.sub_scales, scheme.group_size, torch.int8)
    sub_min = groups(sections.sub_mins, scheme.group_size, torch.uint8)
    low = groups(sections.mins, scheme.super_size if sub_min is not None else scheme.group_size, floats)
    assert scale is not None
    return _dequantize(scheme, codes, scale.float(), low, sub_scale, sub_min)


def _dequantize(
    scheme: QuantScheme,
    codes: Tensor,
    scale: Tensor,
    low: Tensor | None,
    sub_scale: Tensor | None,
    sub_min: Tensor | None,
) -> Tensor:
    """As ``QuantizedMatrix.dequantize``."""
    columns, per_super = codes.shape[1], scheme.super_size // scheme.group_size

    def per_group(supers: Tensor, like: Tensor) -> Tensor:
        return supers.repeat_interleave(per_super, 1)[:, : like.shape[1]] if per_super > 1 else supers

    def per_weight(values: Tensor) -> Tensor:
        if scheme.group_size >= columns:
            return values.expand(-1, columns)
        return values.repeat_interleave(scheme.group_size, 1)[:, :columns]

    if scheme.code_type == "e4m3":
        out = torch.from_numpy(E4M3_VALUES).to(codes.device)[codes.int()]
        scale = scale / _E4M3_UNIT
    elif scheme.codebook is not None:
        out = torch.tensor(scheme.codebook, dtype=torch.float32, device=codes.device)[codes.int()]
    else:
        out = codes.float() - scheme.zero_point
    if scheme.offset_codec == "zero_point":
        assert sub_min is not None
        out = out - per_weight(sub_min.float())
    if sub_scale is not None:
        scale = per_group(scale, sub_scale) * sub_scale.float()
    out = out * per_weight(scale)
    if scheme.offset_codec in ("min", "two_level_min"):
        assert low is not None
        offset = low.float() if sub_min is None else -(per_group(low.float(), sub_min) * sub_min.float())
        out = out + per_weight(offset)
    return out


def _tiles(flat: Tensor, tiles: int, units: int, *line: int) -> Tensor:
    """A section as [tiles, units, …]; it is stored in panels of four tiles that lie side by side in each unit."""
    whole = tiles - tiles % _PANEL_TILES
    line_size = 1
    for size in line:
        line_size *= size
    split, end = whole * units * line_size, tiles * units * line_size
    panels = flat[:split].view(whole // _PANEL_TILES, units, _PANEL_TILES, *line).transpose(1, 2)
    rest = flat[split:end].view(units, tiles - whole, *line).transpose(0, 1)
    return torch.cat([panels.reshape(whole, units, *line), rest])


def _codes(flat: Tensor, bits: int, tiles: int, blocks: int) -> Tensor:
    """uint8 [padded rows, padded columns] of a section of codes: a word holds four columns, one in each byte."""
    lines = _tiles(flat, tiles, blocks, bits, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)  # [tile, row, block, line, byte]
    quads = lines.new_zeros(tiles, TILE_ROWS, blocks, BLOCK_COLUMNS // 4, 4)
    line = shift = 0
    for plane in _PLANES[bits]:
        together, mask = 8 // plane, (1 << plane) - 1  # quads that share a line
        for i in range(together):
            quads[..., i::together, :] |= (lines[..., line : line + plane, :] >> (i * plane) & mask) << shift
        line, shift = line + plane, shift + plane
    return quads.reshape(tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)


def _dense(flat: Tensor, kind: str, tiles: int, blocks: int) -> Tensor:
    per_line = 2 if kind == "bf16" else 1  # columns that a row has in a line
    values = flat.view(_DENSE[kind])
    lines = _tiles(values, tiles, blocks, BLOCK_COLUMNS // per_line, TILE_ROWS, per_line)
    return lines.permute(0, 3, 1, 2, 4).reshape(tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)


@dataclass(frozen=True, slots=True)
class RecordExperts:
    """The experts of layers whose records have one layout."""

    layout: ExpertLayout
    activations: Activations

    def rows(
        self, x: Tensor, topk_ids: Tensor, slots: Tensor, placed: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The results of (expert, slot): which rows of [tokens · top_k] they are, int64 on the CPU, and the rows,
        fp32 [·, hidden].

        x fp32 [tokens, hidden] and slots uint8 [slots, bytes], one record in each, are on one device; topk_ids int32
        [tokens, top_k] on the CPU.
        """
        found, results = [torch.empty(0, dtype=torch.int64)], [x[:0]]
        flat, top_k = topk_ids.flatten(), topk_ids.shape[1]
        for expert, slot in placed:
            pairs = (flat == expert).nonzero().flatten()
            found.append(pairs)
            results.append(self._ffn(x[(pairs // top_k).to(x.device)], slots[slot]))
        return torch.cat(found), torch.cat(results)

    def _ffn(self, x: Tensor, record: Tensor) -> Tensor:
        gate, up, down = self.layout.matrices
        hidden = F.silu(self._linear(x, gate, record)) * self._linear(x, up, record)
        return self._linear(hidden, down, record)

    def _linear(self, x: Tensor, layout: MatrixLayout, record: Tensor) -> Tensor:
        int8 = self.activations == "int8" and layout.scheme is not None and takes_int8(layout.scheme)
        return F.linear(int8_rounded(x) if int8 else x, unpack(layout, record))
