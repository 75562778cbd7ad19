"""Matrices → the layout of the native kernels (drawn in src/packed_matrix.h), and back.

Everything here is numpy on whole arrays, holds no state and releases the GIL where it takes time, so a loader may pack
several matrices at once. ``unpack(pack(matrix))`` is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.formats.quant import QuantizedMatrix, QuantScheme
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.reference import Activations, takes_int8

_TILE_ROWS: int = _cpu.TILE_ROWS
_PANEL_TILES: int = _cpu.PANEL_TILES
_BLOCK: int = _cpu.BLOCK_COLUMNS
_DENSE_CODES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # low bits first
_LITTLE = np.dtype("<u4")


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A linear weight [out_features, in_features] bound to the native kernels."""

    native: _cpu.Matrix
    shape: tuple[int, int]
    kind: str  # what the checkpoint stored: "f32", "bf16", "f16" or the quantization's name
    nbytes: int  # held in memory, padding included
    scheme: QuantScheme | None  # None for f32, bf16 and f16
    format: _cpu.MatrixFormat
    layout: _cpu.MatrixLayout
    buffer: NDArray[np.uint8]
    int8_activations: bool

    def dequantize(self) -> Tensor:
        """The weights as the kernels use them, fp32 [out, in]."""
        out = torch.empty(self.shape)
        self.native.unpack(out.data_ptr())
        return out


def pack(matrix: Tensor | QuantizedMatrix, activations: Activations = "int8") -> PackedWeight:
    """Copy one matrix [out, in] (fp32, bf16, fp16 or quantized) into kernel layout; ValueError if it is malformed."""
    if isinstance(matrix, QuantizedMatrix):
        if _supported(matrix.scheme):
            return _pack_quantized(matrix, activations == "int8" and takes_int8(matrix.scheme))
        return _pack_dense(torch.from_numpy(matrix.dequantize()), matrix.scheme.name)
    return _pack_dense(matrix, None)


def unpack(weight: PackedWeight) -> Tensor | QuantizedMatrix:
    """The matrix that was packed, from the packed bytes alone (fp32 for a scheme that had to be widened)."""
    return _unpack_dense(weight) if weight.scheme is None else _unpack_quantized(weight, weight.scheme)


def _supported(scheme: QuantScheme) -> bool:
    sizes = (scheme.group_size, scheme.super_size)
    powers_of_two = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    # The kernels look codes up in a table of 16. No format has a longer codebook; one that had would run as fp32.
    return scheme.bits in _PLANES and powers_of_two and (scheme.codebook is None or scheme.bits <= 4)


def _pack_dense(matrix: Tensor, kind: str | None) -> PackedWeight:
    if matrix.dtype not in _DENSE_CODES or matrix.dim() != 2 or not matrix.is_cpu:
        raise ValueError(
            f"pack: wanted a two-dimensional fp32, bf16 or fp16 tensor on the CPU, found {matrix.dtype} "
            f"{list(matrix.shape)} on {matrix.device}"
        )
    codes = _DENSE_CODES[matrix.dtype]
    format_ = _cpu.MatrixFormat(codes)
    layout = _cpu.matrix_layout(matrix.shape[0], matrix.shape[1], format_)
    buffer = _cpu.allocate(layout.num_bytes)
    bits = matrix.contiguous().view(torch.int32 if codes == "f32" else torch.int16).numpy()
    tiles = _pad(bits, layout).reshape(layout.tiles, _TILE_ROWS, layout.blocks, _BLOCK)
    lines = tiles.view(_LITTLE) if codes == "bf16" else tiles  # bf16 keeps two neighbouring columns in a word
    # [tile, row, block, line] → lines of 16 rows
    _store(_section(buffer, layout.codes_offset, lines.dtype), lines.transpose(0, 2, 3, 1))
    return _bind(format_, layout, buffer, kind or codes, None, 0, [])


def _unpack_dense(weight: PackedWeight) -> Tensor:
    layout, codes, (rows, columns) = weight.layout, weight.format.codes, weight.shape
    dtypes: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.int32), "bf16": _LITTLE, "f16": np.dtype(np.int16)}
    per_line = _BLOCK // 2 if codes == "bf16" else _BLOCK
    section = _section(weight.buffer, layout.codes_offset, dtypes[codes])
    lines = _load(section, (layout.tiles, layout.blocks, per_line, _TILE_ROWS))
    tiles = np.ascontiguousarray(lines.transpose(0, 3, 1, 2))
    bits = tiles.view(np.int16 if codes != "f32" else np.int32)
    matrix = bits.reshape(layout.tiles * _TILE_ROWS, layout.blocks * _BLOCK)[:rows, :columns]
    names = {name: torch_dtype for torch_dtype, name in _DENSE_CODES.items()}
    return torch.from_numpy(np.ascontiguousarray(matrix)).view(names[codes])


