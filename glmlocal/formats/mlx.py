"""MLX releases (mlx-lm): which tensors make a matrix. Headers only; ``stored_rows`` reads the bytes.

    X.weight uint32 [out, in · bits / 32], X.scales and X.biases [out, in / group_size]     weight = scale · code + bias

Bits and group size are in the config's ``quantization``, for all or, by their names, for single modules (``false``:
plain). Routed experts are stacked, ``mlp.switch_mlp.up_proj`` [experts, out, …]; ``safetensors`` takes them apart.
In the modes nvfp4 and mxfp4 codes are 4-bit floats and there are no biases (``fp4``).
X.bias is a linear layer's own and nothing of this. Source: mlx, nn/layers/quantized.py; mlx-lm, utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats import fp4
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.stored_matrix import (
    BITS,
    FLOATS,
    StoredMatrix,
    group_size,
    must_have_shape,
    part,
    scale_type,
    scheme,
)

SUFFIX = ".scales"
_EXPERT = re.compile(r"\.experts\.\d+\.")


def reader(settings: Mapping[str, Any]) -> Callable[[str, Mapping[str, TensorRef]], StoredMatrix]:
    """Module name, tensors → the matrix. Raises CheckpointError for what cannot be read."""

    def read(module: str, tensors: Mapping[str, TensorRef]) -> StoredMatrix:
        in_mlx = _EXPERT.sub(".switch_mlp.", module)
        override = settings.get(in_mlx, {})
        if not isinstance(override, Mapping) and override is not True:
            raise CheckpointError(
                f"{quoted(module)} is quantized, but the config says {quoted(override)} of {quoted(in_mlx)}"
            )
        return _matrix(module, tensors, {**settings, **(override if isinstance(override, Mapping) else {})})

    return read


def _matrix(module: str, tensors: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> StoredMatrix:
    where, mode = f"the quantization config of {quoted(module)}", settings.get("mode", "affine")
    if mode in ("nvfp4", "mxfp4"):
        return fp4.mlx(module, tensors, mode)
    if mode != "affine":
        raise CheckpointError(f"{where} says mode {quoted(mode)}; affine, nvfp4 and mxfp4 are supported")
    bits, size = settings.get("bits", 4), group_size(settings.get("group_size", 64), where)
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{where} says {quoted(bits)} bits; {', '.join(map(str, BITS))} are supported")
    codes = part(tensors, f"{module}.weight", ("U32",))
    scales, biases = (part(tensors, f"{module}.{name}", FLOATS) for name in ("scales", "biases"))
    rows, groups = scales.shape
    columns = groups * size
    must_have_shape(biases, scales.shape)
    if codes.shape != (rows, columns * bits // 32):
        raise CheckpointError(
            f"tensor {codes.name} has shape {list(codes.shape)}, wanted {[rows, columns * bits // 32]} for {bits} bits "
            f"in {groups} groups of {size}; the config and the tensors are of different models"
        )
    made = scheme("mlx", bits, size, "min", scale_type(scales, biases))
    return StoredMatrix("mlx", made, (rows, columns), codes, scales, biases)
