"""Hit rates, and what waiting for misses costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.planner.hits import distinct_experts, expected_wait, hit_rate

FRACTION = st.floats(0, 1)
SECONDS = st.floats(0, 1)


def test_hit_rate_is_the_published_fit_and_less_below_a_tenth():
    assert hit_rate(0.5) == pytest.approx(1 - (1 - 0.5**0.52) ** 1.675)
    assert hit_rate(0.5) == pytest.approx(0.865, abs=5e-4)  # by hand
    assert hit_rate(0.05) == pytest.approx(hit_rate(0.1) / 2)
    assert (hit_rate(0.0), hit_rate(1.0)) == (0.0, 1.0)


@given(FRACTION, FRACTION)
def test_hit_rate_rises_and_is_never_below_the_fraction(a, b):
    low, high = sorted((a, b))
    assert hit_rate(low) <= hit_rate(high) + 1e-12
    assert low <= hit_rate(low) + 1e-12 <= 1 + 2e-12


def test_distinct_experts():
    assert distinct_experts(128, 8, 1) == pytest.approx(8)
    assert distinct_experts(128, 8, 2) == pytest.approx(15.5)
    assert distinct_experts(128, 8, 10_000) == pytest.approx(128)
    assert distinct_experts(4, 4, 3) == 4


def test_expected_wait_is_what_throwing_dice_gives():
    near, there, busy, miss, far = 0.6, 0.85, 2.0, 0.7, 1.9
    generator = random.Random(1)

    def step():
        rolls = [generator.random() for _ in range(8)]
        misses, distant = sum(r >= near for r in rolls), sum(r >= there for r in rolls)
        return max(busy, misses * miss, distant * far)

    simulated = sum(step() for _ in range(40_000)) / 40_000
    assert expected_wait(8, near, there, busy, miss, far) == pytest.approx(simulated, rel=0.01)


def test_expected_wait_at_its_ends():
    assert expected_wait(8, 1.0, 1.0, 3.0, 1.0, 9.0) == 3.0
    assert expected_wait(8, 0.0, 1.0, 3.0, 1.0, 9.0) == pytest.approx(8.0)
    assert expected_wait(8, 0.0, 0.0, 3.0, 1.0, 9.0) == pytest.approx(72.0)
    assert expected_wait(7.5, 0.0, 1.0, 0.0, 1.0, 9.0) == pytest.approx(7.5)  # half an expert counts half


@given(st.integers(1, 10), FRACTION, FRACTION, FRACTION, SECONDS, SECONDS, SECONDS, st.floats(0, 0.5))
def test_waiting_grows_with_every_cost_and_shrinks_with_every_hit(count, a, b, c, busy, miss, far, more):
    near, nearer, there = sorted((a, b, c))
    now = expected_wait(count, near, there, busy, miss, far)
    slack = 1e-9 + now * 1e-9
    assert expected_wait(count, nearer, there, busy, miss, far) <= now + slack
    assert expected_wait(count, near, min(1.0, there + more), busy, miss, far) <= now + slack
    assert expected_wait(count, near, there, busy + more, miss, far) >= now - slack
    assert expected_wait(count, near, there, busy, miss + more, far) >= now - slack
    assert expected_wait(count, near, there, busy, miss, far + more) >= now - slack
    assert now >= busy - slack