def _pack_quantized(matrix: QuantizedMatrix, int8_activations: bool) -> PackedWeight:
    scheme, (rows, columns) = matrix.scheme, matrix.shape
    _check(matrix)
    floats = [matrix.super_scale] + ([] if matrix.super_min is None else [matrix.super_min])
    scale_type = "f16" if all(_fits_f16(values) for values in floats) else "f32"
    format_ = _cpu.MatrixFormat(
        f"u{scheme.bits}",
        scale_type=scale_type,
        group_size=scheme.group_size,
        super_size=scheme.super_size,
        has_sub_scale=matrix.sub_scale is not None,
        has_min=matrix.super_min is not None,
        has_sub_min=matrix.sub_min is not None,
    )
    layout = _cpu.matrix_layout(rows, columns, format_)
    buffer = _cpu.allocate(layout.num_bytes)
    lines = _code_lines(_pad(matrix.codes, layout), layout, scheme.bits)
    _store(_section(buffer, layout.codes_offset, lines.dtype), lines.transpose(0, 2, 3, 1))

    for name, section in _group_sections(format_, layout).items():
        values = getattr(matrix, name)
        if values is not None:
            padded = np.zeros((layout.tiles * _TILE_ROWS, section.units), section.dtype)
            padded[:rows, : values.shape[1]] = values
            tiles = padded.reshape(layout.tiles, _TILE_ROWS, section.units).transpose(0, 2, 1)
            _store(_section(buffer, section.offset, section.dtype), tiles)
    zero_point = 0 if scheme.codebook is not None else scheme.zero_point
    return _bind(format_, layout, buffer, scheme.name, scheme, zero_point, _table(scheme), int8_activations)


