from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crafted import random_blocks
from glmlocal.formats.ggml_blocks import unpack
from glmlocal.formats.schemes import QUANTIZED_DTYPES, block_layout


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_dequantized_weights_equal_those_of_the_gguf_package_bit_for_bit(
    dtype: str, rows: int, blocks: int, seed: int
) -> None:
    block, size = block_layout(dtype)
    raw = random_blocks(dtype, rows * blocks, np.random.default_rng(seed)).reshape(rows, blocks * size)
    got = unpack(dtype, raw, (rows, blocks * block)).dequantize()
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))
