"""Schemes: how weights can be stored, without the weights. Pure values, no numpy, so that planning loads none.

A scheme factors into bits × group size × scale codec × offset codec, so that GGUF's legacy and K types, FP8, GPTQ, AWQ,
compressed-tensors' integers and MLX all become the same few arrays for one family of kernels; ``quant`` has the arrays
and the formula. Block sizes of GGUF's types: ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

WHOLE_ROW = 1 << 24  # as a group size: one scale per row, since no row is longer

ScaleType = Literal["f16", "bf16", "f32"]
Activations = Literal["int8", "fp32"]  # what weights of integer codes are multiplied with


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How codes become weights; everything but the arrays."""

    name: str  # as the source calls it, e.g. "Q4_K"; shown to people, never switched on
    bits: int  # 2, 3, 4, 5, 6 or 8: codes are 0 … 2**bits - 1
    group_size: int  # input columns per scale
    super_size: int  # input columns per super scale; equal to group_size when scale_codec is "plain"
    scale_codec: Literal["plain", "two_level"] = "plain"
    offset_codec: Literal["symmetric", "min", "two_level_min", "zero_point"] = "symmetric"
    zero_point: int = 0  # of all groups; one per group is an offset codec
    codebook: tuple[int, ...] | None = None
    code_type: Literal["integer", "e4m3"] = "integer"
    scale_type: ScaleType = "f16"  # of scales and mins, as stored; e4m3's are held times 2^120, which is beyond 16 bits

    @property
    def means_int8(self) -> bool:
        """Do codes mean integers of 8 bits, with or without a sign? Products with int8 activations need it."""
        if self.code_type != "integer" or self.codebook is not None:
            return self.code_type == "integer" and self.bits == 4
        if self.offset_codec != "symmetric":
            return self.zero_point == 0
        return self.zero_point <= 128 and (1 << self.bits) - 1 - self.zero_point <= 127


FP8_CHANNEL = QuantScheme("fp8_channel", 8, WHOLE_ROW, WHOLE_ROW, code_type="e4m3", scale_type="f32")
FP8_BLOCK128 = QuantScheme(
    "fp8_block128", 8, 128, 128, code_type="e4m3", scale_type="f32"
)  # rows of a block repeat its scale

# fmt: off
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # fp4
# fmt: on
MXFP4 = QuantScheme("MXFP4", 4, 32, 32, codebook=E2M1_DOUBLED, scale_type="bf16")
NVFP4 = QuantScheme("NVFP4", 4, 16, 16, codebook=E2M1_DOUBLED)
NVFP4_GLOBAL = replace(NVFP4, name="NVFP4 with a scale of the whole", scale_type="f32")

# What ``quantize`` makes.
INT4 = QuantScheme("int4", 4, 32, 32, zero_point=8)
INT8 = QuantScheme("int8", 8, 32, 32, zero_point=128)


@dataclass(frozen=True, slots=True)
class Block:
    """A quantized type of GGUF: the weights that ``num_supers`` super scales cover, in a fixed number of bytes."""

    nbytes: int
    scheme: QuantScheme
    num_supers: int = 1

    @property
    def weights(self) -> int:
        return self.num_supers * self.scheme.super_size


def _k_scheme(name: str, bits: int, group: int, zero_point: int | None = None) -> QuantScheme:
    if zero_point is None:
        return QuantScheme(name, bits, group, 256, "two_level", "two_level_min")
    return QuantScheme(name, bits, group, 256, "two_level", zero_point=zero_point)


def _grid_scheme(name: str, group: int, upper: tuple[int, ...], lower: tuple[int, ...]) -> QuantScheme:
    """``ggml_grids``: the upper bit of a code chooses between two lists of at most eight values. Scales are eighths and
    quarters of fp16 numbers, which fp16 cannot always hold."""
    codebook = tuple(list_[i] if i < len(list_) else 0 for list_ in (upper, lower) for i in range(8))
    return QuantScheme(name, 4, group, 256, "two_level", codebook=codebook, scale_type="f32")


