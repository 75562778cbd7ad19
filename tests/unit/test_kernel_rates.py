"""Rates of our own kernels: read between what was measured, mended where it was disturbed, measured at all."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest

from glmlocal import calibrate
from glmlocal.formats.forms import FORMS
from glmlocal.kernels import cpu
from glmlocal.machine import kernel_rates
from glmlocal.machine.kernel_rates import KernelRates, ProductRate
from glmlocal.planner.efficiency import kernel_class

RATE = ProductRate((1, 4, 64), (16.0, 8.0, 1.0))


def test_what_was_measured_is_found_and_what_lies_between_is_between() -> None:
    assert [RATE.at(rows) for rows in (0.5, 1, 4, 64)] == pytest.approx([16.0, 16.0, 8.0, 1.0])
    assert RATE.at(2) == pytest.approx((16 * 8) ** 0.5)  # in the middle of the logarithms
    assert RATE.at(16) == pytest.approx(8**0.5)
    assert RATE.at(640) == pytest.approx(0.1)  # beyond: as many multiply-adds per second


def test_a_disturbed_measurement_never_makes_more_rows_cheaper() -> None:
    rate = ProductRate((1, 2, 4, 8, 16), (10.0, 12.0, 2.0, 4.0, 0.01))
    assert rate.weights_per_s == pytest.approx((10.0, 10.0, 5.0, 4.0, 2.0))
    points = [rate.at(1 + step / 7) for step in range(200)]
    work = [(1 + step / 7) * point for step, point in enumerate(points)]
    assert all(a >= b - 1e-9 for a, b in pairwise(points))
    assert all(a <= b + 1e-9 for a, b in pairwise(work))


@pytest.mark.parametrize(
    ("rows", "rates"),
    [((), ()), ((2,), (1.0,)), ((1, 1), (1.0, 1.0)), ((1, 2), (1.0,)), ((1,), (0.0,)), ((1,), (float("nan"),))],
)
def test_rates_that_are_none_are_refused(rows: tuple[int, ...], rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rate"):
        ProductRate(rows, rates)


def test_memory_binds_few_rows_and_arithmetic_many() -> None:
    assert RATE.is_memory_bound(1)
    assert not RATE.is_memory_bound(8)


def test_every_form_runs_like_one_that_is_measured() -> None:
    assert {kernel_class(name) for name in FORMS} == set(calibrate.SCHEMES)
    assert set(calibrate.QUICK_SCHEMES) < set(calibrate.SCHEMES)
    wanted = {"int4": "Q4_0", "int8": "Q8_0", "fp8_channel": "fp8_block128", "f16": "bf16", "IQ4_XS": "Q4_K"}
    wanted |= {"Q5_0": "Q5_K", "gptq int8 group 128": "Q8_0", "mlx 4-bit group 64": "Q4_0", "Q4_K": "Q4_K"}
    assert {name: kernel_class(name) for name in wanted} == wanted


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
def test_measuring_finds_every_rate_and_survives_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "QUICK_SCHEMES", ("Q4_0", "bf16"))
    monkeypatch.setattr(calibrate, "HIDDEN", 256)
    monkeypatch.setattr(calibrate, "INTERMEDIATE", 128)
    monkeypatch.setattr(calibrate, "DECODE_CONTEXT", 64)
    monkeypatch.setattr(calibrate, "PREFILL_CONTEXT", 80)
    monkeypatch.setattr(calibrate, "CHUNK", 16)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    steps: list[str] = []
    rates = calibrate.measure(quick=True, clock=time.process_time, on_step=steps.append)
    assert set(rates.products) == {"Q4_0 int8", "Q4_0 fp32", "bf16 fp32"}
    assert rates.products["Q4_0 int8"].rows == (1, 2, 4, 8, 16, 32, 64, 512)
    assert set(rates.attention_decode) == set(rates.attention_prefill) == {"fp32", "bf16", "fp8", "int8"}
    assert 1e-7 <= rates.layer_s < 0.1
    assert rates.token_s < 1
    assert len(steps) == 4
    again = kernel_rates.from_json(json.loads(json.dumps(kernel_rates.as_json(rates))))
    assert again == rates


def test_a_clock_that_doubles_halves_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted right: a call that takes a second by the clock does its own number of them."""
    ticks = iter(range(10_000))
    best = calibrate._Best(lambda: float(next(ticks)), rounds=1)
    assert calibrate._attention("bf16", 1, 64, best) == 4 * calibrate.HEADS * calibrate.HEAD_DIM * 64
    pairs = sum(range(64 - 16 + 1, 65))
    assert calibrate._attention("bf16", 16, 64, best) == 4 * calibrate.HEADS * calibrate.HEAD_DIM * pairs
    monkeypatch.setattr(calibrate, "HIDDEN", 256)
    monkeypatch.setattr(calibrate, "INTERMEDIATE", 128)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    product = calibrate._product("Q8_0", "int8", best)
    assert product.weights_per_s[0] == 8 * 3 * 256 * 128


def test_floats_meet_fp32_whatever_is_asked() -> None:
    rates = KernelRates("x", {"bf16 fp32": RATE}, {}, {}, 1.0, 1.0)
    assert rates.product("bf16", "int8") is RATE
    assert rates.product("Q4_0", "int8") is None
