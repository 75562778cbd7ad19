"""The bytes of an FP8 matrix, a range of rows at a time, with their scales; ``fp8`` says how they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats.fp8 import scales_of
from glmlocal.formats.ggml_blocks import widen_dense
from glmlocal.formats.index import TensorIndex, TensorRef
from glmlocal.formats.quant import QuantizedMatrix, has_nan
from glmlocal.formats.schemes import FP8_BLOCK128, FP8_CHANNEL, QuantScheme

_BLOCK = FP8_BLOCK128.group_size
_SCALE_LIMIT = 256  # the kernels hold scales times 2^120


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """One FP8 matrix of a checkpoint, its scales read and checked, its bytes read when asked for."""

    tensors: TensorIndex
    name: str
    scheme: QuantScheme
    scales: NDArray[np.float32]  # [out, 1], or [out / 128, in / 128]

    @classmethod
    def open(cls, tensors: TensorIndex, name: str) -> Fp8Matrix:
        scheme, ref = scales_of(tensors, name)
        scales = _read_scales(tensors, ref)
        if scheme is FP8_CHANNEL:
            scales = np.ascontiguousarray(np.broadcast_to(scales.reshape(-1, 1), (tensors[name].shape[0], 1)))
        return cls(tensors, name, scheme, scales)

    def rows(self, begin: int, end: int) -> QuantizedMatrix:
        """Rows begin … end - 1. Raises CheckpointError if one of their weights is NaN."""
        columns = self.tensors[self.name].shape[1]
        codes = self.tensors.copy(self.name, begin * columns, end * columns).reshape(-1, columns)
        if has_nan(codes):
            row = begin + int(np.flatnonzero((codes & 0x7F == 0x7F).any(axis=1))[0])
            raise CheckpointError(
                f"tensor {self.name} has a weight that is NaN in row {row}; the file is damaged, download it again"
            )
        rows = np.arange(begin, end)
        return QuantizedMatrix(self.scheme, codes, self.scales[rows if self.scheme is FP8_CHANNEL else rows // _BLOCK])


def _read_scales(tensors: TensorIndex, ref: TensorRef) -> NDArray[np.float32]:
    values = widen_dense(ref.dtype, tensors.copy(ref.name), ref.shape)
    bad = ~((values > 0) & (values < _SCALE_LIMIT))  # NaN is neither
    if bad.any():
        raise CheckpointError(
            f"tensor {ref.name} has the scale {float(values[bad].flat[0]):g}; scales are above 0 and below "
            f"{_SCALE_LIMIT}: the file is damaged, download it again"
        )
    return values
