"""GGUF's quantized blocks, taken apart into the arrays of ``QuantizedMatrix``. Lossless, numpy only.

Each type is a fixed number of weights in a fixed number of bytes; a row of a matrix is a whole number of blocks, so any
range of rows can be unpacked on its own. ``dequantize()`` of the result equals ``gguf.dequantize`` bit for bit.
Sources: ggml-common.h (layouts) and gguf/quants.py (the arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import GGML_BLOCKS

Bytes = NDArray[np.uint8]  # [blocks, bytes of a field], or [blocks, weights of a block]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the blocks hold, one row per block; see QuantizedMatrix for the meanings."""

    codes: Bytes  # [blocks, weights per block]
    scale: NDArray[np.float32]  # [blocks, 1]
    sub_scale: NDArray[np.int8] | None = None  # [blocks, groups per block]
    min: NDArray[np.float32] | None = None  # [blocks, 1]
    sub_min: Bytes | None = None  # [blocks, groups per block]


def unpack(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> QuantizedMatrix:
    """Take apart the rows [out, in] that ``raw`` (any uint8 array of their bytes, in order) holds.

    ``dtype`` is one of QUANTIZED_DTYPES. Needs about four bytes per weight while it works and returns little more than
    one: give a large matrix in ranges of rows. Raises CheckpointError if bytes and shape disagree.
    """
    block = GGML_BLOCKS.get(dtype)
    if block is None:
        raise CheckpointError(f"no way to unpack {dtype!r}; supported are {', '.join(GGML_BLOCKS)}")
    rows, columns = _matrix_shape(dtype, shape)
    if columns % block.weights or raw.size * block.weights != rows * columns * block.nbytes:
        raise CheckpointError(
            f"{dtype} matrix {rows} x {columns} cannot be {raw.size:,} bytes: {block.weights} weights take "
            f"{block.nbytes}"
        )
    parts = _TAKE_APART[dtype](np.ascontiguousarray(raw).reshape(-1, block.nbytes))
    return QuantizedMatrix(
        scheme=block.scheme,
        codes=parts.codes.reshape(rows, columns),
        super_scale=parts.scale.reshape(rows, -1),
        sub_scale=None if parts.sub_scale is None else parts.sub_scale.reshape(rows, -1),
        super_min=None if parts.min is None else parts.min.reshape(rows, -1),
        sub_min=None if parts.sub_min is None else parts.sub_min.reshape(rows, -1),
    )


def view_dense(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[Any]:
    """View bytes as an F32, F16 or BF16 array of ``shape``; BF16 as uint16 bit patterns, since numpy has no such type.

    No copy; the view is as read-only and as unaligned as ``raw``. Raises CheckpointError if bytes and shape disagree.
    """
    numpy_dtype = _DENSE[dtype]
    if raw.size != int(np.prod(shape, dtype=np.int64)) * numpy_dtype.itemsize:
        raise CheckpointError(f"{dtype} array {shape} cannot be {raw.size:,} bytes")
    return raw.view(numpy_dtype).reshape(shape)


def widen_dense(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The same as fp32, exactly."""
    stored = view_dense(dtype, raw, shape)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def _matrix_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise CheckpointError(f"{dtype} holds matrices; an array of shape {shape} cannot be {dtype}")
    return shape


def _half(field: Bytes) -> NDArray[np.float32]:
    """Two bytes of little-endian fp16 per block → fp32 [blocks, 1]."""
    return np.ascontiguousarray(field).view("<f2").astype(np.float32)


def _spread(field: Bytes, width: int, bits: int) -> Bytes:
    """Unpack ``bits``-wide numbers that lie in planes: of each ``width`` bytes first all lowest bits, then the next.

    [blocks, n · width] → [blocks, n · width · 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    out = field.reshape(len(field), -1, 1, width) >> shifts
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(len(field), -1)


def _q4_0(b: Bytes) -> _Parts:
    return _Parts(_spread(b[:, 2:], 16, 4), _half(b[:, :2]))


def _q4_1(b: Bytes) -> _Parts:
    return _Parts(_spread(b[:, 4:], 16, 4), _half(b[:, :2]), min=_half(b[:, 2:4]))


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    codes = np.unpackbits(high, axis=1, bitorder="little")
    codes <<= np.uint8(4)
    codes |= _spread(low, 16, 4)
    return codes


def _q5_0(b: Bytes) -> _Parts:
    return _Parts(_five_bits(b[:, 2:6], b[:, 6:]), _half(b[:, :2]))


def _q5_1(b: Bytes) -> _Parts:
    return _Parts(_five_bits(b[:, 4:8], b[:, 8:]), _half(b[:, :2]), min=_half(b[:, 2:4]))


def _q8_0(b: Bytes) -> _Parts:
    return _Parts(b[:, 2:] ^ np.uint8(0x80), _half(b[:, :2]))  # int8 + 128


def _q2_k(b: Bytes) -> _Parts:
    scales = b[:, :16]
    return _Parts(
        _spread(b[:, 16:80], 32, 2),
        _half(b[:, 80:82]),
        sub_scale=(scales & np.uint8(15)).view(np.int8),
        min=_half(b[:, 82:84]),
        sub_min=scales >> np.uint8(4),
    )


def _q3_k(b: Bytes) -> _Parts:
    codes = _spread(b[:, :32], 32, 1)
    codes <<= np.uint8(2)
    codes |= _spread(b[:, 32:96], 32, 2)  # minus 4 is the weight
    scales = _spread(b[:, 96:104], 8, 4) | (_spread(b[:, 104:108], 4, 2) << np.uint8(4))
    return _Parts(codes, _half(b[:, 108:110]), sub_scale=scales.view(np.int8) - np.int8(32))


def _scales_and_mins(field: Bytes) -> tuple[NDArray[np.int8], Bytes]:
    """Eight 6-bit scales and eight 6-bit mins in 12 bytes: the first four whole, the others with split top bits."""
    first_scales, first_mins, low = field[:, :4], field[:, 4:8], field[:, 8:]
    top = np.uint8(0x30)
    scales = [first_scales & np.uint8(63), (low & np.uint8(15)) | ((first_scales >> np.uint8(2)) & top)]
    mins = [first_mins & np.uint8(63), (low >> np.uint8(4)) | ((first_mins >> np.uint8(2)) & top)]
    return np.concatenate(scales, axis=1).view(np.int8), np.concatenate(mins, axis=1)


def _q4_k(b: Bytes) -> _Parts:
    sub_scale, sub_min = _scales_and_mins(b[:, 4:16])
    return _Parts(_spread(b[:, 16:], 32, 4), _half(b[:, :2]), sub_scale, _half(b[:, 2:4]), sub_min)


def _q5_k(b: Bytes) -> _Parts:
    sub_scale, sub_min = _scales_and_mins(b[:, 4:16])
    codes = _spread(b[:, 16:48], 32, 1)
    codes <<= np.uint8(4)
    codes |= _spread(b[:, 48:], 32, 4)
    return _Parts(codes, _half(b[:, :2]), sub_scale, _half(b[:, 2:4]), sub_min)


def _q6_k(b: Bytes) -> _Parts:
    codes = _spread(b[:, 128:192], 32, 2)
    codes <<= np.uint8(4)
    codes |= _spread(b[:, :128], 64, 4)  # minus 32 is the weight
    return _Parts(codes, _half(b[:, 208:]), sub_scale=np.ascontiguousarray(b[:, 192:208]).view(np.int8))


def _iq4_xs(b: Bytes) -> _Parts:
    scales = _spread(b[:, 4:8], 1, 4) | (_spread(b[:, 2:4], 1, 2) << np.uint8(4))
    return _Parts(_spread(b[:, 8:], 16, 4), _half(b[:, :2]), sub_scale=scales.view(np.int8) - np.int8(32))


_TAKE_APART: dict[str, Callable[[Bytes], _Parts]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,  # whose layout it has
    "IQ4_XS": _iq4_xs,
}
_DENSE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
