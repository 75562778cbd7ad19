"""Matrices → the layout of the native kernels (drawn in src/packed_matrix.h), and back.

Everything here is numpy, a few panels of rows at a time so that what it needs beside the result stays small; it holds
no state and releases the GIL where it takes time, so a loader may pack several matrices at once.
``unpack(pack(matrix))`` is the identity.

One thing is stored otherwise than QuantizedMatrix has it: the scales of e4m3 times 2^120, by which its codes are too
small as the kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.formats.expert_pack_layout import ExpertLayout, MatrixLayout
from glmlocal.formats.quant import QuantizedMatrix, has_nan
from glmlocal.formats.schemes import Activations, QuantScheme
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.reference import MatrixRows, takes_int8

_TILE_ROWS: int = _cpu.TILE_ROWS
_PANEL_TILES: int = _cpu.PANEL_TILES
_PANEL_ROWS = _TILE_ROWS * _PANEL_TILES
_BLOCK: int = _cpu.BLOCK_COLUMNS
_DENSE_CODES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # low bits first
_LINE_BYTES = 64  # what packed data is aligned to
_LITTLE = np.dtype("<u4")
_CHUNK_WEIGHTS = 1 << 18  # packed at once; the temporaries are a few bytes for each
_E4M3_UNIT = np.float32(2.0**120)
_FLOATS: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
}


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


def pack(matrix: Tensor | QuantizedMatrix | MatrixRows, activations: Activations = "int8") -> PackedWeight:
    """Copy one matrix [out, in] (fp32, bf16, fp16 or quantized) into kernel layout; ValueError if it is malformed."""
    if isinstance(matrix, MatrixRows):
        rows = matrix
    else:
        _check(matrix)
        rows = MatrixRows.of(matrix)
    packed = _pack_as(rows, None, activations) or _pack_as(rows, "f32", activations)
    assert packed is not None
    return packed


def bind_record(
    layout: ExpertLayout, record: NDArray[np.uint8], activations: Activations = "int8"
) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
    """Gate, up and down of an expert pack's record, as it lies in memory (64-byte aligned): nothing is copied.

    ValueError for a record of another size or a layout that these kernels do not have.
    """
    if record.nbytes != layout.record_bytes:
        raise ValueError(f"record wanted {layout.record_bytes:,} bytes, found {record.nbytes:,}")
    gate, up, down = (_bind_packed(matrix, record, activations) for matrix in layout.matrices)
    return gate, up, down


def _bind_packed(matrix: MatrixLayout, record: NDArray[np.uint8], activations: Activations) -> PackedWeight:
    form = _Form.of_kind(matrix.kind if matrix.scheme is None else matrix.scheme)
    layout = _cpu.matrix_layout(*matrix.shape, form.format)
    if layout.num_bytes != matrix.nbytes or form.scheme != matrix.scheme:
        raise ValueError(f"{matrix.kind} {list(matrix.shape)}: {matrix.nbytes:,} bytes are not what these kernels pack")
    return _bind(form, layout, record[matrix.offset : matrix.offset + matrix.nbytes], activations)


def record_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """Memory for records, in huge pages where the system has them."""
    return _cpu.allocate(num_bytes)


def unpack(weight: PackedWeight) -> Tensor | QuantizedMatrix:
    """The matrix that was packed, from the packed bytes alone (fp32 for a scheme that had to be widened)."""
    return _unpack_dense(weight) if weight.scheme is None else _unpack_quantized(weight, weight.scheme)


def duplicate(weight: PackedWeight, buffer: NDArray[np.uint8]) -> PackedWeight:
    """The same matrix once more, in ``buffer`` of as many bytes (64-byte aligned): for measurements that must not find
    it in a cache."""
    buffer[:] = weight.buffer
    form = _Form(weight.format, weight.kind, weight.scheme)
    return _bind(form, weight.layout, buffer, "int8" if weight.int8_activations else "fp32")


def _supported(scheme: QuantScheme) -> bool:
    sizes = (scheme.group_size, scheme.super_size)
    powers_of_two = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    if scheme.code_type == "e4m3":
        return powers_of_two and (scheme.bits, scheme.scale_codec, scheme.offset_codec) == (8, "plain", "symmetric")
    # The kernels look codes up in a table of 16. No format has a longer codebook; one that had would run as fp32.
    return scheme.bits in _PLANES and powers_of_two and (scheme.codebook is None or scheme.bits <= 4)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a matrix is going to be stored."""

    format: _cpu.MatrixFormat
    kind: str
    scheme: QuantScheme | None  # None: as plain floats

    @classmethod
    def of(cls, matrix: Tensor | QuantizedMatrix, scale_type: str | None) -> _Form:
        return cls.of_kind(_DENSE_CODES[matrix.dtype] if isinstance(matrix, Tensor) else matrix.scheme, scale_type)

    @classmethod
    def of_kind(cls, scheme: str | QuantScheme, scale_type: str | None = None) -> _Form:
        """Of plain floats ("f32", "bf16", "f16") or a scheme; ``scale_type`` None is the scheme's own."""
        if isinstance(scheme, str):
            return cls(_cpu.MatrixFormat(scheme), scheme, None)
        if not _supported(scheme):
            return cls(_cpu.MatrixFormat("f32"), scheme.name, None)
        format_ = _cpu.MatrixFormat(
            "e4m3" if scheme.code_type == "e4m3" else f"u{scheme.bits}",
            scale_type=scale_type or scheme.scale_type,
            group_size=scheme.group_size,
            super_size=scheme.super_size,
            has_sub_scale=scheme.scale_codec == "two_level",
            has_min=scheme.offset_codec != "symmetric",
            has_sub_min=scheme.offset_codec in ("two_level_min", "zero_point"),
        )
        return cls(format_, scheme.name, scheme)


