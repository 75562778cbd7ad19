"""The native quantizer against its plain twin: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from glmlocal.formats import quantize as plain
from glmlocal.formats.schemes import INT4, INT8, QuantScheme
from glmlocal.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels")


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("scale", [1e3, 1.0, 0.02, 1e-6, 3e-8, 1e-20, 1e-29, 1e-40])
@pytest.mark.parametrize("shape", [(40, 1000), (1, 1), (3, 31), (5, 33), (0, 64)])
def test_the_bits_are_the_twins(scheme: QuantScheme, scale: float, shape: tuple[int, int]) -> None:
    from glmlocal.kernels.cpu.quantize import quantize

    rng = np.random.default_rng([shape[0], shape[1], scheme.bits])
    weights = np.clip(rng.standard_t(3, shape), -15, 15).astype(np.float32) * np.float32(scale)
    weights[:1, ::2] = 0
    weights[2:3] = 0
    weights[3:4] = scale  # all the same
    weights[4:5] = -np.abs(weights[4:5])
    weights[1:2, :64] = np.rint(weights[1:2, :64] / np.float32(scale)) * np.float32(scale)  # ties
    want, got = plain.quantize(weights, scheme), quantize(weights, scheme)
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.super_scale, want.super_scale)
    assert (got.scheme, got.codes.dtype, got.super_scale.dtype) == (scheme, np.uint8, np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 600_000.0])
def test_what_cannot_be_quantized_is_refused_as_by_the_twin(bad: float) -> None:
    from glmlocal.kernels.cpu.quantize import quantize

    weights = np.ones((3, 70), np.float32)
    weights[2, 69] = bad
    with pytest.raises(ValueError, match="wanted finite and below"):
        quantize(weights, INT4)


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    from glmlocal.kernels.cpu.quantize import quantize

    weights = np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
    np.testing.assert_array_equal(quantize(weights.T, INT8).codes, plain.quantize(weights.T.copy(), INT8).codes)
