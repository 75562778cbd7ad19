"""Quantizing weights: fp32 rows → 4 or 8 bits in groups of 32 columns with an fp16 scale. Numpy only.

A group's largest weight decides a range of scales; of these the one with the least squared error is taken, then the
least-squares scale for its codes, then the nearest codes for that scale in fp16. Clipping the largest weights a little
pays where the rest gets finer steps: at 4 bits the squared error of normally distributed weights is a tenth below that
of the largest weight / 8. Weights that are whole multiples of a scale already stay what they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glmlocal.formats.quant import QuantizedMatrix, QuantScheme

INT4 = QuantScheme("int4", 4, 32, 32, zero_point=8)
INT8 = QuantScheme("int8", 8, 32, 32, zero_point=128)

# What the largest weight of a group may become, in steps: -8 is the end of 4 bits, 9 is clipped by one step.
_LARGEST = {INT4.name: (8.0, 7.0, 7.5, 8.5, 9.0), INT8.name: (128.0, 127.0)}
_BETTER = 1 + 1e-5  # by less than that a candidate is no better than the first: rounding alone makes such differences
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
        scales[part] = part_scales.reshape(-1, groups)
    return QuantizedMatrix(scheme, codes, scales)


def _quantize_groups(
    weights: NDArray[np.float32], scheme: QuantScheme
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """fp32 [groups, group_size] → codes, and scales [groups]."""
    low, high = np.float32(-scheme.zero_point), np.float32((1 << scheme.bits) - 1 - scheme.zero_point)
    extremes = weights[np.arange(len(weights)), np.abs(weights).argmax(axis=1)]  # NaN wins
    limit = np.float32(np.finfo(np.float16).max) * -low
    if not (np.abs(extremes) < limit).all():
        raise ValueError(f"a weight is {extremes[~(np.abs(extremes) < limit)][0]:g}, wanted finite and below {limit:g}")
    # The negative side of the codes is the longer one, so it gets the largest weight; a scale may be negative.
    unit = np.divide(np.float32(-1), extremes, out=np.zeros_like(extremes), where=np.abs(extremes) > 1e-30)
    relative = weights * unit[:, None]  # -1 … 1; the largest is -1
    best_gain = np.full(len(weights), -1, np.float32)
    best_scale = np.zeros(len(weights), np.float32)
    steps = np.empty_like(relative)
    for largest in _LARGEST[scheme.name]:
        np.multiply(relative, np.float32(largest), out=steps)
        np.rint(steps, out=steps)
        np.clip(steps, low, high, out=steps)
        dot = np.einsum("gi,gi->g", steps, relative)
        norm = np.einsum("gi,gi->g", steps, steps)
        # With the best scale dot / norm for these codes the error is |relative|² - dot² / norm.
        scale = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)
        better = scale * dot > best_gain * np.float32(_BETTER)
        best_gain[better] = (scale * dot)[better]
        best_scale[better] = scale[better]
    inverse_unit = np.divide(np.float32(1), unit, out=np.zeros_like(unit), where=unit != 0)
    scales = (best_scale * inverse_unit).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    np.multiply(weights, inverse[:, None], out=steps)
    np.rint(steps, out=steps)
    np.clip(steps, low, high, out=steps)
    steps -= low
    return steps.astype(np.uint8), scales
