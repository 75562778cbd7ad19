"""How a weight matrix can be stored: the schemes, and one matrix taken apart into codes, scales and offsets.

Torch-free. A scheme factors into bits × group size × scale codec × offset codec, so that GGUF's legacy and K types
(and later GPTQ, AWQ, compressed-tensors, MLX) all become the same few arrays and one kernel family serves them:

    weight[o, i] = scale[o, i // group_size] * value(code[o, i]) + offset[o, i // group_size]

    value(code)  = code - zero_point, or codebook[code]
    scale        = super_scale                                   (scale_codec "plain")
                 = super_scale[o, i // super_size] * sub_scale   (scale_codec "two_level")
    offset       = 0                                             (offset_codec "symmetric")
                 = min                                           (offset_codec "min")
                 = -super_min[o, i // super_size] * sub_min      (offset_codec "two_level_min")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How codes become weights; everything but the arrays."""

    name: str  # as the source calls it, e.g. "Q4_K"; shown to people, never switched on
    bits: int  # 2, 3, 4, 5, 6 or 8: codes are 0 … 2**bits - 1
    group_size: int  # input columns per scale
    super_size: int  # input columns per super scale; equal to group_size when scale_codec is "plain"
    scale_codec: Literal["plain", "two_level"] = "plain"
    offset_codec: Literal["symmetric", "min", "two_level_min"] = "symmetric"
    zero_point: int = 0
    codebook: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """One matrix [out_features, in_features] taken apart. Rows are output features; groups run along the input."""

    scheme: QuantScheme
    codes: NDArray[np.uint8]  # [out, in]
    super_scale: NDArray[np.float32]  # [out, in / super_size]; fp16 in the file, exact in fp32
    sub_scale: NDArray[np.int8] | None  # [out, in / group_size] for "two_level"
    super_min: NDArray[np.float32] | None  # [out, in / super_size] for "two_level_min", else per group
    sub_min: NDArray[np.uint8] | None  # [out, in / group_size] for "two_level_min"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def group_scales(self) -> NDArray[np.float32]:
        """Scale of every group, fp32 [out, in / group_size]."""
        if self.sub_scale is None:
            return self.super_scale
        per_super = self.scheme.super_size // self.scheme.group_size
        return np.repeat(self.super_scale, per_super, axis=1) * self.sub_scale.astype(np.float32)

    def group_offsets(self) -> NDArray[np.float32] | None:
        """What is added after scaling, fp32 [out, in / group_size]; None when the scheme is symmetric."""
        if self.super_min is None:
            return None
        if self.sub_min is None:
            return self.super_min
        per_super = self.scheme.super_size // self.scheme.group_size
        return -(np.repeat(self.super_min, per_super, axis=1) * self.sub_min.astype(np.float32))

    def values(self) -> NDArray[np.float32]:
        """value(code) for every weight, fp32 [out, in]."""
        if self.scheme.codebook is not None:
            return np.asarray(self.scheme.codebook, np.float32)[self.codes]
        return self.codes.astype(np.float32) - np.float32(self.scheme.zero_point)

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, fp32 [out, in], with the roundings of ``gguf.dequantize``."""
        out = self.values() * np.repeat(self.group_scales(), self.scheme.group_size, axis=1)
        offsets = self.group_offsets()
        if offsets is not None:
            out += np.repeat(offsets, self.scheme.group_size, axis=1)
        return out
