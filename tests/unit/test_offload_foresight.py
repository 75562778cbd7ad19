"""Guesses of the next layer's experts: trusted when they were right, made when they are worth it, never in the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import packed
import tiny
from glmlocal.kernels import cpu
from glmlocal.offload import foresight
from glmlocal.offload.experts import FORESEEN_TOKENS
from glmlocal.offload.foresight import Foresight
from glmlocal.offload.tiers import ExpertKey

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

TEXT = [5, 9, 200, 31, 77, 140, 6, 8]


def after(rights: list[bool], stall_s: float = 1.0, cost_s: float = 0.01) -> Foresight:
    found = Foresight()
    for right in rights:
        found.guessed([1], cost_s)
        found.compare({1} if right else {2})
        found.waited(stall_s)
    return found


def asked(found: Foresight, turns: int = 64) -> int:
    return sum(found.wants_guess() for _ in range(turns))


def test_guesses_are_trusted_once_enough_of_them_were_right() -> None:
    assert not Foresight().is_trusted
    assert not after([True] * (foresight.LEAST_GUESSES - 1)).is_trusted
    assert after([True] * foresight.LEAST_GUESSES).is_trusted
    assert not after([False] * 100).is_trusted
    assert after([True, True, False] * 40).is_trusted


def test_trust_is_lost_and_won_again() -> None:
    found = after([True] * 200)
    for _ in range(60):
        found.guessed([1], 0.01)
        found.compare({2})
    assert not found.is_trusted
    assert found.right < 0.2
    for _ in range(60):
        found.guessed([1, 2], 0.01)
        found.compare({1, 2})
    assert found.is_trusted


def test_a_guess_of_several_is_right_in_part() -> None:
    found = Foresight()
    for _ in range(40):
        found.guessed([1, 2, 3, 4], 0.01)
        found.compare({1, 9})
    assert found.right == pytest.approx(0.25)
    found.compare({1})  # without a guess
    found.guessed([], 0.01)  # all are there
    found.compare({1})
    assert found.right == pytest.approx(0.25)


def test_guesses_are_made_where_waiting_costs_more_and_else_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "WORTH", 4.0)
    assert asked(after([True] * 50)) == 64
    assert asked(after([True] * 50, stall_s=0.03)) == 64 // foresight.SHADOW_EVERY, "not worth four guesses"
    assert asked(after([True] * 50, stall_s=0.0)) == 0, "nothing is waited for"
    assert asked(after([False] * 50)) == 64 // foresight.SHADOW_EVERY, "only to know whether they get better"


def test_as_many_are_read_as_the_disk_can_begin_meanwhile() -> None:
    found = Foresight()
    assert found.most_reads(3e9, 10_000_000) == 1
    found._window_s = 0.005
    assert found.most_reads(3e9, 10_000_000) == 4, "three in twice the time, and one is begun"
    found._window_s = 0.0051
    assert found.most_reads(3e9, 10_000_000) == 5
    assert found.most_reads(0.0, 10_000_000) == 1


def test_the_window_begins_when_the_disk_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(foresight.time, "perf_counter", lambda: now[0])
    found = Foresight()
    found.arrived()  # without a guess it is nobody's window
    now[0] = 3.0
    found.compare({1})
    assert found._window_s == 0.0
    found.guessed([1], 0.01)
    now[0] = 8.0
    found.arrived()
    now[0] = 10.0
    found.compare({1})
    assert found._window_s == 2.0, "not from the guess on: what was asked for was read first"


def save(directory: Path, added: float) -> Path:
    """A tiny packed model whose layers add so much to what the router of the next one sees."""
    model = tiny.build_model(6)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            weight.data *= added
    return packed.pack(tiny.save(model, directory / "source"), directory / "packed", "int4")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's records take no time to read."""
    monkeypatch.setattr(foresight, "WORTH", 0.0)


def generate(directory: Path, slots: int) -> packed.Engine:
    engine, resident = packed.engine_with(directory, slots), packed.engine_with(directory, None)
    for start in range(60):
        text = [3 + (start * 31 + i * 7) % 380 for i in range(2)]
        assert torch.equal(engine.logits(text), resident.logits(text))
    return engine


def test_a_router_that_can_be_foreseen_is_read_ahead(tmp_path: Path) -> None:
    """With the model's own router: layers that add next to nothing."""
    engine = generate(save(tmp_path, 1e-4), 6)
    (offload,) = engine.offloads.all
    stats = offload.store.stats()
    assert offload.foresight.right > 0.9
    assert stats.prefetched > 50
    assert stats.prefetch_hits > 0.9 * stats.prefetched


def test_a_router_that_cannot_be_foreseen_costs_no_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "RIGHT_ABOVE", 0.99)
    engine = generate(save(tmp_path, 30.0), 6)
    (offload,) = engine.offloads.all
    assert offload.foresight.right < 0.9
    assert offload.store.stats().prefetched == 0


def test_wrong_guesses_that_are_trusted_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "RIGHT_ABOVE", -1.0)
    monkeypatch.setattr(foresight, "LEAST_GUESSES", 0)
    directory = save(tmp_path, 30.0)
    for slots in (1, 2, 5, 11):
        engine = generate(directory, slots)
        (offload,) = engine.offloads.all
        stats = offload.store.stats()
        assert stats.prefetched > 0
        offload.drain()
        assert offload.store.num_leased == 0


def route_to(*experts: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (torch.tensor([experts], dtype=torch.int32), torch.ones(1, len(experts)))


def test_prompts_are_not_foreseen(tmp_path: Path) -> None:
    (offload,) = packed.engine_with(save(tmp_path, 1.0), 4).offloads.all
    asked: list[int] = []

    def route() -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(1)
        return route_to(1, 2)()

    layer = offload.experts(offload.store.layers[0])
    layer.foresee(FORESEEN_TOKENS + 1, route)
    assert not asked
    layer.foresee(FORESEEN_TOKENS, route)
    assert asked


def test_the_disk_is_free_when_the_last_of_a_layer_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = packed.engine_with(save(tmp_path, 1.0), 4)
    (offload,) = engine.offloads.all
    freed: list[int] = []
    monkeypatch.setattr(Foresight, "arrived", lambda self: freed.append(offload.store.num_pending))
    engine.logits([5])
    assert freed == [0] * len(offload.store.layers), "once a layer, with nothing under way that was asked for"


def test_what_a_gpu_holds_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "RIGHT_ABOVE", -1.0)
    monkeypatch.setattr(foresight, "LEAST_GUESSES", 0)
    (offload,) = packed.engine_with(save(tmp_path, 1.0), 4).offloads.all
    layer = offload.store.layers[0]

    class Gpu:
        def without_hits(self, asked: int, experts: Iterable[int]) -> list[int]:
            return [expert for expert in experts if (asked, expert) != (layer, 1)]

    with_gpu = replace(offload.experts(layer), gpu=Gpu())  # type: ignore[arg-type]
    offload.foresight._stall_s, offload.foresight._window_s = 1.0, 1e9
    with_gpu.foresee(1, route_to(1, 2))
    offload.store.drain()
    assert offload.store.resident() == {ExpertKey(layer, 2)}
