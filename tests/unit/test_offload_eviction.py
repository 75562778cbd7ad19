"""Eviction policies on traces of which the right answer is known, or whose shape was measured on a GLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from glmlocal.offload.eviction import (
    LFRU,
    LRU,
    Belady,
    History,
    Pinned,
    burst_weight,
    heat_after,
    hit_rate,
    lfru,
    sum_of_decay,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _routing as bench

EXPERTS, TOP_K, TOKENS = 64, 4, 300


def steps_of(trace: bench.Trace) -> list[list[int]]:
    return [step[0] for step in trace]


def uses_of(steps: list[list[int]]) -> dict[int, list[float]]:
    uses: dict[int, list[float]] = {}
    for time, keys in enumerate(steps):
        for key in keys:
            uses.setdefault(key, []).append(float(time))
    return uses


def test_lru_and_belady_on_a_trace_done_by_hand() -> None:
    steps = [[0], [1], [2], [0], [1], [2]]  # round and round: the worst for LRU
    assert hit_rate(steps, 2, LRU()) == 0.0
    assert hit_rate(steps, 2, Belady(uses_of(steps))) == 2 / 6
    assert hit_rate(steps, 3, LRU()) == 3 / 6
    assert hit_rate([], 1, LRU()) == 0.0


def test_what_was_used_once_goes_before_what_was_used_often() -> None:
    steps = [[0], [0], [0], [1], [2], [0]]
    assert hit_rate(steps, 2, LFRU(8.0)) == 3 / 6
    assert hit_rate(steps, 2, LRU()) == 2 / 6


def test_pins_stay_whatever_happens() -> None:
    steps = [[0], [1], [2], [3], [0]]
    assert hit_rate(steps, 2, Pinned(frozenset({0}), LRU())) == 1 / 5
    assert hit_rate(steps, 2, LRU()) == 0.0


@pytest.mark.parametrize("fraction", [0.10, 0.25, 0.50])
def test_the_default_is_no_worse_than_lru_and_nothing_beats_belady(fraction: float) -> None:
    for name in ("working-set", "near-uniform"):
        steps = steps_of(bench.TRACES[name](1, EXPERTS, TOP_K, TOKENS))
        slots = round(fraction * EXPERTS)
        ours, least = hit_rate(steps, slots, lfru(slots, TOP_K)), hit_rate(steps, slots, LRU())
        best = hit_rate(steps, slots, Belady(uses_of(steps)))
        assert ours <= best
        assert least <= best
        assert ours >= least - 0.01, f"{name}: {ours:.3f}, LRU {least:.3f}"


def test_the_working_set_trace_has_the_shape_that_was_measured() -> None:
    found = bench.describe(bench.working_set(3, 128, 8, 300), 128)
    assert found["used_by_128_tokens"] == pytest.approx(0.70, abs=0.06)
    assert found["new_in_the_next_128"] == pytest.approx(0.13, abs=0.03)
    assert 0.1 < found["shared_with_the_token_before"] < 0.4


def test_heat_halves_in_a_half_life_and_counts_uses() -> None:
    assert heat_after(History(), 100.0, 1.0) == 1.0
    assert heat_after(History(0.0, 4.0, 100.0), 132.0, 0.0) == pytest.approx(2.0)


def test_a_chunk_counts_its_share_of_uses_decayed() -> None:
    assert burst_weight(1, 1) == pytest.approx(1.0)
    assert burst_weight(4, 4) == pytest.approx(sum_of_decay(4, 32.0))
    assert burst_weight(5, 512) < 1.0 < burst_weight(50, 512)
    assert burst_weight(512, 512) == pytest.approx(sum(2 ** (-i / 32) for i in range(512)))


def test_a_larger_cache_lets_frequency_count_for_more() -> None:
    assert lfru(64, 8).boost_tokens == 4.0
    assert lfru(640, 8).boost_tokens == 40.0
    assert lfru(4, 0).boost_tokens == 2.0


def test_this_module_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, glmlocal.offload.eviction, glmlocal.offload.tiers, glmlocal.offload.store\n"
        "import glmlocal.offload.stats, json; print(json.dumps('torch' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert json.loads(run.stdout) is False, run.stderr


def test_what_a_step_asks_for_does_not_leave_during_it() -> None:
    """Even where the policy knows that it is not used again."""
    uses = {0: [0.0, 2.0], 1: [0.0, 1.0], 2: [1.0]}
    assert hit_rate([[0, 1], [1, 2], [0]], 2, Belady(uses)) == 1 / 5
