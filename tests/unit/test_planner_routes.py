"""Hit rates from recorded routes, against caches that are simulated."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import packed
import tiny
from glmlocal.cli.main import main
from glmlocal.formats.index import open_checkpoint
from glmlocal.offload import trace
from glmlocal.offload.eviction import History, heat_after, hit_rate, lfru
from glmlocal.offload.tiers import ExpertKey
from glmlocal.planner import hits, routes
from glmlocal.planner.subject import subject

EXPERTS, TOP_K, TOKENS = 128, 8, 300


def choices(skew: float, seed: int) -> list[list[int]]:
    """Experts of each of 2 · TOKENS tokens: Gumbel noise over fixed preferences."""
    rng = random.Random(seed)
    liking = [rng.gauss(0, skew) for _ in range(EXPERTS)]
    steps = []
    for _ in range(2 * TOKENS):
        scores = [each - math.log(-math.log(rng.random())) for each in liking]
        steps.append(sorted(range(EXPERTS), key=lambda e: -scores[e])[:TOP_K])
    return steps


def heats_after(steps: list[list[int]]) -> list[float]:
    known: dict[int, History] = {}
    for time, step in enumerate(steps):
        for expert in step:
            known[expert] = History(0, heat_after(known.get(expert, History()), time, 1.0), time)
    return [heat_after(each, len(steps), 0.0) for each in known.values()]


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.5])
def test_a_trace_foretells_what_a_cache_of_the_same_routing_finds(skew: float) -> None:
    steps = choices(skew, seed=1)
    curve = routes.curve_of({0: heats_after(steps[:TOKENS])}, EXPERTS)
    assert curve is not None
    errors, of_fit = [], []
    for fraction in (0.1, 0.25, 0.5, 0.75):
        slots = int(fraction * EXPERTS)
        truth = hit_rate(steps[TOKENS:], slots, lfru(slots, TOP_K))
        errors.append(abs(routes.at(curve, fraction) - truth))
        of_fit.append(abs(hits.hit_rate(fraction) - truth))
    assert max(errors) < 0.15  # that of the fit is 0.13 to 0.43
    assert sum(errors) < sum(of_fit)


def test_a_short_trace_of_even_routing_promises_nothing() -> None:
    """Few tokens use some experts twice by chance: that says little of the next."""
    heats = sorted(heats_after(choices(0.0, seed=2)[: routes.LEAST_TOKENS]), reverse=True)
    curve = routes.curve_of({0: heats}, EXPERTS)
    assert curve is not None
    assert max(found - count / EXPERTS for count, found in enumerate(curve)) < 0.15
    assert sum(heats[: EXPERTS // 2]) / sum(heats) > 0.7  # what counting each use for itself would promise for half


@given(st.lists(st.lists(st.floats(1e-3, 50), min_size=1, max_size=16), min_size=1, max_size=4))
def test_a_curve_rises_from_nothing_to_everything(layers: list[list[float]]) -> None:
    curve = routes.curve_of(dict(enumerate(layers)), 16)
    assert curve is not None
    assert (len(curve), curve[-1]) == (17, 1.0)
    assert all(a <= b + 1e-12 for a, b in pairwise(curve))
    assert all(found >= count / 16 - 1e-12 for count, found in enumerate(curve))
    assert routes.at(curve, 0.5) == pytest.approx(curve[8])
    assert routes.at(curve, 1.5 / 16) == pytest.approx((curve[1] + curve[2]) / 2)


def test_hot_experts_by_hand() -> None:
    """One expert has nearly all uses, another some: the first slot finds the first, the second slot the second."""
    curve = routes.curve_of({3: [90.0, 9.0]}, 4)
    assert curve is not None
    assert curve[1] == pytest.approx(90 / 99)
    assert curve[2] == 1.0
    assert hits.hit_rate(0.25, curve) == pytest.approx(90 / 99)
    assert routes.curve_of({}, 4) is None
    with pytest.raises(ValueError, match="heats"):
        routes.curve_of({0: [1.0] * 5}, 4)


def test_plan_of_a_packed_model_takes_its_own_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    model = packed.pack(tiny.save(tiny.build_model(), tmp_path / "model"), tmp_path / "packed")
    assert subject(str(model)).footprints[0].hit_curve is None  # never run
    checkpoint = open_checkpoint(model)
    pack = checkpoint.tensors.experts
    assert pack is not None
    heats = {ExpertKey(layer, expert): 10.0 / (expert + 1) for layer in pack.layers() for expert in range(2)}
    trace.save(pack, trace.RouteTrace(routes.LEAST_TOKENS - 1, heats))
    assert subject(str(model)).footprints[0].hit_curve is None  # too few tokens to be believed
    trace.save(pack, trace.RouteTrace(routes.LEAST_TOKENS, heats))
    wanted = routes.curve_of({0: [10.0, 5.0]}, pack.num_experts)
    checkpoint.tensors.close()
    assert subject(str(model)).footprints[0].hit_curve == pytest.approx(wanted)
    assert main(["plan", str(model), "--gpus", "none", "--ram", "8GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["hit_rate_basis"] == "measured"
