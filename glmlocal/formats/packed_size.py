"""Bytes that a matrix takes in the layout of the native kernels, before anything is packed. Torch-free.

The formula of ``kernels/cpu/src/packed_matrix.cpp``, which tests compare it with: planning must not need the extension.
"""

from __future__ import annotations

from typing import Literal

from glmlocal.formats.quant import QuantScheme

TILE_ROWS = 16
BLOCK_COLUMNS = 32
_ALIGNMENT = 64  # of every section
_DENSE_BITS = {"f32": 32, "bf16": 16, "f16": 16}
_FLOAT_BYTES = {"f16": 2, "f32": 4}

ScaleType = Literal["f16", "f32"]


def scale_type(scheme: QuantScheme) -> ScaleType:
    """How scales are held: fp16 where that is exact, as it is for those of GGUF and of ``--quant``.

    Those of e4m3 are held times 2^120 and never fit.
    """
    return "f32" if scheme.code_type == "e4m3" else "f16"


def packed_bytes(rows: int, columns: int, kind: str | QuantScheme, scales: ScaleType | None = None) -> int:
    """Bytes of a matrix [rows, columns] of plain floats ("f32", "bf16", "f16") or of a scheme, padding included.

    ``scales`` overrides ``scale_type``, for sources whose scales are not fp16 (bf16: MLX).
    """
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    if isinstance(kind, str):
        return _aligned(tiles * blocks * _DENSE_BITS[kind] * 64)
    total = _aligned(tiles * blocks * kind.bits * 64)  # one line of 64 bytes per bit of a block's codes
    padded_rows, padded_columns = tiles * TILE_ROWS, blocks * BLOCK_COLUMNS
    groups, supers = (-(-padded_columns // size) * padded_rows for size in (kind.group_size, kind.super_size))
    float_bytes = _FLOAT_BYTES[scales or scale_type(kind)]
    total += _aligned(supers * float_bytes)
    if kind.scale_codec == "two_level":
        total += _aligned(groups)
    if kind.offset_codec == "min":
        total += _aligned(groups * float_bytes)
    elif kind.offset_codec != "symmetric":  # a float per super group, an integer per group
        total += _aligned(supers * float_bytes) + _aligned(groups)
    return total


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