def _unpack_quantized(weight: PackedWeight, scheme: QuantScheme) -> QuantizedMatrix:
    layout, format_, (rows, columns) = weight.layout, weight.format, weight.shape
    words = _section(weight.buffer, layout.codes_offset, _LITTLE)
    lines = _load(words, (layout.tiles, layout.blocks, scheme.bits, _TILE_ROWS)).transpose(0, 3, 1, 2)
    arrays: dict[str, NDArray[Any] | None] = {}
    for name, section in _group_sections(format_, layout).items():
        values = None
        if section.offset >= 0:
            found = _load(
                _section(weight.buffer, section.offset, section.dtype), (layout.tiles, section.units, _TILE_ROWS)
            )
            values = found.transpose(0, 2, 1).reshape(-1, section.units)[:rows, : -(-columns // section.columns)]
            values = values.astype(np.float32) if values.dtype == np.float16 else values
        arrays[name] = values
    codes = _codes(lines, scheme.bits).reshape(-1, layout.blocks * _BLOCK)[:rows, :columns]
    scale = arrays["super_scale"]
    assert scale is not None
    return QuantizedMatrix(scheme, codes, scale, arrays["sub_scale"], arrays["super_min"], arrays["sub_min"])


@dataclass(frozen=True, slots=True)
class _GroupSection:
    offset: int  # in the buffer; -1 when the format has none
    dtype: np.dtype[Any]
    units: int  # stored per row, padding included
    columns: int  # input columns per unit


def _group_sections(format_: _cpu.MatrixFormat, layout: _cpu.MatrixLayout) -> dict[str, _GroupSection]:
    """Where the arrays of a QuantizedMatrix other than its codes are stored."""
    floats = np.dtype(np.float16 if format_.scale_type == "f16" else np.float32)
    supers, groups = (layout.supers, format_.super_size), (layout.groups, format_.group_size)
    return {
        "super_scale": _GroupSection(layout.scale_offset, floats, *supers),
        "sub_scale": _GroupSection(layout.sub_scale_offset, np.dtype(np.int8), *groups),
        "super_min": _GroupSection(layout.min_offset, floats, *(supers if format_.has_sub_min else groups)),
        "sub_min": _GroupSection(layout.sub_min_offset, np.dtype(np.uint8), *groups),
    }


def _check(matrix: QuantizedMatrix) -> None:
    scheme, (rows, columns) = matrix.scheme, matrix.shape
    groups, supers = -(-columns // scheme.group_size), -(-columns // scheme.super_size)
    wanted = {"super_scale": (rows, supers)}
    if scheme.scale_codec == "two_level":
        wanted["sub_scale"] = (rows, groups)
    if scheme.offset_codec == "two_level_min":
        wanted |= {"super_min": (rows, supers), "sub_min": (rows, groups)}
    elif scheme.offset_codec == "min":
        wanted["super_min"] = (rows, groups)
    for name in ("super_scale", "sub_scale", "super_min", "sub_min"):
        values = getattr(matrix, name)
        found = None if values is None else values.shape
        if found != wanted.get(name):
            raise ValueError(
                f"{scheme.name} matrix [{rows}, {columns}]: {name} wanted {wanted.get(name)}, found {found}"
            )
    if matrix.codes.size and int(matrix.codes.max()) >> scheme.bits:
        raise ValueError(f"{scheme.name} matrix: code {matrix.codes.max()} does not fit in {scheme.bits} bits")
    if scheme.codebook is not None and len(scheme.codebook) != 1 << scheme.bits:
        raise ValueError(f"{scheme.name}: codebook of {len(scheme.codebook)} values for codes of {scheme.bits} bits")


def _fits_f16(values: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values, values.astype(np.float16).astype(np.float32)))


def _table(scheme: QuantScheme) -> list[float]:
    if scheme.bits > 4:
        return []
    return [float(v) for v in (scheme.codebook or range(-scheme.zero_point, (1 << scheme.bits) - scheme.zero_point))]


def _code_lines(codes: NDArray[np.uint8], layout: _cpu.MatrixLayout, bits: int) -> NDArray[np.uint32]:
    """uint8 [rows, columns], padded → words [tile, row, block, line]."""
    # A word holds the codes of four neighbouring columns, one per byte; shifting words shifts all four.
    quads = codes.view(_LITTLE).reshape(layout.tiles, _TILE_ROWS, layout.blocks, _BLOCK // 4)
    lines = np.empty((layout.tiles, _TILE_ROWS, layout.blocks, bits), _LITTLE)
    line = shift = 0
    for plane in _PLANES[bits]:
        mask = np.uint32(((1 << plane) - 1) * 0x01010101)
        part = quads if plane == bits else (quads >> np.uint32(shift)) & mask
        together = 8 // plane  # quads that share a line
        first = part[..., 0::together]
        for i in range(1, together):
            first = first | part[..., i::together] << np.uint32(i * plane)
        lines[..., line : line + plane] = first
        line, shift = line + plane, shift + plane
    return lines


def _codes(lines: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The inverse of ``_code_lines``: words [tile, row, block, line] → uint8 [tile, row, block, column]."""
    quads = np.zeros((*lines.shape[:3], _BLOCK // 4), _LITTLE)
    line = shift = 0
    for plane in _PLANES[bits]:
        mask = np.uint32(((1 << plane) - 1) * 0x01010101)
        together = 8 // plane
        for i in range(together):
            part = lines[..., line : line + plane] >> np.uint32(i * plane) & mask
            quads[..., i::together] |= part << np.uint32(shift)
        line, shift = line + plane, shift + plane
    return quads.view(np.uint8)


def _pad(values: NDArray[Any], layout: _cpu.MatrixLayout) -> NDArray[Any]:
    shape = (layout.tiles * _TILE_ROWS, layout.blocks * _BLOCK)
    if values.shape == shape:
        return np.ascontiguousarray(values)
    padded = np.zeros(shape, values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _section(buffer: NDArray[np.uint8], offset: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    usable = (buffer.size - offset) // dtype.itemsize * dtype.itemsize
    return buffer[offset : offset + usable].view(dtype)


def _panels(section: NDArray[Any], shape: tuple[int, ...]) -> list[tuple[slice, NDArray[Any]]]:
    """The section as views [panel, unit, tile of panel, …] with the tiles they hold: whole panels, then the last."""
    tiles, units, *line = shape
    full = tiles // _PANEL_TILES
    split = full * _PANEL_TILES
    per_tile = int(np.prod(shape[1:]))
    views = [(slice(0, split), section[: split * per_tile].reshape(full, units, _PANEL_TILES, *line))]
    if split < tiles:
        rest = section[split * per_tile : tiles * per_tile].reshape(1, units, tiles - split, *line)
        views.append((slice(split, tiles), rest))
    return views


def _store(section: NDArray[Any], values: NDArray[Any]) -> None:
    """values [tile, unit, …] → the section, tiles of a panel side by side within each unit (block or group)."""
    for tiles, view in _panels(section, values.shape):
        panels, _, width = view.shape[:3]
        view[...] = values[tiles].reshape(panels, width, *values.shape[1:]).swapaxes(1, 2)


def _load(section: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    out = np.empty(shape, section.dtype)
    for tiles, view in _panels(section, shape):
        panels, _, width = view.shape[:3]
        out[tiles].reshape(panels, width, *shape[1:])[...] = view.swapaxes(1, 2)
    return out


def _bind(
    format_: _cpu.MatrixFormat,
    layout: _cpu.MatrixLayout,
    buffer: NDArray[np.uint8],
    kind: str,
    scheme: QuantScheme | None,
    zero_point: int,
    values: list[float],
    int8_activations: bool = False,
) -> PackedWeight:
    native = _cpu.Matrix(layout, format_, buffer, zero_point, values, int8_activations)
    shape = (layout.out_features, layout.in_features)
    return PackedWeight(native, shape, kind, layout.num_bytes, scheme, format_, layout, buffer, int8_activations)