def _signed_scheme(name: str, group: int, magnitudes: tuple[int, ...]) -> QuantScheme:
    return _grid_scheme(name, group, magnitudes, tuple(-value for value in magnitudes))


# fmt: off
_IQ1_VALUES = ((-7, 1, 9), (-9, -1, 7))  # eighths of -1, 0 and 1, moved up or down by one
_IQ2_VALUES = (8, 25, 43)
_IQ3_XXS_VALUES, _IQ3_S_VALUES = (4, 12, 20, 28, 36, 44, 52, 62), (1, 3, 5, 7, 9, 11, 13, 15)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# fmt: on
GGML_BLOCKS = {
    "Q8_0": Block(34, QuantScheme("Q8_0", 8, 32, 32, zero_point=128)),
    "Q4_0": Block(18, QuantScheme("Q4_0", 4, 32, 32, zero_point=8)),
    "Q4_1": Block(20, QuantScheme("Q4_1", 4, 32, 32, offset_codec="min")),
    "Q5_0": Block(22, QuantScheme("Q5_0", 5, 32, 32, zero_point=16)),
    "Q5_1": Block(24, QuantScheme("Q5_1", 5, 32, 32, offset_codec="min")),
    "Q2_K": Block(84, _k_scheme("Q2_K", 2, 16)),
    "Q3_K": Block(110, _k_scheme("Q3_K", 3, 16, zero_point=4)),
    "Q4_K": Block(144, _k_scheme("Q4_K", 4, 32)),
    "Q5_K": Block(176, _k_scheme("Q5_K", 5, 32)),
    "Q6_K": Block(210, _k_scheme("Q6_K", 6, 16, zero_point=32)),
    "IQ4_NL": Block(18, QuantScheme("IQ4_NL", 4, 32, 32, codebook=_IQ4_VALUES)),
    "IQ4_XS": Block(136, QuantScheme("IQ4_XS", 4, 32, 256, "two_level", codebook=_IQ4_VALUES)),
    "IQ1_S": Block(50, _grid_scheme("IQ1_S", 32, *_IQ1_VALUES)),
    "IQ1_M": Block(56, _grid_scheme("IQ1_M", 16, *_IQ1_VALUES)),
    "IQ2_XXS": Block(66, _signed_scheme("IQ2_XXS", 32, _IQ2_VALUES)),
    "IQ2_XS": Block(74, _signed_scheme("IQ2_XS", 16, _IQ2_VALUES)),
    "IQ2_S": Block(82, _signed_scheme("IQ2_S", 16, _IQ2_VALUES)),
    "IQ3_XXS": Block(98, _signed_scheme("IQ3_XXS", 32, _IQ3_XXS_VALUES)),
    "IQ3_S": Block(110, _signed_scheme("IQ3_S", 32, _IQ3_S_VALUES)),
    "MXFP4": Block(17, MXFP4),
    "NVFP4": Block(36, NVFP4, num_supers=4),
    "TQ1_0": Block(54, QuantScheme("TQ1_0", 2, 256, 256, zero_point=1)),
    "TQ2_0": Block(66, QuantScheme("TQ2_0", 2, 256, 256, zero_point=1)),
}
QUANTIZED_DTYPES = frozenset(GGML_BLOCKS)
DENSE_DTYPES = frozenset(("F32", "F16", "BF16"))


def scheme_of(dtype: str) -> QuantScheme:
    """What ``ggml_blocks.unpack`` makes of a quantized type."""
    return GGML_BLOCKS[dtype].scheme


def block_layout(dtype: str) -> tuple[int, int]:
    """Weights and bytes of one block of a quantized type."""
    return GGML_BLOCKS[dtype].weights, GGML_BLOCKS[dtype].nbytes
