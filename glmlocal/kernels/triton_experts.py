"""Experts in an expert pack's records on a GPU, by Triton: 4-bit and 8-bit integers and FP8, straight from their codes.

What ``torch_records.RecordExperts`` computes, in fp32 from the same activations, without widening a matrix in memory:
every (few tokens of an expert × panel of 64 outputs) is a program, which reads the panel in the order in which it lies
in the record. Two launches for any number of experts: silu(gate) · up, and down. Matrices of other schemes are
``RecordExperts``'. Not run on a GPU yet: tested in Triton's interpreter, and compiled ahead of time for sm_80 … sm_120.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmlocal.formats.expert_pack_layout import ExpertLayout, MatrixLayout
from glmlocal.formats.packed_size import BLOCK_COLUMNS
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.reference import int8_rounded, takes_int8

PANEL_ROWS = 64  # four tiles, which lie side by side in every block of columns
TOKEN_ROWS = 16  # of an expert, in one program; the least that tl.dot takes


@triton.jit
def _e4m3(code):
    """Codes as int32 → fp32, exactly; by integers alone, since GPUs before sm_89 have no such type."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where((code & 127) == 127, float("nan"), size)
    return tl.where(code >= 128, -size, size)


@triton.jit
def _values(code, zero, IS_E4M3: tl.constexpr):
    return _e4m3(code) if IS_E4M3 else code.to(tl.float32) - zero


