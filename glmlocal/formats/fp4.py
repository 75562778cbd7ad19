"""Matrices of 4-bit floats (e2m1) with scales per 16 or 32 columns: NVFP4 and MXFP4. Headers only.

    compressed-tensors   X.weight_packed uint8 [out, in / 2], X.weight_scale; NVFP4: X.weight_global_scale divides
    ModelOpt, Quark      X.weight uint8 [out, in / 2], X.weight_scale; NVFP4: X.weight_scale_2 multiplies
    MLX                  X.weight uint32 [out, in / 8], X.scales; NVFP4 has no second scale

NVFP4 has e4m3 scales per 16 columns, MXFP4 powers of two (e8m0) per 32; which it is follows from the scales' dtype and
number, of MLX from the mode that its config names. What a release says of activations is for engines that quantize
them. ``stored_rows`` reads the bytes. Sources: compressed-tensors, compressors/nvfp4 and mxfp4; Model-Optimizer, export
of unified checkpoints; mlx, nn/layers/quantized.py; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.fp8 import FP8_DTYPE
from glmlocal.formats.index import TensorRef
from glmlocal.formats.schemes import MXFP4, NVFP4, NVFP4_GLOBAL
from glmlocal.formats.stored_matrix import FLOATS, Layout, StoredMatrix, checked, must_have_shape, part

_E8M0_DTYPES = ("U8", "F8_E8M0")
_SCALE_DTYPES = (*_E8M0_DTYPES, FP8_DTYPE)


def reader(settings: Mapping[str, Any]) -> Callable[[str, Mapping[str, TensorRef]], StoredMatrix]:
    """Module name, tensors → the matrix, of ModelOpt and Quark. Raises CheckpointError for what cannot be read."""

    def read(module: str, tensors: Mapping[str, TensorRef]) -> StoredMatrix:
        codes = part(tensors, f"{module}.weight", ("U8",))
        return _matrix(codes, _scales(tensors, f"{module}.weight_scale"), tensors.get(f"{module}.weight_scale_2"))

    return read


def compressed(module: str, tensors: Mapping[str, TensorRef]) -> StoredMatrix:
    """The matrix of a module of compressed-tensors whose packed codes are bytes."""
    codes = part(tensors, f"{module}.weight_packed", ("U8",))
    if f"{module}.weight_zero_point" in tensors:
        raise CheckpointError(f"tensor {codes.name} holds 4-bit floats with zero points, which are not supported")
    divisor = tensors.get(f"{module}.weight_global_scale")
    return _matrix(codes, _scales(tensors, f"{module}.weight_scale"), divisor, divides=True)


def mlx(module: str, tensors: Mapping[str, TensorRef], mode: str) -> StoredMatrix:
    """The matrix of a module of MLX in mode "nvfp4" or "mxfp4"."""
    codes = part(tensors, f"{module}.weight", ("U32",))
    scales = part(tensors, f"{module}.scales", ("U8",))
    made = {"nvfp4": NVFP4, "mxfp4": MXFP4}[mode]
    shape = (codes.shape[0], codes.shape[1] * 8)
    must_have_shape(scales, (shape[0], -(-shape[1] // made.group_size)))
    return StoredMatrix("fp4", made, shape, codes, scales)


def _scales(tensors: Mapping[str, TensorRef], name: str) -> TensorRef:
    return part(tensors, name, _SCALE_DTYPES)


def _matrix(
    codes: TensorRef, scales: TensorRef, global_scale: TensorRef | None, *, divides: bool = False
) -> StoredMatrix:
    shape = (codes.shape[0], codes.shape[1] * 2)
    if scales.dtype in _E8M0_DTYPES:
        made = MXFP4
        if global_scale is not None:
            raise CheckpointError(f"tensor {scales.name} has powers of two, yet beside it is {global_scale.name}")
    elif global_scale is None:
        raise CheckpointError(f"tensor {scales.name} has no scale for the whole matrix beside it; download it again")
    else:
        made = NVFP4_GLOBAL
        must_have_shape(checked(global_scale, FLOATS, len(global_scale.shape)), (), (1,), (1, 1))
    must_have_shape(scales, (shape[0], -(-shape[1] // made.group_size)))
    layout: Layout = "fp4" if global_scale is None else "fp4_divided" if divides else "fp4_multiplied"
    return StoredMatrix(layout, made, shape, codes, scales, global_scale=global_scale)
