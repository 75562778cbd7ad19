"""One weight matrix taken apart into codes, scales and offsets. Torch-free; the schemes are in ``schemes``.

    weight[o, i] = scale[o, i // group_size] * value(code[o, i]) + offset[o, i // group_size]

    value(code)  = code - zero_point, or codebook[code], or the number that the byte is (code_type "e4m3")
    scale        = super_scale                                   (scale_codec "plain")
                 = super_scale[o, i // super_size] * sub_scale   (scale_codec "two_level")
    offset       = 0                                             (offset_codec "symmetric")
                 = min                                           (offset_codec "min")
                 = -super_min[o, i // super_size] * sub_min      (offset_codec "two_level_min")
                 = -scale * sub_min, an integer zero point       (offset_codec "zero_point"; scale_codec "plain")

The last group, and the last super group, of a row may be ragged: in_features need not be a multiple of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmlocal.formats.schemes import QuantScheme


def _e4m3_values() -> NDArray[np.float32]:
    """The numbers that the 256 bytes of fp8 e4m3 ("fn": no infinities, 0x7f and 0xff are NaN) stand for."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[byte & 127 == 127] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


E4M3_VALUES = _e4m3_values()
# Halves of the powers of two that bytes of e8m0 stand for, subnormals among them; 255 is NaN where no file is GGUF.
E8M0_HALVES: NDArray[np.float32] = np.ldexp(np.float32(1), np.arange(256) - 128)


def has_nan(codes: NDArray[np.uint8]) -> bool:
    """Is one of these e4m3 bytes NaN?"""
    return bool(codes.size) and int((codes & np.uint8(0x7F)).max()) == 0x7F


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """One matrix [out_features, in_features] taken apart. Rows are output features; groups run along the input."""

    scheme: QuantScheme
    codes: NDArray[np.uint8]  # [out, in]
    super_scale: NDArray[np.float32]  # [out, in / super_size], rounded up; what the file has is exact in fp32
    sub_scale: NDArray[np.int8] | None = None  # [out, in / group_size] for "two_level"
    super_min: NDArray[np.float32] | None = None  # [out, in / super_size] for "two_level_min", per group for "min"
    sub_min: NDArray[np.uint8] | None = None  # [out, in / group_size] for "two_level_min" and "zero_point"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def group_scales(self) -> NDArray[np.float32]:
        """Scale of every group, fp32 [out, in / group_size]."""
        if self.sub_scale is None:
            return self.super_scale
        return self._per_group(self.super_scale) * self.sub_scale.astype(np.float32)

    def group_offsets(self) -> NDArray[np.float32] | None:
        """What is added after scaling, fp32 [out, in / group_size]; None when the scheme is symmetric."""
        if self.sub_min is None:
            return self.super_min
        unit = self.super_scale if self.super_min is None else self._per_group(self.super_min)
        return -(unit * self.sub_min.astype(np.float32))

    def values(self) -> NDArray[np.float32]:
        """value(code) for every weight, fp32 [out, in]."""
        if self.scheme.code_type == "e4m3":
            return E4M3_VALUES[self.codes]
        if self.scheme.codebook is not None:
            return np.asarray(self.scheme.codebook, np.float32)[self.codes]
        return self.codes.astype(np.float32) - np.float32(self.scheme.zero_point)

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, fp32 [out, in], with the roundings of ``gguf.dequantize``; zero points are taken off first."""
        out = self.values()
        if self.scheme.offset_codec == "zero_point":
            assert self.sub_min is not None
            out -= self._per_weight(self.sub_min)
        out *= self._per_weight(self.group_scales())
        if self.scheme.offset_codec in ("min", "two_level_min"):
            out += self._per_weight(self.group_offsets())
        return out

    def _per_group(self, supers: NDArray[np.float32]) -> NDArray[np.float32]:
        groups = -(-self.shape[1] // self.scheme.group_size)
        return np.repeat(supers, self.scheme.super_size // self.scheme.group_size, axis=1)[:, :groups]

    def _per_weight(self, groups: Any) -> NDArray[np.float32]:
        """One value per group, given to each of its columns: [out, in / group_size] → [out, in]."""
        columns, size = self.shape[1], self.scheme.group_size
        if size >= columns:
            return np.broadcast_to(np.asarray(groups, np.float32), self.shape)
        return np.repeat(np.asarray(groups, np.float32), size, axis=1)[:, :columns]
