from __future__ import annotations

import gguf
import numpy as np
import pytest

from crafted import HALF_FIELDS, random_blocks
from glmlocal.errors import CheckpointError
from glmlocal.formats.ggml_blocks import unpack, view_dense
from glmlocal.formats.schemes import DENSE_DTYPES, QUANTIZED_DTYPES, block_layout


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_block_layout_is_that_of_the_gguf_package(dtype: str) -> None:
    assert block_layout(dtype) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]


def test_all_promised_types_are_there() -> None:
    assert set(HALF_FIELDS) == QUANTIZED_DTYPES
    assert {"F32", "F16", "BF16"} == DENSE_DTYPES


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_every_value_of_every_byte_of_a_block_counts_as_in_gguf(dtype: str) -> None:
    """For each byte of a block, 256 blocks that differ in that byte alone: no bit is ignored, swapped or misplaced."""
    block, size = block_layout(dtype)
    fixed = {at + i for at in HALF_FIELDS[dtype] for i in (0, 1)}
    base = random_blocks(dtype, 1, np.random.default_rng(7))
    for at in HALF_FIELDS[dtype]:
        base[0, at : at + 2] = np.frombuffer(np.float16(0.37 + at).tobytes(), np.uint8)
    free = [at for at in range(size) if at not in fixed]
    raw = np.repeat(base, 256 * len(free), axis=0)
    for i, at in enumerate(free):
        raw[256 * i : 256 * (i + 1), at] = np.arange(256)
    with np.errstate(over="ignore"):
        got = unpack(dtype, raw.reshape(-1), (len(raw), block)).dequantize()
        wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    finite = np.isfinite(wanted).all(axis=1)  # scales of IQ1_M and MXFP4 are in bytes that are not HALF_FIELDS
    assert (~finite).sum() <= 64
    got, wanted = got[finite], wanted[finite]
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_every_finite_fp16_scale_and_minimum_counts_as_in_gguf(dtype: str) -> None:
    block, _ = block_layout(dtype)
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[(halves & 0x7C00) != 0x7C00]
    raw = random_blocks(dtype, len(halves), np.random.default_rng(8))
    rng = np.random.default_rng(9)
    for at in HALF_FIELDS[dtype]:
        raw[:, at : at + 2] = rng.permutation(halves).astype("<u2").reshape(-1, 1).view(np.uint8)
    got = unpack(dtype, raw, (len(raw), block)).dequantize()
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_the_scheme_describes_the_arrays(dtype: str) -> None:
    block, _ = block_layout(dtype)
    rows, columns = 5, 3 * block
    matrix = unpack(dtype, random_blocks(dtype, 15, np.random.default_rng(1)), (rows, columns))
    scheme = matrix.scheme
    assert scheme.name == dtype
    assert matrix.shape == (rows, columns)
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.max() < 1 << scheme.bits
    assert matrix.codes.flags.c_contiguous
    assert matrix.super_scale.dtype == np.float32
    assert matrix.super_scale.shape == (rows, columns // scheme.super_size)
    groups = (rows, columns // scheme.group_size)
    assert (scheme.scale_codec == "two_level") == (matrix.sub_scale is not None)
    assert matrix.sub_scale is None or (matrix.sub_scale.dtype, matrix.sub_scale.shape) == (np.int8, groups)
    assert (scheme.offset_codec == "symmetric") == (matrix.super_min is None)
    assert (scheme.offset_codec == "two_level_min") == (matrix.sub_min is not None)
    assert matrix.sub_min is None or (matrix.sub_min.dtype, matrix.sub_min.shape) == (np.uint8, groups)


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_a_range_of_rows_is_those_rows(dtype: str) -> None:
    block, size = block_layout(dtype)
    raw = random_blocks(dtype, 12, np.random.default_rng(2)).reshape(6, 2 * size)
    whole = unpack(dtype, raw, (6, 2 * block)).dequantize()
    part = unpack(dtype, raw[2:5], (3, 2 * block)).dequantize()
    np.testing.assert_array_equal(part, whole[2:5])


def test_bytes_that_start_anywhere_and_cannot_be_written_are_fine() -> None:
    raw = random_blocks("Q6_K", 2, np.random.default_rng(3)).reshape(-1)
    shifted = np.frombuffer(b"\0" + raw.tobytes(), np.uint8)[1:]
    assert not shifted.flags.writeable
    np.testing.assert_array_equal(unpack("Q6_K", shifted, (2, 256)).codes, unpack("Q6_K", raw, (2, 256)).codes)


@pytest.mark.parametrize(
    ("dtype", "num_bytes", "shape", "words"),
    [
        ("Q4_K", 144, (1, 128), "Q4_K"),
        ("Q4_K", 143, (1, 256), "143"),
        ("Q4_0", 18, (32,), "32"),
        ("Q4_0", 36, (1, 2, 32), "2, 32"),
        ("Q1_0", 18, (1, 128), "Q1_0"),
    ],
)
def test_what_does_not_fit_is_refused(dtype: str, num_bytes: int, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        unpack(dtype, np.zeros(num_bytes, np.uint8), shape)


def test_dense_views() -> None:
    numbers = np.array([[1.5, -2.0], [0.0, 3.25]], np.float32)
    raw = numbers.view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(view_dense("F32", raw, (2, 2)), numbers)
    np.testing.assert_array_equal(
        view_dense("F16", numbers.astype(np.float16).view(np.uint8).reshape(-1), (4,))[3], 3.25
    )
    bits = view_dense("BF16", (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1), (2, 2))
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32), numbers)
    with pytest.raises(CheckpointError, match="16 bytes"):
        view_dense("F32", raw, (2, 3))
