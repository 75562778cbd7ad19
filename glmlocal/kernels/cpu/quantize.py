"""Quantizing weights, native: the bits of ``formats.quantize``, some twenty times as fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glmlocal.formats import quantize as plain
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import QuantScheme
from glmlocal.kernels.cpu import _cpu


def quantize(weights: NDArray[np.float32], scheme: QuantScheme) -> QuantizedMatrix:
    """fp32 [out, in] → INT4 or INT8. Raises ValueError for weights that are not finite or too large for fp16 scales.

    Releases the GIL.
    """
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, -(-columns // scheme.group_size)), np.float32)
    low, high = plain.code_range(scheme)
    fine = _cpu.quantize_rows(
        weights.ctypes.data,
        rows,
        columns,
        float(low),
        float(high),
        list(plain.CANDIDATES[scheme.name]),
        float(plain.largest_weight(scheme)),
        codes.ctypes.data,
        scales.ctypes.data,
    )
    # The plain one says which weight it is.
    return QuantizedMatrix(scheme, codes, scales) if fine else plain.quantize(weights, scheme)
