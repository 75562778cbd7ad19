"""Types that llama.cpp's quantizer chooses: what is known of published files, and its own rules case by case."""

from __future__ import annotations

import pytest

from glmlocal.formats.llama_cpp_types import FILE_TYPES, tensor_type
from glmlocal.formats.schemes import DENSE_DTYPES, QUANTIZED_DTYPES, block_layout


@pytest.mark.parametrize(
    ("file_type", "role", "columns", "wanted"),
    [
        ("Q4_K_M", "", 4096, "Q4_K"),
        ("Q4_K_M", "output", 4096, "Q6_K"),
        ("Q8_0", "output", 4096, "Q8_0"),
        ("BF16", "output", 4096, "BF16"),
        ("IQ4_XS", "attn_v", 4096, "Q5_K"),
        ("Q2_K", "attn_v", 4096, "Q4_K"),
        ("Q2_K", "attn_output", 12288, "Q3_K"),
        ("Q3_K_M", "attn_output", 12288, "Q4_K"),
        ("Q3_K_L", "attn_output", 12288, "Q5_K"),
        ("Q4_K_M", "attn_output", 12288, "Q4_K"),
        ("Q3_K_S", "ffn_down", 1536, "Q3_K"),
        ("Q2_K", "ffn_down", 1536, "Q3_K"),
        # Air's widths: rows of 1408 and 10944 weights are no multiple of 256
        ("Q2_K", "ffn_down", 1408, "IQ4_NL"),
        ("IQ4_XS", "ffn_down", 1408, "IQ4_NL"),
        ("Q4_K_S", "", 1408, "Q5_0"),
        ("Q5_K_S", "", 10944, "Q5_1"),
        ("Q6_K", "ffn_down", 1408, "Q8_0"),
        ("Q4_0", "", 1408, "Q4_0"),
        ("Q6_K", "", 40, "F16"),
    ],
)
def test_type_in_the_middle_of_a_model(file_type: str, role: str, columns: int, wanted: str) -> None:
    assert tensor_type(file_type, role, columns, layer=11, num_layers=47) == wanted


def test_layers_that_get_more_bits() -> None:
    """Of 47: the first 5, the last 6, and every third between."""
    more = [i for i in range(47) if tensor_type("Q4_K_M", "ffn_down", 1536, i, 47) == "Q6_K"]
    assert more == [*range(5), *range(7, 41, 3), *range(41, 47)]
    assert more == [i for i in range(47) if tensor_type("Q5_K_M", "attn_v", 4096, i, 47) == "Q6_K"]


@pytest.mark.parametrize(
    ("file_type", "role", "early", "then", "count"),
    [
        ("Q4_K_S", "ffn_down", "Q5_K", "Q4_K", 93 // 8),
        ("Q4_K_S", "attn_v", "Q5_K", "Q4_K", 4),
        ("Q3_K_M", "ffn_down", "Q5_K", "Q4_K", 93 // 16),
        ("Q3_K_M", "attn_v", "Q5_K", "Q4_K", 2),
        ("Q4_0", "ffn_down", "Q4_1", "Q4_0", 93 // 8),
        ("Q5_0", "ffn_down", "Q5_1", "Q5_0", 93 // 8),
    ],
)
def test_early_layers(file_type: str, role: str, early: str, then: str, count: int) -> None:
    assert [tensor_type(file_type, role, 5120, i, 93) for i in range(93)] == [early] * count + [then] * (93 - count)


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("columns", [1408, 1536, 4096, 10944])
@pytest.mark.parametrize("role", ["", "output", "attn_v", "attn_output", "ffn_down"])
def test_every_type_is_one_that_the_kernels_have_and_that_fits_the_rows(
    file_type: str, columns: int, role: str
) -> None:
    for layer in range(47):
        found = tensor_type(file_type, role, columns, layer, 47)
        assert found in DENSE_DTYPES | QUANTIZED_DTYPES
        assert found in DENSE_DTYPES or columns % block_layout(found)[0] == 0
