"""linear: right within fp32 rounding for every scheme, shape and ISA, and the same bits in any batch, on any thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from glmlocal import kernels
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import QuantScheme
from glmlocal.kernels import cpu, reference
from quantized import DENSE, SCHEMES, random_matrix, random_quantized, widened

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu

ROWS = 33
SMALL = [(1, 256), (15, 32), (16, 64), (17, 512), (64, 32), (100, 256), (192, 576)]
DENSE_ONLY = [(1, 1), (5, 7), (16, 31), (33, 97), (257, 13)]
REAL = [("Q4_0", 1408, 4096), ("Q6_K", 192, 4096), ("Q5_0", 4096, 1408), ("bf16", 128, 4096), ("Q8_0", 576, 576)]
REAL += [
    ("fp8_channel", 128, 10944),
    ("fp8_block128", 192, 10944),
    ("zero_point", 64, 10944),
    ("fp8_block128", 4096, 1408),
]


def check(kind: str, out_features: int, in_features: int, activations: reference.Activations) -> None:
    """All rows at once against float64, then every small batch against those rows, bit for bit."""
    matrix = random_matrix(kind, out_features, in_features)
    assert kernels.pack(matrix).kind == kind
    check_matrix(matrix, activations)


def check_matrix(matrix: torch.Tensor | QuantizedMatrix, activations: reference.Activations) -> None:
    out_features, in_features = matrix.shape
    weight = kernels.pack(matrix, activations)
    is_integer = isinstance(matrix, QuantizedMatrix) and matrix.scheme.means_int8
    assert weight.int8_activations == (activations == "int8" and is_integer)
    assert weight.shape == (out_features, in_features)
    wide = widened(matrix).double()
    generator = torch.Generator().manual_seed(out_features * 10007 + in_features)
    x = torch.randn(ROWS, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)

    kernels.linear(x, weight)
    _cpu.poison_scratch()
    y = kernels.linear(x, weight)
    seen = reference.int8_rounded(x) if weight.int8_activations else x
    error = (y.double() - seen.double() @ wide.T).abs()
    # The chain rounds in_features times, up or down: about the root of that many half units of the sum of magnitudes.
    tolerance = 2.0**-24 * (4 + 4 * in_features**0.5) * (x.double().abs() @ wide.abs().T)
    assert bool((error <= tolerance).all()), f"{float((error / tolerance).max()):.1f} × the tolerance"
    assert torch.equal(kernels.linear(x, weight, bias), y + bias)
    for rows in (0, 1, 2, 3, 4, 5, 7, 8, 9, 17):
        assert torch.equal(kernels.linear(x[:rows], weight), y[:rows]), f"{rows} rows differ from {ROWS}"
        assert torch.equal(kernels.linear(x[ROWS - rows :], weight), y[ROWS - rows :]), f"last {rows} rows differ"


@pytest.mark.parametrize(
    ("kind", "activations"), [*((k, "int8") for k in SCHEMES), *((k, "fp32") for k in (*SCHEMES, *DENSE))]
)
@pytest.mark.parametrize(("out_features", "in_features"), SMALL)
def test_linear_is_right_in_any_batch(
    isa: str, kind: str, activations: reference.Activations, out_features: int, in_features: int
) -> None:
    check(kind, out_features, in_features, activations)


@pytest.mark.parametrize("offset", ["symmetric", "zero_point", "min", "two_level_min"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_linear_is_right_for_every_scheme_and_a_ragged_last_group(
    isa: str, bits: int, group: int, offset: str, activations: reference.Activations
) -> None:
    levels = ("two_level", offset) if offset == "two_level_min" else ("plain", offset)
    supers = 2 * group if offset == "two_level_min" else group
    scheme = QuantScheme("any", bits, group, supers, *levels, zero_point=1 if offset == "symmetric" else 0)  # type: ignore[arg-type]
    check_matrix(random_quantized(scheme, 37, 2 * group + 44, np.random.default_rng([bits, group])), activations)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(("out_features", "in_features"), DENSE_ONLY)
def test_linear_takes_any_shape(isa: str, kind: str, out_features: int, in_features: int) -> None:
    check(kind, out_features, in_features, "fp32")


@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize(("kind", "out_features", "in_features"), REAL)
def test_linear_at_real_shapes(
    kind: str, out_features: int, in_features: int, activations: reference.Activations
) -> None:
    check(kind, out_features, in_features, activations)


@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "bf16"])
def test_the_same_bits_for_many_rows_and_any_number_of_threads(
    isa: str, kind: str, activations: reference.Activations, threads: Callable[[int], None]
) -> None:
    # two pieces of columns, a ragged panel
    weight = kernels.pack(random_matrix(kind, 200, 1024), activations)
    x = torch.randn(513, 1024, generator=torch.Generator().manual_seed(0))
    threads(1)
    y = kernels.linear(x, weight)
    for count in (1, 2, 3):
        threads(count)
        for rows in (1, 2, 6, 17, 64, 193, 513):
            assert torch.equal(kernels.linear(x[:rows].contiguous(), weight), y[:rows])


@pytest.mark.parametrize(("out_features", "in_features"), [(0, 32), (48, 0), (0, 0)])
def test_empty_matrices(isa: str, out_features: int, in_features: int) -> None:
    weight = kernels.pack(torch.zeros(out_features, in_features))
    bias = torch.arange(float(out_features))
    for rows in (0, 1, 9):
        x = torch.zeros(rows, in_features)
        assert torch.equal(kernels.linear(x, weight), torch.zeros(rows, out_features))
        assert torch.equal(kernels.linear(x, weight, bias), bias.expand(rows, -1))


@pytest.mark.parametrize(("rows", "out_features"), [(1, 17), (3, 64), (13, 90)])
def test_nothing_beside_the_output_is_written(isa: str, rows: int, out_features: int) -> None:
    weight = kernels.pack(random_matrix("Q4_0", out_features, 64))
    x = torch.randn(rows, 64)
    guarded = torch.full((rows * out_features + 128,), float("nan"))
    weight.native.linear(x.data_ptr(), rows, 0, guarded[64:].data_ptr())
    assert bool(guarded[:64].isnan().all())
    assert bool(guarded[64 + rows * out_features :].isnan().all())
    assert torch.equal(guarded[64:-64].view(rows, out_features), kernels.linear(x, weight))


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_infinite_and_nan_activations_stay_in_their_row(isa: str, activations: reference.Activations) -> None:
    weight = kernels.pack(random_matrix("Q8_0", 40, 64), activations)
    x = torch.randn(5, 64)
    clean = kernels.linear(x, weight)
    x[2, 7], x[4, 40] = float("inf"), float("nan")
    y = kernels.linear(x, weight)
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert not bool(y[[2, 4]].isfinite().any())


@pytest.mark.parametrize("kind", ["Q4_K", "bf16", "fp8_channel", "fp8_block128", "zero_point"])
def test_agrees_with_the_reference(kind: str) -> None:
    matrix = random_matrix(kind, 192, 512)
    x = torch.randn(7, 512)
    torch.testing.assert_close(
        kernels.linear(x, kernels.pack(matrix)), reference.linear(x, reference.pack(matrix)), rtol=1e-5, atol=1e-4
    )


def test_bad_arguments_are_refused() -> None:
    weight = kernels.pack(random_matrix("Q4_0", 48, 64))
    x = torch.randn(3, 64)
    for wrong in (x.double(), x[0], x[:, :32], torch.randn(3, 65), torch.randn(64, 3).T, x.to("meta")):
        with pytest.raises(ValueError, match=r"linear: x wanted contiguous fp32 \[tokens, 64\]"):
            kernels.linear(wrong, weight)
    for wrong in (torch.zeros(47), torch.zeros(48).double(), torch.zeros(48, 1)):
        with pytest.raises(ValueError, match=r"linear: bias wanted .*\[48\]"):
            kernels.linear(x, weight, wrong)


def test_freed_memory_is_refused() -> None:
    weight = kernels.pack(random_matrix("Q4_0", 48, 64))
    x = torch.randn(3, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        kernels.linear(x, weight)


def test_misaligned_memory_is_refused() -> None:
    weight = kernels.pack(random_matrix("Q4_0", 48, 64))
    out = torch.empty(1, 48)
    with pytest.raises(ValueError, match="x: misaligned"):
        weight.native.linear(torch.randn(1, 80).data_ptr() + 2, 1, 0, out.data_ptr())


def test_probes_give_plausible_ceilings(isa: str) -> None:
    assert 0.1 < _cpu.read_bandwidth(8 << 20) < 10_000
    assert 0.1 < _cpu.fma_peak() < 100_000
    assert 0.1 < _cpu.int8_peak() < 1_000_000
