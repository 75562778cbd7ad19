"""Quantizing weights: fp32 rows → 4 or 8 bits in groups of 32 columns with an fp16 scale. Numpy only.

A group's largest weight gives a few candidate scales and their codes; of these, each with its least-squares scale, the
one with the least squared error in fp16 is taken. Clipping the largest weights a little pays where the rest gets finer
steps: at 4 bits the squared error of normally distributed weights is a tenth below that of the largest weight / 8.
Quantizing again changes nothing.

This is the plain twin of ``kernels.cpu.quantize``, which gives the same bits: fp32 throughout, nothing fused, and sums
in a fixed order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import INT4, INT8, QuantScheme

# What the largest weight of a group may become, in steps: -8 is the end of 4 bits, 9 is clipped by one step.
CANDIDATES = {INT4.name: (8.0, 7.0, 7.5, 8.5, 9.0), INT8.name: (128.0, 127.0)}
_LANES = 8
_ZERO = 1e-30  # smaller weights have no scale in fp16 by far
_CHUNK_WEIGHTS = 1 << 17  # temporaries of this many fp32 numbers stay in the cache


def quantize(weights: NDArray[np.float32], scheme: QuantScheme) -> QuantizedMatrix:
    """fp32 [out, in] → INT4 or INT8. Raises ValueError for weights that are not finite or too large for fp16 scales."""
    rows, columns = weights.shape
    groups = -(-columns // scheme.group_size)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, groups), np.float32)
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        padded = np.zeros((len(scales[part]), groups * scheme.group_size), np.float32)
        padded[:, :columns] = weights[part]
        part_codes, part_scales = _quantize_groups(padded.reshape(-1, scheme.group_size), scheme)
        codes[part] = part_codes.reshape(padded.shape)[:, :columns]
        scales[part] = part_scales.reshape(len(padded), groups)
    return QuantizedMatrix(scheme, codes, scales)


def code_range(scheme: QuantScheme) -> tuple[np.float32, np.float32]:
    """The smallest and the largest code, as the signed numbers that they mean."""
    return np.float32(-scheme.zero_point), np.float32((1 << scheme.bits) - 1 - scheme.zero_point)


def largest_weight(scheme: QuantScheme) -> np.float32:
    """Below this a group's scale fits fp16, whichever candidate is taken."""
    return np.float32(np.finfo(np.float16).max) * np.float32(scheme.zero_point) / np.float32(2)


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of products, [groups, 32] → [groups], in the order of the native kernel: 8 lanes, then halves."""
    products = (a * b).reshape(len(a), -1, _LANES)
    lanes = products[:, 0].copy()
    for k in range(1, products.shape[1]):
        lanes += products[:, k]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _quantize_groups(
    weights: NDArray[np.float32], scheme: QuantScheme
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """fp32 [groups, group_size] → codes, and scales [groups]."""
    low, high = code_range(scheme)
    extremes = weights[np.arange(len(weights)), np.abs(weights).argmax(axis=1)]  # NaN wins
    limit = largest_weight(scheme)
    if not (np.abs(extremes) < limit).all():
        raise ValueError(f"a weight is {extremes[~(np.abs(extremes) < limit)][0]:g}, wanted finite and below {limit:g}")
    # The negative side of the codes is the longer one, so it gets the largest weight; a scale may be negative.
    sizes = np.where(np.abs(extremes) > _ZERO, -extremes, np.float32(1))
    # -1 … 1; the largest is -1 exactly, and all are 0 where it is
    relative = (weights / sizes[:, None]).astype(np.float32, copy=False)
    relative[np.abs(extremes) <= _ZERO] = 0
    best_codes = np.zeros_like(relative)
    best_error = np.full(len(weights), np.inf, np.float32)
    best_scale = np.zeros(len(weights), np.float32)
    error: NDArray[np.float32] = np.empty(relative.shape, np.float32)
    codes: NDArray[np.float32] = np.empty(relative.shape, np.float32)
    for largest in CANDIDATES[scheme.name]:
        np.multiply(relative, np.float32(largest), out=error)
        np.rint(error, out=codes)
        np.clip(codes, low, high, out=codes)
        error -= codes
        # With the least-squares scale for these codes; sums of errors keep the digits that sums of weights would lose.
        shift, norm = _dot(error, codes), _dot(codes, codes)
        slope = np.divide(shift, norm, out=np.zeros_like(shift), where=norm > 0)
        wanted = np.where(norm > 0, (1 + slope) / np.float32(largest) * sizes, np.float32(0))
        scale = wanted.astype(np.float16).astype(np.float32)
        rounding = (scale - wanted) / sizes
        left = (_dot(error, error) - shift * slope) / np.float32(largest**2) + rounding**2 * norm
        better = left < best_error
        best_error[better] = left[better]
        best_scale[better] = scale[better]
        np.copyto(best_codes, codes, where=better[:, None])
    # The nearest codes for the scale as rounded, unless the largest changed: then quantizing again would differ.
    inverse = np.divide(np.float32(1), best_scale, out=np.zeros_like(best_scale), where=best_scale != 0)
    np.multiply(weights, inverse[:, None], out=codes)
    np.rint(codes, out=codes)
    np.clip(codes, low, high, out=codes)
    same_largest = np.abs(codes).max(axis=1) == np.abs(best_codes).max(axis=1)
    np.copyto(best_codes, codes, where=same_largest[:, None])
    best_codes -= low
    return best_codes.astype(np.uint8), best_scale