def pack_record(matrices: tuple[MatrixRows, MatrixRows, MatrixRows], layout: ExpertLayout) -> NDArray[np.uint8]:
    """Gate, up and down as a record of an expert pack. ValueError for matrices that are not what the layout says."""
    record = np.zeros(layout.record_bytes + _LINE_BYTES, np.uint8)
    record = record[-record.ctypes.data % _LINE_BYTES :][: layout.record_bytes]
    for rows, matrix in zip(matrices, layout.matrices, strict=True):
        if rows.shape != matrix.shape:
            raise ValueError(f"{matrix.kind} {list(matrix.shape)}: found {list(rows.shape)}")
        place = record[matrix.offset : matrix.offset + matrix.nbytes]

        def there(num_bytes: int, place: NDArray[np.uint8] = place) -> NDArray[np.uint8]:
            if num_bytes != place.nbytes:
                raise ValueError(f"{num_bytes:,} bytes are to be packed into {place.nbytes:,}")
            return place

        packed = _pack_as(rows, None, "fp32", there)
        if packed is None:
            assert matrix.scheme is not None
            raise ValueError(f"scales of {matrix.kind} do not fit {matrix.scheme.scale_type}")
        if (packed.kind, packed.scheme) != (matrix.kind, matrix.scheme):
            raise ValueError(f"wanted {matrix.kind}, found {packed.kind}")
    return record


def _pack_as(
    rows: MatrixRows,
    scale_type: str | None,
    activations: Activations,
    allocate: Callable[[int], NDArray[np.uint8]] = _cpu.allocate,
) -> PackedWeight | None:
    """None when a scale does not fit ``scale_type`` (None: the scheme's own)."""
    num_rows, columns = rows.shape
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1) // _PANEL_ROWS) * _PANEL_ROWS
    form = None
    for begin in range(0, max(num_rows, 1), step):
        end = min(begin + step, num_rows)
        part = rows.read(begin, end)
        _check(part)
        if tuple(part.shape) != (end - begin, columns):
            raise ValueError(f"pack: rows {begin} … {end} of [{num_rows}, {columns}] came as {list(part.shape)}")
        if form is None:
            form = _Form.of(part, scale_type)
            layout = _cpu.matrix_layout(num_rows, columns, form.format)
            buffer = allocate(layout.num_bytes)
        sections = _tiles(part, form)
        if sections is None:
            return None
        if end > begin:
            for name, tiles in sections.items():
                offset = getattr(layout, f"{name}_offset") + begin // _TILE_ROWS * tiles[0].nbytes
                _store(_section(buffer, offset, tiles.dtype), tiles)
    assert form is not None
    return _bind(form, layout, buffer, activations)


