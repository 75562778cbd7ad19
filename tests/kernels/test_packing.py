"""Kernel layout: pack → unpack is the identity, decoding is exact, nothing malformed gets in."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.formats.quant import QuantizedMatrix, QuantScheme
from glmlocal.kernels import cpu
from quantized import DENSE, SCHEMES, random_matrix, random_quantized, widened

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu, packing

_ARRAYS = ("codes", "super_scale", "sub_scale", "super_min", "sub_min")


def assert_same(found: torch.Tensor | QuantizedMatrix, wanted: torch.Tensor | QuantizedMatrix) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        return
    assert isinstance(found, QuantizedMatrix)
    assert found.scheme == wanted.scheme
    for name in _ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name, strict=True)


@pytest.mark.parametrize("kind", [*SCHEMES, *DENSE])
@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 32), (15, 256), (16, 64), (17, 512), (64, 32), (65, 256), (192, 576)]
)
def test_unpack_gives_back_what_was_packed(kind: str, scale_dtype: type, rows: int, columns: int) -> None:
    matrix = random_matrix(kind, rows, columns, scale_dtype=scale_dtype)
    assert_same(packing.unpack(packing.pack(matrix)), matrix)


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([16, 32, 64, 128]),
    supers=st.sampled_from([1, 2, 8]),
    offset=st.sampled_from(["symmetric", "min", "two_level_min"]),
    rows=st.integers(1, 130),
    columns=st.integers(1, 400),
    seed=st.integers(0, 1 << 32),
)
def test_every_combination_of_codecs_round_trips_and_decodes_exactly(
    bits: int, group: int, supers: int, offset: str, rows: int, columns: int, seed: int
) -> None:
    two_level = "two_level" if supers > 1 or offset == "two_level_min" else "plain"
    scheme = QuantScheme("any", bits, group, group * supers, two_level, offset, zero_point=(1 << bits) // 2)  # type: ignore[arg-type]
    matrix = random_quantized(scheme, rows, columns, np.random.default_rng(seed))
    packed = packing.pack(matrix)
    assert_same(packing.unpack(packed), matrix)
    # Wide sub-scales and an offset round twice in plain fp32 and once when fused: a rounding of the product apart.
    wanted = widened(matrix)
    error = (packed.dequantize() - wanted).abs()
    assert float(error.max()) <= 2.0**-23 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", [*SCHEMES, *DENSE])
def test_kernels_decode_the_weights_of_gguf_schemes_exactly(isa: str, kind: str) -> None:
    matrix = random_matrix(kind, 81, 512)
    assert torch.equal(packing.pack(matrix).dequantize(), widened(matrix))


_BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q8_0": 8.5, "Q2_K": 3.125, "Q3_K": 3.5625, "Q4_K": 4.625, "Q5_K": 5.625}
_BITS |= {"Q6_K": 6.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.3125, "bf16": 16, "f16": 16, "f32": 32}


@pytest.mark.parametrize(("kind", "bits"), _BITS.items())
def test_memory_per_weight_is_about_that_of_the_file(kind: str, bits: float) -> None:
    rows, columns = 192, 1024
    assert packing.pack(random_matrix(kind, rows, columns)).nbytes * 8 / (rows * columns) == bits


def test_a_codebook_too_long_for_the_kernels_is_widened_to_fp32() -> None:
    scheme = QuantScheme("wide", 5, 32, 32, codebook=tuple(range(-50, 46, 3)))
    matrix = random_quantized(scheme, 20, 64, np.random.default_rng(0))
    packed = packing.pack(matrix)
    assert packed.kind == "wide"
    assert_same(packing.unpack(packed), torch.from_numpy(matrix.dequantize()))
    assert torch.equal(packed.dequantize(), torch.from_numpy(matrix.dequantize()))


def test_several_threads_may_pack_at_once() -> None:
    matrices = [random_matrix(kind, 70, 512, seed) for seed in range(4) for kind in SCHEMES]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(packing.pack, matrices))
    for matrix, weight in zip(matrices, packed, strict=True):
        assert_same(packing.unpack(weight), matrix)


@pytest.mark.parametrize("array", ["super_scale", "sub_scale", "super_min", "sub_min"])
def test_arrays_of_the_wrong_shape_are_refused_by_name(array: str) -> None:
    matrix = random_matrix("Q4_K", 16, 512)
    values = getattr(matrix, array)
    for wrong in (None, values[:, :-1], values[:-1]):
        with pytest.raises(ValueError, match=f"{array} wanted .* found"):
            packing.pack(dataclasses.replace(matrix, **{array: wrong}))


def test_codes_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix("Q4_0", 16, 64)
    codes = matrix.codes.copy()
    codes[3, 5] = 16
    with pytest.raises(ValueError, match="code 16 does not fit in 4 bits"):
        packing.pack(dataclasses.replace(matrix, codes=codes))


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4), torch.zeros(2, 2, 2)])
def test_other_tensors_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="two-dimensional fp32, bf16 or fp16"):
        packing.pack(tensor)


def test_native_matrices_check_their_buffer() -> None:
    format_ = _cpu.MatrixFormat("u4", group_size=32, super_size=32)
    layout = _cpu.matrix_layout(64, 64, format_)
    values = [0.0] * 16
    buffer = _cpu.allocate(layout.num_bytes + 64)
    with pytest.raises(ValueError, match="wanted"):
        _cpu.Matrix(layout, format_, buffer, 0, values)
    with pytest.raises(ValueError, match="multiple of 64"):
        _cpu.Matrix(layout, format_, buffer[16 : 16 + layout.num_bytes], 0, values)
    with pytest.raises(ValueError, match="3 values for codes of 4 bits"):
        _cpu.Matrix(layout, format_, buffer[: layout.num_bytes], 0, values[:3])
    with pytest.raises(TypeError):
        _cpu.Matrix(layout, format_, buffer[: layout.num_bytes].astype(np.int32), 0, values)
    with pytest.raises(ValueError, match="powers of two"):
        _cpu.matrix_layout(64, 64, _cpu.MatrixFormat("u4", group_size=48, super_size=48))
    with pytest.raises(ValueError, match="wanted sizes"):
        _cpu.matrix_layout(-1, 64, format_)
    with pytest.raises(ValueError, match="not one of"):
        _cpu.MatrixFormat("u7")


def test_a_matrix_of_another_format_than_its_layout_is_refused() -> None:
    plain = _cpu.MatrixFormat("u4", group_size=32, super_size=32)
    layout = _cpu.matrix_layout(64, 64, plain)
    buffer = _cpu.allocate(layout.num_bytes)
    with pytest.raises(ValueError, match="layout"):
        _cpu.Matrix(layout, _cpu.MatrixFormat("u8", group_size=32, super_size=32), buffer, 128, [])


def test_the_buffer_lives_as_long_as_the_weight() -> None:
    matrix = random_matrix("Q4_0", 64, 64)
    native = packing.pack(matrix).native
    others = [packing.pack(random_matrix("Q8_0", 64, 64, seed)) for seed in range(20)]
    out = torch.empty(64, 64)
    native.unpack(out.data_ptr())
    assert torch.equal(out, widened(matrix))
    assert len(others) == 20
