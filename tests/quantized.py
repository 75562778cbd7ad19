"""Random matrices of every quantization scheme that a checkpoint can hold, for kernel tests."""

from __future__ import annotations

import numpy as np
import torch

from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import FP8_BLOCK128, FP8_CHANNEL, WHOLE_ROW, QuantScheme

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("Q4_0", 4, 32, 32, zero_point=8),
        QuantScheme("Q4_1", 4, 32, 32, offset_codec="min"),
        QuantScheme("Q5_0", 5, 32, 32, zero_point=16),
        QuantScheme("Q5_1", 5, 32, 32, offset_codec="min"),
        QuantScheme("Q8_0", 8, 32, 32, zero_point=128),
        QuantScheme("Q2_K", 2, 16, 256, "two_level", "two_level_min"),
        QuantScheme("Q3_K", 3, 16, 256, "two_level", zero_point=4),
        QuantScheme("Q4_K", 4, 32, 256, "two_level", "two_level_min"),
        QuantScheme("Q5_K", 5, 32, 256, "two_level", "two_level_min"),
        QuantScheme("Q6_K", 6, 16, 256, "two_level", zero_point=32),
        QuantScheme("IQ4_NL", 4, 32, 32, codebook=_IQ4),
        QuantScheme("IQ4_XS", 4, 32, 256, "two_level", codebook=_IQ4),
        FP8_CHANNEL,
        FP8_BLOCK128,
        QuantScheme("zero_point", 4, 128, 128, offset_codec="zero_point"),
        QuantScheme("zero_point8", 8, 32, 32, offset_codec="zero_point", scale_type="bf16"),
        QuantScheme("zero_point3", 3, WHOLE_ROW, WHOLE_ROW, offset_codec="zero_point"),
        QuantScheme("bf16_scales", 4, 128, 128, zero_point=8, scale_type="bf16"),
        QuantScheme("bf16_mins", 3, 64, 64, offset_codec="min", scale_type="bf16"),
        QuantScheme("bf16_mins6", 6, 32, 32, offset_codec="min", scale_type="bf16"),
    )
}

DENSE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# The widest sub-scales and sub-mins that each file format has.
_SUB_SCALE = {
    "Q2_K": (0, 16),
    "Q3_K": (-32, 32),
    "Q4_K": (0, 64),
    "Q5_K": (0, 64),
    "Q6_K": (-128, 128),
    "IQ4_XS": (-32, 32),
}
_SUB_MIN = {"Q2_K": 16, "Q4_K": 64, "Q5_K": 64}


def random_matrix(
    kind: str, rows: int, columns: int, seed: int = 0, scale_dtype: type[np.floating] = np.float16
) -> torch.Tensor | QuantizedMatrix:
    """A matrix [rows, columns] of one of SCHEMES or DENSE; columns may end inside a group."""
    rng = np.random.default_rng([seed, rows, columns, *kind.encode()])
    if kind in DENSE:
        return torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32)).to(DENSE[kind])
    return random_quantized(SCHEMES[kind], rows, columns, rng, scale_dtype)


def random_quantized(
    scheme: QuantScheme,
    rows: int,
    columns: int,
    rng: np.random.Generator,
    scale_dtype: type[np.floating] = np.float16,
) -> QuantizedMatrix:
    groups, supers = -(-columns // scheme.group_size), -(-columns // scheme.super_size)

    def floats(width: int) -> np.ndarray:
        values = (rng.standard_normal((rows, width)) * 0.01).astype(np.float32)
        if scheme.scale_type == "bf16" and scale_dtype is np.float16:
            return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return values.astype(scale_dtype).astype(np.float32)

    two_level, low = scheme.scale_codec == "two_level", scheme.offset_codec
    codes = rng.integers(0, 1 << scheme.bits, (rows, columns), dtype=np.uint8)
    if scheme.code_type == "e4m3":
        codes[codes & 0x7F == 0x7F] = 1  # NaN; subnormals are the other end
    return QuantizedMatrix(
        scheme,
        codes,
        floats(supers),
        rng.integers(*_SUB_SCALE.get(scheme.name, (-128, 128)), (rows, groups)).astype(np.int8) if two_level else None,
        floats(groups) if low == "min" else floats(supers) if low == "two_level_min" else None,
        rng.integers(0, _SUB_MIN.get(scheme.name, 256), (rows, groups), dtype=np.uint8)
        if low == "two_level_min"
        else rng.integers(0, 1 << scheme.bits, (rows, groups), dtype=np.uint8)
        if low == "zero_point"
        else None,
    )


def widened(matrix: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
    """The weights, fp32 [rows, columns], as the plain code has them; groups may be ragged."""
    if isinstance(matrix, torch.Tensor):
        return matrix.float()
    scheme, columns = matrix.scheme, matrix.shape[1]

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, min(scheme.group_size, columns), axis=1)[:, :columns]

    per_super = scheme.super_size // scheme.group_size
    groups = -(-columns // scheme.group_size)

    def per_group(values: np.ndarray) -> np.ndarray:
        return values if values.shape[1] == groups else np.repeat(values, per_super, axis=1)[:, :groups]

    values = matrix.values()
    if scheme.code_type == "e4m3":
        values = torch.from_numpy(matrix.codes).view(torch.float8_e4m3fn).float().numpy()
    if scheme.offset_codec == "zero_point":
        assert matrix.sub_min is not None
        values = values - spread(matrix.sub_min).astype(np.float32)
    scale = per_group(matrix.super_scale)
    if matrix.sub_scale is not None:
        scale = scale * matrix.sub_scale.astype(np.float32)
    out = values * spread(scale)
    if matrix.super_min is not None:
        low = per_group(matrix.super_min)
        out += spread(low if matrix.sub_min is None else -(low * matrix.sub_min.astype(np.float32)))
    return torch.from_numpy(out)