def _tiles(matrix: Tensor | QuantizedMatrix, form: _Form) -> dict[str, NDArray[Any]] | None:
    """What each section of the layout gets: arrays [tile, unit, …, 16 rows]. None when the scales do not fit."""
    layout = _cpu.matrix_layout(matrix.shape[0], matrix.shape[1], form.format)
    if form.scheme is None:
        return {"codes": _dense_tiles(matrix, layout)}
    assert isinstance(matrix, QuantizedMatrix)
    stored = _group_sections(form.format, layout)
    lines = _code_lines(_pad(matrix.codes, layout), layout, form.scheme.bits)
    sections: dict[str, NDArray[Any]] = {"codes": lines.transpose(0, 2, 3, 1)}
    for name, values in _group_arrays(matrix).items():
        if values is None:
            continue
        section = stored[name]
        narrow = _narrow(values, section.dtype)
        if narrow.dtype != values.dtype and not np.array_equal(_wide(narrow), values):
            return None
        padded = np.zeros((layout.tiles * _TILE_ROWS, section.units), section.dtype)
        padded[: values.shape[0], : values.shape[1]] = narrow
        sections[section.name] = padded.reshape(layout.tiles, _TILE_ROWS, section.units).transpose(0, 2, 1)
    return sections


def _narrow(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """fp32 as stored; uint16 holds the upper halves, which is bf16."""
    if values.dtype == np.float32 and dtype == np.uint16:
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def _wide(stored: NDArray[Any]) -> NDArray[Any]:
    """The inverse: fp32 of scales, and integers as they are."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32) if stored.dtype == np.float16 else stored


def _dense_tiles(matrix: Tensor | QuantizedMatrix, layout: _cpu.MatrixLayout) -> NDArray[Any]:
    if isinstance(matrix, QuantizedMatrix):
        matrix = torch.from_numpy(np.ascontiguousarray(matrix.dequantize()))
    bits = matrix.contiguous().view(torch.int32 if matrix.dtype == torch.float32 else torch.int16).numpy()
    tiles = _pad(bits, layout).reshape(layout.tiles, _TILE_ROWS, layout.blocks, _BLOCK)
    lines = tiles.view(_LITTLE) if matrix.dtype == torch.bfloat16 else tiles  # bf16 keeps two columns in a word
    return lines.transpose(0, 2, 3, 1)  # [tile, row, block, line] → lines of 16 rows


def _group_arrays(matrix: QuantizedMatrix) -> dict[str, NDArray[Any] | None]:
    """The arrays beside the codes, as they are stored."""
    scale = matrix.super_scale
    if matrix.scheme.code_type == "e4m3":
        with np.errstate(over="ignore"):
            scale = scale * _E4M3_UNIT
        if not np.isfinite(scale).all():
            raise ValueError(f"{matrix.scheme.name} matrix: scales must be finite and below 256")
    return {
        "super_scale": scale,
        "sub_scale": matrix.sub_scale,
        "super_min": matrix.super_min,
        "sub_min": matrix.sub_min,
    }


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
            values = _wide(np.ascontiguousarray(values))
        arrays[name] = values
    codes = _codes(lines, scheme.bits).reshape(-1, layout.blocks * _BLOCK)[:rows, :columns]
    scale = arrays["super_scale"]
    assert scale is not None
    if scheme.code_type == "e4m3":
        scale /= _E4M3_UNIT
    if scheme.offset_codec == "zero_point":
        arrays["super_min"] = None
    return QuantizedMatrix(scheme, codes, scale, arrays["sub_scale"], arrays["super_min"], arrays["sub_min"])


@dataclass(frozen=True, slots=True)
class _GroupSection:
    name: str  # in MatrixLayout, without "_offset"
    offset: int  # in the buffer; -1 when the format has none
    dtype: np.dtype[Any]
    units: int  # stored per row, padding included
    columns: int  # input columns per unit


def _group_sections(format_: _cpu.MatrixFormat, layout: _cpu.MatrixLayout) -> dict[str, _GroupSection]:
    """Where the arrays of a QuantizedMatrix other than its codes are stored."""
    floats = _FLOATS[format_.scale_type]
    supers, groups = (layout.supers, format_.super_size), (layout.groups, format_.group_size)
    mins = supers if format_.has_sub_min else groups
    return {
        "super_scale": _GroupSection("scale", layout.scale_offset, floats, *supers),
        "sub_scale": _GroupSection("sub_scale", layout.sub_scale_offset, np.dtype(np.int8), *groups),
        "super_min": _GroupSection("min", layout.min_offset, floats, *mins),
        "sub_min": _GroupSection("sub_min", layout.sub_min_offset, np.dtype(np.uint8), *groups),
    }


def _check(matrix: Tensor | QuantizedMatrix) -> None:
    """ValueError if the parts of a matrix do not belong together."""
    if isinstance(matrix, Tensor):
        if matrix.dtype not in _DENSE_CODES or matrix.dim() != 2 or not matrix.is_cpu:
            raise ValueError(
                f"pack: wanted a two-dimensional fp32, bf16 or fp16 tensor on the CPU, found {matrix.dtype} "
                f"{list(matrix.shape)} on {matrix.device}"
            )
        return
    scheme, (rows, columns) = matrix.scheme, matrix.shape
    groups, supers = -(-columns // scheme.group_size), -(-columns // scheme.super_size)
    wanted = {"super_scale": (rows, supers)}
    if scheme.scale_codec == "two_level":
        wanted["sub_scale"] = (rows, groups)
    if scheme.offset_codec == "two_level_min":
        wanted |= {"super_min": (rows, supers), "sub_min": (rows, groups)}
    elif scheme.offset_codec == "min":
        wanted["super_min"] = (rows, groups)
    elif scheme.offset_codec == "zero_point":
        wanted["sub_min"] = (rows, groups)
    for name in ("super_scale", "sub_scale", "super_min", "sub_min"):
        values = getattr(matrix, name)
        found = None if values is None else values.shape
        if found != wanted.get(name):
            raise ValueError(
                f"{scheme.name} matrix [{rows}, {columns}]: {name} wanted {wanted.get(name)}, found {found}"
            )
    if scheme.bits < 8 and matrix.codes.size and int(matrix.codes.max()) >> scheme.bits:
        raise ValueError(f"{scheme.name} matrix: code {matrix.codes.max()} does not fit in {scheme.bits} bits")
    if scheme.code_type == "e4m3" and has_nan(matrix.codes):
        raise ValueError(f"{scheme.name} matrix: a code is NaN")
    if scheme.codebook is not None and len(scheme.codebook) != 1 << scheme.bits:
        raise ValueError(f"{scheme.name}: codebook of {len(scheme.codebook)} values for codes of {scheme.bits} bits")


def table_of(scheme: QuantScheme | None) -> tuple[int, list[float]]:
    """What codes mean: the zero point, and for codes of at most 4 bits the values of all. None: plain floats."""
    if scheme is None:
        return 0, []
    values = scheme.codebook or range(-scheme.zero_point, (1 << scheme.bits) - scheme.zero_point)
    return 0 if scheme.codebook else scheme.zero_point, [float(v) for v in values] if scheme.bits <= 4 else []


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


def _bind(form: _Form, layout: _cpu.MatrixLayout, buffer: NDArray[np.uint8], activations: Activations) -> PackedWeight:
    scheme = form.scheme
    int8 = activations == "int8" and scheme is not None and takes_int8(scheme)
    native = _cpu.Matrix(layout, form.format, buffer, *table_of(scheme), int8)
    shape = (layout.out_features, layout.in_features)
    return PackedWeight(native, shape, form.kind, layout.num_bytes, scheme, form.format, layout, buffer, int8)
