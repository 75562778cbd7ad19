"""Which type llama.cpp's quantizer gives each tensor of a file that is called Q4_K_M and the like. Torch-free.

The rules of ``llama_tensor_get_type`` and ``tensor_type_fallback`` (llama.cpp src/llama-quant.cpp, 2025 and 2026) for
models with grouped attention and other than 8 experts, with an importance matrix, as published files are made.
Publishers may deviate (Unsloth's dynamic "UD" mixes do), so what follows from it is an estimate.
"""

from __future__ import annotations

from functools import lru_cache

from glmlocal.formats.schemes import QUANTIZED_DTYPES, block_layout

FILE_TYPES = (
    *("BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
# For widths that are no multiple of 256; newer versions take Q4_0 for Q2_K and Q3_K, which is as large as IQ4_NL.
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_ATTN_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_ATTN_V = {"Q2_K": "Q4_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
_FFN_DOWN = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}


@lru_cache(maxsize=1 << 14)
def tensor_type(file_type: str, role: str, columns: int, layer: int = 0, num_layers: int = 1) -> str:
    """Type of a matrix with rows of ``columns`` weights, in block ``layer`` of ``num_layers`` (MTP blocks counted).

    ``file_type`` is one of FILE_TYPES; ``role`` is "output", "attn_v", "attn_output", "ffn_down", or anything else.
    """
    default = file_type.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    if default not in QUANTIZED_DTYPES:
        return default
    chosen = {"output": _output, "attn_v": _attn_v, "attn_output": _attn_output, "ffn_down": _ffn_down}.get(role)
    wanted = default if chosen is None else chosen(file_type, default, layer, num_layers)
    if columns % block_layout(wanted)[0] == 0:
        return wanted
    narrow = _FALLBACK.get(wanted, wanted)
    return narrow if columns % block_layout(narrow)[0] == 0 else "F16"


def _output(file_type: str, default: str, layer: int, num_layers: int) -> str:
    return "Q8_0" if file_type == "Q8_0" else "Q6_K"


def _attn_output(file_type: str, default: str, layer: int, num_layers: int) -> str:
    return _ATTN_OUTPUT.get(file_type, default)


def _attn_v(file_type: str, default: str, layer: int, num_layers: int) -> str:
    if file_type in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, num_layers):
        return "Q6_K"
    if (file_type == "Q4_K_S" and layer < 4) or (file_type == "Q3_K_M" and layer < 2):
        return "Q5_K"
    return _ATTN_V.get(file_type, default)


def _ffn_down(file_type: str, default: str, layer: int, num_layers: int) -> str:
    if file_type in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, num_layers):
        return "Q6_K"
    if file_type == "Q3_K_M" and layer < num_layers // 16:
        return "Q5_K"
    early = {"Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}
    if layer < num_layers // 8 and file_type in early:
        return early[file_type]
    return _FFN_DOWN.get(file_type, default)


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    first = num_layers // 8
    return layer < first or layer >= 7 * num_layers // 8 or (layer - first) % 3 == 2
