"""Forms in which releases store matrices: bytes in the file, and the scheme that the kernels make of them. Torch-free.

What is known of a form without a file at hand; where there is one, ``safetensors`` and ``gguf`` tell. Sources:
AutoAWQ and GPTQModel (one int32 word holds 32 / bits codes; fp16 scale and packed zero point per group; GPTQ one int32
``g_idx`` per column), mlx (bf16 scale and bias per group of 64), compressed-tensors ``pack-quantized`` (fp16 or bf16
scale), ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmlocal.formats.packed_size import ScaleType, packed_bytes
from glmlocal.formats.schemes import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    INT4,
    INT8,
    QUANTIZED_DTYPES,
    WHOLE_ROW,
    QuantScheme,
    block_layout,
    scheme_of,
)


@dataclass(frozen=True, slots=True)
class Form:
    """bits · weights + group_bits · groups + column_bits · columns; a group is group_rows × group_columns."""

    name: str  # as a recipe of the catalogue and a Part call it
    scheme: QuantScheme | None  # None: plain floats
    bits: int
    group_columns: int = WHOLE_ROW
    group_bits: int = 0
    group_rows: int = 1
    column_bits: int = 0
    scales: ScaleType | None = None  # None: ``packed_size.scale_type`` of the scheme

    @property
    def is_integer(self) -> bool:
        """Do products round activations to int8 where those are used (``kernels.reference.takes_int8``)?"""
        scheme = self.scheme
        return scheme is not None and scheme.code_type == "integer" and (scheme.codebook is None or scheme.bits == 4)

    def file_bytes(self, rows: int, columns: int) -> int:
        """In a release's file, with scales and zero points."""
        groups = -(-rows // self.group_rows) * -(-columns // self.group_columns)
        num_bits = rows * columns * self.bits + groups * self.group_bits + columns * self.column_bits
        return -(-num_bits // 8)

    def held_bytes(self, rows: int, columns: int) -> int:
        """In memory, packed for the kernels."""
        return packed_bytes(rows, columns, self.name if self.scheme is None else self.scheme, self.scales)


def _ggml(dtype: str) -> Form:
    scheme = scheme_of(dtype)
    weights, num_bytes = block_layout(dtype)
    return Form(dtype, scheme, scheme.bits, weights, 8 * num_bytes - weights * scheme.bits)


def _gptq(bits: int) -> Form:
    name = f"gptq int{bits} group 128"
    scheme = QuantScheme(name, bits, 128, 128, zero_point=1 << (bits - 1))
    return Form(name, scheme, bits, 128, 16 + bits, column_bits=32)


def _mlx(bits: int) -> Form:
    name = f"mlx {bits}-bit group 64"
    return Form(name, QuantScheme(name, bits, 64, 64, offset_codec="min"), bits, 64, 32, scales="f32")


def _compressed(bits: int, group: int, words: str) -> Form:
    name = f"compressed int{bits} {words}"
    return Form(name, QuantScheme(name, bits, group, group, zero_point=1 << (bits - 1)), bits, group, 16, scales="f32")


_AWQ = QuantScheme("awq int4 group 128", 4, 128, 128, offset_codec="zero_point")

FORMS = {
    form.name: form
    for form in (
        Form("f32", None, 32),
        Form("bf16", None, 16),
        Form("f16", None, 16),
        Form("fp8_channel", FP8_CHANNEL, 8, group_bits=32),
        Form("fp8_block128", FP8_BLOCK128, 8, 128, 32, group_rows=128),
        *map(_ggml, sorted(QUANTIZED_DTYPES)),
        *map(_gptq, (4, 8)),
        Form(_AWQ.name, _AWQ, 4, 128, 20),
        *map(_mlx, (2, 3, 4, 5, 6, 8)),
        _compressed(4, 128, "group 128"),
        _compressed(8, 128, "group 128"),
        _compressed(8, WHOLE_ROW, "per row"),
        Form(INT4.name, INT4, 4, 32, 16),  # what --quant makes; in no file
        Form(INT8.name, INT8, 8, 32, 16),
    )
}
