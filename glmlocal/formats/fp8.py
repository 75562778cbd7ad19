"""FP8 matrices of safetensors checkpoints: e4m3 bytes, and their scales in a tensor beside them.

Two families of releases are read, told apart by the shapes of the scales rather than by what the config says:

    compressed-tensors (GLM-4.5-FP8, Air-FP8, 4.6-FP8)  X.weight_scale [out, 1], or [out], or one for the matrix
    DeepSeek style (GLM-5-FP8)                          X.weight_scale_inv [out / 128, in / 128], rounded up

weight = byte as e4m3 × scale, ``_inv`` or not. Scales are F32, BF16 or F16. Activation scales, and what the config says
of activations and the KV cache, are for engines that compute in FP8; here activations stay as they are. A byte that is
NaN, or a scale that is not above 0 and below 256, can only be damage and is refused. This module reads headers only and
needs no numpy; ``fp8_matrix`` reads the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorRef
from glmlocal.formats.schemes import DENSE_DTYPES, FP8_BLOCK128, FP8_CHANNEL, QuantScheme

FP8_DTYPE = "F8_E4M3"
_BLOCK = FP8_BLOCK128.group_size


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