@triton.jit
def _product(
    x,
    inside,
    matrix,
    scales,
    zeros,
    panel,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_E4M3: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """fp32 [TOKENS, 64]: rows at the pointers ``x`` [TOKENS], those that are ``inside``, times a panel's rows."""
    TILES: tl.constexpr = (OUT + 15) // 16
    LINES: tl.constexpr = 32 // (8 // BITS) // 4  # of 64 bytes, in a block of a tile
    output = tl.arange(0, 64)
    tile, row = output // 16, output % 16
    tiles = min(4, TILES - panel * 4)
    there = tile < tiles
    byte = tl.arange(0, LINES * 4)
    line, column = byte // 4, byte % 4
    codes = matrix + panel * 4 * ((IN + 31) // 32) * LINES * 64 + tile * LINES * 64 + row * 4
    units = panel * 64 * ((((IN + 31) // 32) * 32 + GROUP - 1) // GROUP) + tile * 16 + row
    total = tl.zeros((TOKENS, 64), tl.float32)
    for block in range((IN + 31) // 32):
        at = codes[None, :] + block * tiles * LINES * 64 + line[:, None] * 64 + column[:, None]
        code = tl.load(at, mask=there[None, :], other=0).to(tl.int32)
        unit = units + (block * 32 // GROUP) * tiles * 16
        scale = tl.load(scales + unit, mask=there, other=0.0).to(tl.float32)
        if IS_E4M3:
            scale *= 7.52316384526264e-37  # 2^-120: they are stored times 2^120
        zero = tl.full((64,), ZERO, tl.float32)
        if HAS_ZEROS:
            zero += tl.load(zeros + unit, mask=there, other=0).to(tl.float32)
        part = tl.zeros((TOKENS, 64), tl.float32)
        for half in tl.static_range(8 // BITS):  # 4 bits: a byte holds two columns, four apart
            k = block * 32 + (line * (8 // BITS) + half) * 4 + column
            weights = _values((code >> (half * BITS)) & ((1 << BITS) - 1), zero[None, :], IS_E4M3)
            weights = tl.where((k < IN)[:, None], weights, 0.0)
            input = tl.load(x[:, None] + k[None, :], mask=inside[:, None] & (k < IN)[None, :], other=0.0)
            part += tl.dot(input, weights, input_precision="ieee")
        total += part * scale[None, :]
    return total


@triton.jit
def _chunk(chunks, slots, slot_bytes, TOKENS: tl.constexpr):
    """Of this program's chunk: its expert's record, and of TOKENS rows their pairs and whether they are in it."""
    entry = chunks + tl.program_id(0) * 3
    record = slots + tl.load(entry).to(tl.int64) * slot_bytes
    i = tl.arange(0, TOKENS)
    return record, tl.load(entry + 1) + i, i < tl.load(entry + 2)


@triton.jit
def _hidden_kernel(
    x_gate,
    x_up,
    tokens,
    chunks,
    slots,
    slot_bytes,
    hidden,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GATE_SCALE: tl.constexpr,
    UP_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """silu(gate) · up of a chunk's pairs for one panel; ``x_gate`` and ``x_up`` are what each of them multiplies."""
    panel = tl.program_id(1)
    record, pair, inside = _chunk(chunks, slots, slot_bytes, TOKENS)
    token = tl.load(tokens + pair, mask=inside, other=0).to(tl.int64)
    gate = _matrix_product(x_gate + token * GATE[1], inside, record, panel, GATE, GATE_SCALE, TOKENS)
    up = _matrix_product(x_up + token * UP[1], inside, record, panel, UP, UP_SCALE, TOKENS)
    output = panel * 64 + tl.arange(0, 64)
    to = hidden + pair[:, None].to(tl.int64) * GATE[0] + output[None, :]
    tl.store(to, gate / (1.0 + tl.exp(-gate)) * up, mask=inside[:, None] & (output < GATE[0])[None, :])


@triton.jit
def _down_kernel(
    hidden,
    chunks,
    slots,
    slot_bytes,
    out,
    DOWN: tl.constexpr,
    DOWN_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    panel = tl.program_id(1)
    record, pair, inside = _chunk(chunks, slots, slot_bytes, TOKENS)
    pair = pair.to(tl.int64)
    found = _matrix_product(hidden + pair * DOWN[1], inside, record, panel, DOWN, DOWN_SCALE, TOKENS)
    output = panel * 64 + tl.arange(0, 64)
    to = out + pair[:, None] * DOWN[0] + output[None, :]
    tl.store(to, found, mask=inside[:, None] & (output < DOWN[0])[None, :])


@triton.jit
def _matrix_product(x, inside, record, panel, MATRIX: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr):
    """``MATRIX``: as ``_constants`` says."""
    return _product(
        x,
        inside,
        record + MATRIX[2],
        (record + MATRIX[3]).to(tl.pointer_type(SCALE)),
        record + MATRIX[4],
        panel,
        MATRIX[0],
        MATRIX[1],
        MATRIX[5],
        MATRIX[6],
        MATRIX[7],
        MATRIX[8],
        MATRIX[9],
        TOKENS,
    )


def takes(layout: ExpertLayout) -> bool:
    """Whether these kernels have the schemes of all three matrices."""
    return all(map(_takes, layout.matrices))


def _takes(layout: MatrixLayout) -> bool:
    scheme = layout.scheme
    return (
        scheme is not None
        and scheme.bits in (4, 8)
        and scheme.group_size >= BLOCK_COLUMNS
        and scheme.scale_codec == "plain"
        and scheme.offset_codec in ("symmetric", "zero_point")
        and scheme.codebook is None
    )


def constants(layout: MatrixLayout) -> tuple[int | bool, ...]:
    """(out, in, offset of codes, of scales, of zero points, bits, group, zero point, has zero points, is e4m3); offsets
    from the start of the record."""
    scheme, sections = layout.scheme, layout.sections
    assert scheme is not None
    assert sections.scales is not None
    zeros = sections.sub_mins
    return (
        *layout.shape,
        layout.offset + sections.codes.offset,
        layout.offset + sections.scales.offset,
        layout.offset + (0 if zeros is None else zeros.offset),
        scheme.bits,
        min(scheme.group_size, -(-layout.shape[1] // BLOCK_COLUMNS) * BLOCK_COLUMNS),
        scheme.zero_point,
        zeros is not None,
        scheme.code_type == "e4m3",
    )


def scale_type(layout: MatrixLayout) -> tl.dtype:
    assert layout.scheme is not None
    return {"f16": tl.float16, "bf16": tl.bfloat16, "f32": tl.float32}[layout.scheme.scale_type]


@dataclass(frozen=True, slots=True)
class TritonExperts:
    """The experts of layers whose records have one layout, which these kernels take (``takes``)."""

    layout: ExpertLayout
    activations: Activations

    def rows(
        self, x: Tensor, topk_ids: Tensor, slots: Tensor, placed: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """As ``RecordExperts.rows``."""
        flat, top_k = topk_ids.flatten(), topk_ids.shape[1]
        of_expert = [(flat == expert).nonzero().flatten() for expert, _ in placed]
        pairs = torch.cat([torch.empty(0, dtype=torch.int64), *of_expert])
        chunks: list[tuple[int, int, int]] = []  # slot, first pair, pairs
        first = 0
        for (_, slot), mine in zip(placed, of_expert, strict=True):
            end = first + len(mine)
            chunks += [(slot, at, min(TOKEN_ROWS, end - at)) for at in range(first, end, TOKEN_ROWS)]
            first = end
        gate, up, down = self.layout.matrices
        width, hidden_size = gate.shape
        out = torch.empty((len(pairs), hidden_size), device=x.device)
        if not chunks:
            return pairs, out
        hidden = torch.empty((len(pairs), width), device=x.device)
        table = torch.tensor(chunks, dtype=torch.int32).to(x.device)
        tokens = (pairs // top_k).to(torch.int32).to(x.device)
        _hidden_kernel[(len(chunks), -(-width // PANEL_ROWS))](
            self._input(x, gate),
            self._input(x, up),
            tokens,
            table,
            slots,
            slots.stride(0),
            hidden,
            constants(gate),
            constants(up),
            scale_type(gate),
            scale_type(up),
            TOKEN_ROWS,
        )
        _down_kernel[(len(chunks), -(-hidden_size // PANEL_ROWS))](
            self._input(hidden, down),
            table,
            slots,
            slots.stride(0),
            out,
            constants(down),
            scale_type(down),
            TOKEN_ROWS,
        )
        return pairs, out

    def _input(self, x: Tensor, layout: MatrixLayout) -> Tensor:
        """What the matrix multiplies: ``x``, rounded where the CPU rounds it."""
        assert layout.scheme is not None
        return int8_rounded(x).contiguous() if self.activations == "int8" and takes_int8(layout.scheme) else x
