"""Forms in which releases store matrices: bytes in the file, and the scheme that the kernels make of them. Torch-free.

What is known of a form without a file at hand; where there is one, ``safetensors`` and ``gguf`` tell. Sources:
AutoAWQ and GPTQModel (one int32 word holds 32 / bits codes; fp16 scale and packed zero point per group; GPTQ one int32
``g_idx`` per column), mlx (bf16 scale and bias per group of 64), compressed-tensors ``pack-quantized`` (fp16 or bf16
scale), ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmlocal.formats.packed_size import packed_bytes
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
from glmlocal.formats.stored_matrix import scheme


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

    @property
    def is_integer(self) -> bool:
        """Do products round activations to int8 where those are used (``kernels.reference.takes_int8``)?"""
        return self.scheme is not None and self.scheme.means_int8

    def file_bytes(self, rows: int, columns: int) -> int:
        """In a release's file, with scales and zero points."""
        groups = -(-rows // self.group_rows) * -(-columns // self.group_columns)
        num_bits = rows * columns * self.bits + groups * self.group_bits + columns * self.column_bits
        return -(-num_bits // 8)

    def held_bytes(self, rows: int, columns: int) -> int:
        """In memory, packed for the kernels."""
        return packed_bytes(rows, columns, self.name if self.scheme is None else self.scheme)


def _ggml(dtype: str) -> Form:
    found = scheme_of(dtype)
    weights, num_bytes = block_layout(dtype)
    return Form(dtype, found, found.bits, weights, 8 * num_bytes - weights * found.bits)


def _gptq(bits: int) -> Form:
    found = scheme("gptq", bits, 128, "symmetric", "f16")
    return Form(found.name, found, bits, 128, 16 + bits, column_bits=32)


def _mlx(bits: int) -> Form:
    found = scheme("mlx", bits, 64, "min", "bf16")
    return Form(found.name, found, bits, 64, 32)


def _compressed(bits: int, group: int) -> Form:
    found = scheme("compressed", bits, group, "symmetric", "bf16")
    return Form(found.name, found, bits, group, 16)


_AWQ = scheme("awq", 4, 128, "zero_point", "f16")

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
        _compressed(4, 128),
        _compressed(8, 128),
        _compressed(8, WHOLE_ROW),
        Form(INT4.name, INT4, 4, 32, 16),  # what --quant makes; in no file
        Form(INT8.name, INT8, 8, 32, 16),
    )
}
