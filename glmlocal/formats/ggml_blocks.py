"""GGUF's quantized blocks, taken apart into the arrays of ``QuantizedMatrix``. Lossless, numpy only.

Each type is a fixed number of weights in a fixed number of bytes; a row of a matrix is a whole number of blocks, so any
range of rows can be unpacked on its own. ``dequantize()`` of the result equals ``gguf.dequantize`` bit for bit.
Sources: ggml-common.h (layouts) and gguf/quants.py (the arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats import ggml_grids
from glmlocal.formats.ggml_parts import Bytes, Parts, half, spread
from glmlocal.formats.quant import E4M3_VALUES, E8M0_HALVES, QuantizedMatrix
from glmlocal.formats.schemes import GGML_BLOCKS


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


def _q4_0(b: Bytes) -> Parts:
    return Parts(spread(b[:, 2:], 16, 4), half(b[:, :2]))


def _q4_1(b: Bytes) -> Parts:
    return Parts(spread(b[:, 4:], 16, 4), half(b[:, :2]), min=half(b[:, 2:4]))


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    codes = np.unpackbits(high, axis=1, bitorder="little")
    codes <<= np.uint8(4)
    codes |= spread(low, 16, 4)
    return codes


def _q5_0(b: Bytes) -> Parts:
    return Parts(_five_bits(b[:, 2:6], b[:, 6:]), half(b[:, :2]))


def _q5_1(b: Bytes) -> Parts:
    return Parts(_five_bits(b[:, 4:8], b[:, 8:]), half(b[:, :2]), min=half(b[:, 2:4]))


def _q8_0(b: Bytes) -> Parts:
    return Parts(b[:, 2:] ^ np.uint8(0x80), half(b[:, :2]))  # int8 + 128


def _q2_k(b: Bytes) -> Parts:
    scales = b[:, :16]
    return Parts(
        spread(b[:, 16:80], 32, 2),
        half(b[:, 80:82]),
        sub_scale=(scales & np.uint8(15)).view(np.int8),
        min=half(b[:, 82:84]),
        sub_min=scales >> np.uint8(4),
    )


def _q3_k(b: Bytes) -> Parts:
    codes = spread(b[:, :32], 32, 1)
    codes <<= np.uint8(2)
    codes |= spread(b[:, 32:96], 32, 2)  # minus 4 is the weight
    scales = spread(b[:, 96:104], 8, 4) | (spread(b[:, 104:108], 4, 2) << np.uint8(4))
    return Parts(codes, half(b[:, 108:110]), sub_scale=scales.view(np.int8) - np.int8(32))


def _scales_and_mins(field: Bytes) -> tuple[NDArray[np.int8], Bytes]:
    """Eight 6-bit scales and eight 6-bit mins in 12 bytes: the first four whole, the others with split top bits."""
    first_scales, first_mins, low = field[:, :4], field[:, 4:8], field[:, 8:]
    top = np.uint8(0x30)
    scales = [first_scales & np.uint8(63), (low & np.uint8(15)) | ((first_scales >> np.uint8(2)) & top)]
    mins = [first_mins & np.uint8(63), (low >> np.uint8(4)) | ((first_mins >> np.uint8(2)) & top)]
    return np.concatenate(scales, axis=1).view(np.int8), np.concatenate(mins, axis=1)


def _q4_k(b: Bytes) -> Parts:
    sub_scale, sub_min = _scales_and_mins(b[:, 4:16])
    return Parts(spread(b[:, 16:], 32, 4), half(b[:, :2]), sub_scale, half(b[:, 2:4]), sub_min)


def _q5_k(b: Bytes) -> Parts:
    sub_scale, sub_min = _scales_and_mins(b[:, 4:16])
    codes = spread(b[:, 16:48], 32, 1)
    codes <<= np.uint8(4)
    codes |= spread(b[:, 48:], 32, 4)
    return Parts(codes, half(b[:, :2]), sub_scale, half(b[:, 2:4]), sub_min)


def _q6_k(b: Bytes) -> Parts:
    codes = spread(b[:, 128:192], 32, 2)
    codes <<= np.uint8(4)
    codes |= spread(b[:, :128], 64, 4)  # minus 32 is the weight
    return Parts(codes, half(b[:, 208:]), sub_scale=np.ascontiguousarray(b[:, 192:208]).view(np.int8))


def _iq4_xs(b: Bytes) -> Parts:
    scales = spread(b[:, 4:8], 1, 4) | (spread(b[:, 2:4], 1, 2) << np.uint8(4))
    return Parts(spread(b[:, 8:], 16, 4), half(b[:, :2]), sub_scale=scales.view(np.int8) - np.int8(32))


def _mxfp4(b: Bytes) -> Parts:
    return Parts(spread(b[:, 1:], 16, 4), E8M0_HALVES[b[:, :1]])  # the codebook is of whole numbers: values doubled


def _nvfp4(b: Bytes) -> Parts:
    return Parts(spread(b[:, 4:], 8, 4), _E4M3_HALVES[b[:, :4]])


def _tq1_0(b: Bytes) -> Parts:
    """Five weights a byte, the highest digit of a fraction to the base of 3 first; of the last four bytes four."""

    def digits(field: Bytes, count: int) -> Bytes:
        powers = 3 ** np.arange(count, dtype=np.uint8)
        shifted = field[:, None, :] * powers[:, None]  # mod 256
        return (shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).astype(np.uint8).reshape(len(field), -1)

    codes = np.concatenate([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], axis=1)
    return Parts(codes, half(b[:, 52:]))


def _tq2_0(b: Bytes) -> Parts:
    return Parts(spread(b[:, :64], 32, 2), half(b[:, 64:]))


# Without a sign; the byte 0x7f is no NaN but 0.
_E4M3_HALVES = np.abs(np.nan_to_num(E4M3_VALUES, nan=0)).astype(np.float32) * np.float32(0.5)
_E4M3_HALVES[0xFF] = 240  # as llama.cpp reads it, which writes no such byte
_TAKE_APART: dict[str, Callable[[Bytes], Parts]] = {
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
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    **ggml_grids.TAKE_APART,
}
_DENSE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
