"""FP8 matrices of safetensors checkpoints: e4m3 bytes, and their scales in a tensor beside them.

Two families of releases are read, told apart by the shapes of the scales rather than by what the config says:

    compressed-tensors (GLM-4.5-FP8, Air-FP8, 4.6-FP8)  X.weight_scale [out, 1], or [out], or one for the matrix
    DeepSeek style (GLM-5-FP8)                          X.weight_scale_inv [out / 128, in / 128], rounded up

weight = byte as e4m3 × scale, ``_inv`` or not. Scales are F32, BF16 or F16. Activation scales, and what the config says
of activations and the KV cache, are for engines that compute in FP8; here activations stay as they are. A byte that is
NaN, or a scale that is not above 0 and below 256, can only be damage and is refused. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats.ggml_blocks import DENSE_DTYPES, view_dense
from glmlocal.formats.index import TensorIndex, TensorRef
from glmlocal.formats.quant import FP8_BLOCK128, FP8_CHANNEL, QuantizedMatrix, QuantScheme, has_nan

FP8_DTYPE = "F8_E4M3"
_BLOCK = FP8_BLOCK128.group_size
_SCALE_LIMIT = 256  # the kernels hold scales times 2^120


def scales_of(tensors: Mapping[str, TensorRef], name: str) -> tuple[QuantScheme, TensorRef]:
    """Scheme of the FP8 matrix ``name`` and where its scales are. Reads headers only; raises CheckpointError."""
    ref = tensors[name]
    found = [tensors[name + suffix] for suffix in ("_scale", "_scale_inv") if name + suffix in tensors]
    if len(found) != 1:
        what = "no scales" if not found else "scales twice"
        raise CheckpointError(
            f"tensor {name} is {ref.dtype} with {what}: one of {name}_scale and {name}_scale_inv was expected; "
            "download the checkpoint again"
        )
    (scales,) = found
    rows, columns = ref.shape
    blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    if scales.dtype not in DENSE_DTYPES:
        raise CheckpointError(
            f"tensor {scales.name} is {scales.dtype}; scales must be {', '.join(sorted(DENSE_DTYPES))}"
        )
    if scales.shape in ((rows, 1), (rows,), (1,), ()):
        return FP8_CHANNEL, scales
    if scales.shape == blocks:
        return FP8_BLOCK128, scales
    raise CheckpointError(
        f"tensor {scales.name} has shape {list(scales.shape)}; {[rows, 1]} (one scale per row) or {list(blocks)} (one "
        f"per block of {_BLOCK} x {_BLOCK}) was expected for weights of {[rows, columns]}"
    )


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
    stored = view_dense(ref.dtype, tensors.copy(ref.name), ref.shape)
    values = (stored.astype(np.uint32) << 16).view(np.float32) if ref.dtype == "BF16" else stored.astype(np.float32)
    bad = ~((values > 0) & (values < _SCALE_LIMIT))  # NaN is neither
    if bad.any():
        raise CheckpointError(
            f"tensor {ref.name} has the scale {float(values[bad].flat[0]):g}; scales are above 0 and below "
            f"{_SCALE_LIMIT}: the file is damaged, download it again"
        )
    return values
