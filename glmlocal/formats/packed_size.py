"""Bytes that a matrix takes in the layout of the native kernels, before anything is packed. Torch-free.

The formula of ``kernels/cpu/src/packed_matrix.cpp``, which tests compare it with: planning must not need the extension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from glmlocal.formats.schemes import QuantScheme

TILE_ROWS = 16
BLOCK_COLUMNS = 32
_ALIGNMENT = 64  # of every section
_DENSE_BITS = {"f32": 32, "bf16": 16, "f16": 16}
_FLOAT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes offset … offset + nbytes - 1 of a packed matrix, padding to the next section not counted."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedSections:
    """Where the parts of a packed matrix are; None for those that its scheme does not have."""

    codes: Section
    scales: Section | None  # per group, or per super group where there are sub-scales
    sub_scales: Section | None
    mins: Section | None
    sub_mins: Section | None
    nbytes: int  # of the whole, a multiple of 64


def packed_bytes(rows: int, columns: int, kind: str | QuantScheme) -> int:
    """Bytes of a matrix [rows, columns] of plain floats ("f32", "bf16", "f16") or of a scheme, padding included."""
    return packed_sections(rows, columns, kind).nbytes


@lru_cache(maxsize=1 << 12)  # a model has many matrices of few shapes
def packed_sections(rows: int, columns: int, kind: str | QuantScheme) -> PackedSections:
    """The same, section by section."""
    tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK_COLUMNS)
    if isinstance(kind, str):
        weights = Section(0, tiles * blocks * _DENSE_BITS[kind] * 64)
        return PackedSections(weights, None, None, None, None, _aligned(weights.nbytes))
    padded_rows, padded_columns = tiles * TILE_ROWS, blocks * BLOCK_COLUMNS
    groups, supers = (-(-padded_columns // size) * padded_rows for size in (kind.group_size, kind.super_size))
    float_bytes = _FLOAT_BYTES[kind.scale_type]
    mins = {"min": groups, "two_level_min": supers}.get(kind.offset_codec)
    sizes = (
        tiles * blocks * kind.bits * 64,  # one line of 64 bytes per bit of a block's codes
        supers * float_bytes,
        groups if kind.scale_codec == "two_level" else None,
        None if mins is None else mins * float_bytes,
        groups if kind.offset_codec in ("two_level_min", "zero_point") else None,
    )
    sections: list[Section | None] = []
    end = 0
    for size in sizes:
        sections.append(None if size is None else Section(end, size))
        end += _aligned(size or 0)
    codes, scale, sub_scale, low, sub_low = sections
    assert codes is not None
    return PackedSections(codes, scale, sub_scale, low, sub_low, end)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
