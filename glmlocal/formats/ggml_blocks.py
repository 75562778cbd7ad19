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
from glmlocal.formats.quant import QuantizedMatrix, QuantScheme

Bytes = NDArray[np.uint8]  # [blocks, bytes of a field], or [blocks, weights of a block]

# fmt: off
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# fmt: on


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
    kind = _KINDS.get(dtype)
    if kind is None:
        raise CheckpointError(f"no way to unpack {dtype!r}; supported are {', '.join(_KINDS)}")
    rows, columns = _matrix_shape(dtype, shape)
    if columns % kind.block or raw.size * kind.block != rows * columns * kind.block_bytes:
        raise CheckpointError(
            f"{dtype} matrix {rows} x {columns} cannot be {raw.size:,} bytes: {kind.block} weights take "
            f"{kind.block_bytes}"
        )
    parts = kind.take_apart(np.ascontiguousarray(raw).reshape(-1, kind.block_bytes))
    return QuantizedMatrix(
        scheme=kind.scheme,
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


def block_layout(dtype: str) -> tuple[int, int]:
    """Weights and bytes of one block of a quantized type."""
    return _KINDS[dtype].block, _KINDS[dtype].block_bytes


def scheme_of(dtype: str) -> QuantScheme:
    """What ``unpack`` makes of a quantized type."""
    return _KINDS[dtype].scheme


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


@dataclass(frozen=True, slots=True)
class _Kind:
    block_bytes: int
    scheme: QuantScheme
    take_apart: Callable[[Bytes], _Parts]

    @property
    def block(self) -> int:
        """Weights per block: what one super scale covers."""
        return self.scheme.super_size


def _k_scheme(name: str, bits: int, group: int, zero_point: int | None = None) -> QuantScheme:
    if zero_point is None:
        return QuantScheme(name, bits, group, 256, "two_level", "two_level_min")
    return QuantScheme(name, bits, group, 256, "two_level", zero_point=zero_point)


_KINDS = {
    "Q8_0": _Kind(34, QuantScheme("Q8_0", 8, 32, 32, zero_point=128), _q8_0),
    "Q4_0": _Kind(18, QuantScheme("Q4_0", 4, 32, 32, zero_point=8), _q4_0),
    "Q4_1": _Kind(20, QuantScheme("Q4_1", 4, 32, 32, offset_codec="min"), _q4_1),
    "Q5_0": _Kind(22, QuantScheme("Q5_0", 5, 32, 32, zero_point=16), _q5_0),
    "Q5_1": _Kind(24, QuantScheme("Q5_1", 5, 32, 32, offset_codec="min"), _q5_1),
    "Q2_K": _Kind(84, _k_scheme("Q2_K", 2, 16), _q2_k),
    "Q3_K": _Kind(110, _k_scheme("Q3_K", 3, 16, zero_point=4), _q3_k),
    "Q4_K": _Kind(144, _k_scheme("Q4_K", 4, 32), _q4_k),
    "Q5_K": _Kind(176, _k_scheme("Q5_K", 5, 32), _q5_k),
    "Q6_K": _Kind(210, _k_scheme("Q6_K", 6, 16, zero_point=32), _q6_k),
    "IQ4_NL": _Kind(18, QuantScheme("IQ4_NL", 4, 32, 32, codebook=_IQ4_VALUES), _q4_0),  # Q4_0's layout
    "IQ4_XS": _Kind(136, QuantScheme("IQ4_XS", 4, 32, 256, "two_level", codebook=_IQ4_VALUES), _iq4_xs),
}
_DENSE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

QUANTIZED_DTYPES = frozenset(_KINDS)
DENSE_DTYPES = frozenset(_DENSE)
