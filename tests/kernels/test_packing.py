"""Kernel layout: pack → unpack is the identity, decoding is exact, nothing malformed gets in."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import FP8_BLOCK128, FP8_CHANNEL, QuantScheme
from glmlocal.kernels import MatrixRows, cpu, reference
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
    offset=st.sampled_from(["symmetric", "min", "two_level_min", "zero_point"]),
    rows=st.integers(1, 130),
    columns=st.integers(1, 400),
    seed=st.integers(0, 1 << 32),
)
def test_every_combination_of_codecs_round_trips_and_decodes_exactly(
    bits: int, group: int, supers: int, offset: str, rows: int, columns: int, seed: int
) -> None:
    supers = 1 if offset == "zero_point" else supers
    two_level = "two_level" if supers > 1 or offset == "two_level_min" else "plain"
    scheme = QuantScheme(
        "any",
        bits,
        group,
        group * supers,
        two_level,
        offset,
        zero_point=0 if offset == "zero_point" else (1 << bits) // 2,
    )  # type: ignore[arg-type]
    matrix = random_quantized(scheme, rows, columns, np.random.default_rng(seed))
    packed = packing.pack(matrix)
    assert_same(packing.unpack(packed), matrix)
    # Wide sub-scales and an offset round twice in plain fp32 and once when fused: a rounding of the product apart.
    wanted = widened(matrix)
    np.testing.assert_array_equal(matrix.dequantize(), wanted.numpy())
    error = (packed.dequantize() - wanted).abs()
    assert float(error.max()) <= 2.0**-23 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", [*SCHEMES, *DENSE])
def test_kernels_decode_the_weights_of_checkpoints_exactly(isa: str, kind: str) -> None:
    matrix = random_matrix(kind, 81, 512)
    assert torch.equal(packing.pack(matrix).dequantize(), widened(matrix))


_BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q8_0": 8.5, "Q2_K": 3.125, "Q3_K": 3.5625, "Q4_K": 4.625, "Q5_K": 5.625}
_BITS |= {
    "fp8_channel": 8 + 32 / 1024,
    "fp8_block128": 8.25,
    "zero_point": 4 + 24 / 128,
    "Q6_K": 6.5625,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.3125,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
}


@pytest.mark.parametrize(("kind", "bits"), _BITS.items())
def test_memory_per_weight_is_about_that_of_the_file(kind: str, bits: float) -> None:
    rows, columns = 192, 1024
    assert packing.pack(random_matrix(kind, rows, columns)).nbytes * 8 / (rows * columns) == bits


def test_every_fp8_code_is_decoded_exactly(isa: str) -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    codes = np.stack([np.roll(codes, n) for n in range(17)])
    scale = np.geomspace(1e-30, 100, 17, dtype=np.float32)[:, None]
    matrix = QuantizedMatrix(FP8_CHANNEL, codes, scale)
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * torch.from_numpy(scale)
    packed = packing.pack(matrix)
    assert torch.equal(packed.dequantize(), wanted)
    assert torch.equal(reference.pack(matrix).values, wanted)
    assert_same(packing.unpack(packed), matrix)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_of_fp8_is_refused(code: int) -> None:
    matrix = random_quantized(FP8_BLOCK128, 20, 200, np.random.default_rng(0))
    matrix.codes[19, 199] = code
    with pytest.raises(ValueError, match="a code is NaN"):
        packing.pack(matrix)


@pytest.mark.parametrize("scale", [256, np.inf, np.nan])
def test_fp8_scales_that_the_kernels_cannot_hold_are_refused(scale: float) -> None:
    matrix = random_quantized(FP8_CHANNEL, 20, 64, np.random.default_rng(0))
    matrix.super_scale[7] = scale
    with pytest.raises(ValueError, match="finite and below 256"):
        packing.pack(matrix)


@pytest.mark.parametrize("kind", ["Q4_K", "fp8_block128", "zero_point", "bf16", "f32"])
def test_rows_read_a_range_at_a_time_pack_to_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(kind, 333, 512)
    whole = packing.pack(matrix)
    monkeypatch.setattr(packing, "_CHUNK_WEIGHTS", 512 * 100)
    ranges: list[tuple[int, int]] = []
    rows = MatrixRows.of(matrix)

    def read(begin: int, end: int) -> torch.Tensor | QuantizedMatrix:
        ranges.append((begin, end))
        return rows.read(begin, end)

    parts = packing.pack(MatrixRows((333, 512), read))
    np.testing.assert_array_equal(parts.buffer, whole.buffer)
    assert parts.kind == whole.kind
    assert ranges[-6:] == [(begin, min(begin + 64, 333)) for begin in range(0, 333, 64)]
    with pytest.raises(ValueError, match=r"rows 0 … 64 of \[334, 512\] came as \[63, 512\]"):
        packing.pack(MatrixRows((334, 512), lambda begin, end: rows.read(begin, end - 1)))


def test_a_late_scale_that_is_no_fp16_makes_all_scales_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix("Q4_0", 200, 64)
    matrix.super_scale[199, 1] = 1e-9
    monkeypatch.setattr(packing, "_CHUNK_WEIGHTS", 64 * 64)
    packed = packing.pack(matrix)
    assert packed.format.scale_type == "f32"
    assert_same(packing.unpack(packed), matrix)


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


@pytest.mark.parametrize("values", [None, np.zeros((16, 3), np.uint8), np.zeros((15, 4), np.uint8)])
def test_zero_points_of_the_wrong_shape_are_refused(values: np.ndarray | None) -> None:
    matrix = random_matrix("zero_point", 16, 512)
    with pytest.raises(ValueError, match=r"sub_min wanted .* found"):
        packing.pack(dataclasses.replace(matrix, sub_min=values))


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
