"""int8 activations: rounded as the reference says, bit for bit, and only where codes are integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import QuantScheme
from glmlocal.kernels import cpu, reference
from quantized import random_matrix

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

TINY = float(np.finfo(np.float32).tiny)


def identity(size: int) -> kernels.Weight:
    """The identity in 8 bits: a product with it shows the activations as the kernels round them."""
    codes = np.full((size, size), 128, np.uint8)
    np.fill_diagonal(codes, 129)
    scheme = QuantScheme("Q8_0", 8, 32, 32, zero_point=128)
    return kernels.pack(QuantizedMatrix(scheme, codes, np.ones((size, -(-size // 32)), np.float32), None, None, None))


def assert_rounded_alike(x: Tensor) -> None:
    found, wanted = kernels.linear(x, identity(x.shape[1])), reference.int8_rounded(x)
    assert torch.equal(found, wanted), (found - wanted).abs().max()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 256])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 70])
def test_activations_are_rounded_as_the_reference_says(isa: str, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator) * 10 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    assert_rounded_alike(x)


def test_halves_zeros_and_the_smallest_numbers(isa: str) -> None:
    ties = torch.arange(-63.5, 64, 4).repeat(2, 1)  # half steps once the largest is 127
    ties[:, 0], ties[1, 1] = 127, -127
    assert_rounded_alike(ties)
    x = torch.zeros(6, 64)
    x[1, 5] = 127 * TINY  # the smallest scale that keeps all its digits
    x[2, 5] = 127 * TINY * 0.99
    x[3, :32] = 1e-45
    x[4] = 127 * 2.0**103 * 0.999  # the largest scale
    x[5, 40] = -1.0
    assert_rounded_alike(x)
    assert bool((reference.int8_rounded(x)[2] == 0).all())
    assert float(reference.int8_rounded(x)[1, 5]) > 0


def test_rounding_loses_less_than_half_a_step(isa: str) -> None:
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(3))
    step = x.view(64, 10, 32).abs().amax(-1, keepdim=True) / 127
    error = (kernels.linear(x, identity(320)) - x).view(64, 10, 32).abs()
    assert float((error / step).max()) <= 0.5 + 1e-5
    assert float((error / step).mean()) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bad", [127 * 2.0**103 * 1.001, float("inf"), float("nan")])
def test_what_is_too_large_or_not_finite_spoils_its_row_alone(isa: str, rows: int, bad: float) -> None:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(4))
    x[0, 40] = bad
    spoilt = torch.zeros(rows, 128, dtype=torch.bool)
    spoilt[0] = True  # also the zeros of the identity, times NaN
    assert torch.equal(kernels.linear(x, identity(128)).isnan(), spoilt)
    assert torch.equal(reference.int8_rounded(x).isnan()[0], torch.arange(128) // 32 == 1)


def test_only_integer_codes_take_int8_activations() -> None:
    for kind, wanted in (("Q4_0", True), ("Q6_K", True), ("IQ4_NL", True), ("bf16", False), ("f32", False)):
        matrix = random_matrix(kind, 32, 256)
        for weight in (kernels.pack(matrix), reference.pack(matrix)):
            assert weight.int8_activations is wanted
        for weight in (kernels.pack(matrix, "fp32"), reference.pack(matrix, "fp32")):
            assert not weight.int8_activations


def test_a_codebook_of_other_than_small_integers_is_refused() -> None:
    weight = kernels.pack(random_matrix("IQ4_NL", 16, 32), "fp32")
    halves = [i / 2 for i in range(15)] + [100.0]
    with pytest.raises(ValueError, match="int8 activations need codes that mean integers"):
        type(weight.native)(weight.layout, weight.format, weight.buffer, 0.0, halves, True)
