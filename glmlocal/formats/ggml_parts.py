"""What the blocks of a quantized GGUF type are taken apart into, and how their fields are read. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]  # [blocks, bytes of a field], or [blocks, weights of a block]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the blocks hold, one row per block; see QuantizedMatrix for the meanings."""

    codes: Bytes  # [blocks, weights per block]
    scale: NDArray[np.float32]  # [blocks, super groups per block]
    sub_scale: NDArray[np.int8] | None = None  # [blocks, groups per block]
    min: NDArray[np.float32] | None = None  # [blocks, 1]
    sub_min: Bytes | None = None  # [blocks, groups per block]


def half(field: Bytes) -> NDArray[np.float32]:
    """Two bytes of little-endian fp16 per block → fp32 [blocks, 1]."""
    return np.ascontiguousarray(field).view("<f2").astype(np.float32)


def spread(field: Bytes, width: int, bits: int) -> Bytes:
    """Unpack ``bits``-wide numbers that lie in planes: of each ``width`` bytes first all lowest bits, then the next.

    [blocks, n · width] → [blocks, n · width · 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    out = field.reshape(len(field), -1, 1, width) >> shifts
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(len(field), -1)
