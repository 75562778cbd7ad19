"""Rates of our own kernels: read between what was measured, mended where it was disturbed, measured at all."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glmlocal import calibrate
from glmlocal.formats.forms import FORMS
from glmlocal.kernels import cpu
from glmlocal.machine import kernel_rates
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate
from glmlocal.planner.efficiency import kernel_class
from glmlocal.skeleton import SMALL, TINY, Skeleton, SkeletonShape

SMALL_ATTENTION = (
    calibrate.AttentionShape(8, 2, 64, context=64, prefill_context=80),
    calibrate.AttentionShape(4, 4, 32, context=64, prefill_context=80),
)


def cpu_memory(num_bytes: int) -> NDArray[np.uint8]:
    from glmlocal.kernels.cpu.packing import record_buffer

    return record_buffer(num_bytes)


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
    wanted |= {"Q5_0": "Q5_K", "gptq int8 group 128": "Q8_0", "mlx 4-bit group 64": "Q4_1", "Q4_K": "Q4_K"}
    wanted |= {"Q4_1": "Q4_1", "awq int4 group 128": "Q4_1"}  # offsets cost time
    assert {name: kernel_class(name) for name in wanted} == wanted


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
@pytest.mark.parametrize(("quick", "passes"), [(True, 1), (False, 3)])
def test_all_is_measured_three_times_unless_quick(
    quick: bool, passes: int, small_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A while of disturbance is then in one pass, which does not count."""
    made: list[KernelRates] = []

    def once(*rest: object) -> KernelRates:
        made.append(KernelRates("x", {}, {}, {}, {"int8": 1.0, "fp32": 1.0}, (1.0, 9.0, 2.0)[len(made)]))
        return made[-1]

    monkeypatch.setattr(calibrate, "_measure_once", once)
    found = calibrate.measure(quick=quick, schemes=("Q8_0",))
    assert (len(made), found.token_s) == (passes, 1.0 if quick else 2.0)


def test_memory_is_read_until_it_is_as_fast_as_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is new to a virtual machine is slow for a while; what never settles is not waited for for ever."""
    monkeypatch.setattr(calibrate, "_LEAST_WARM_S", 2.0)
    monkeypatch.setattr(calibrate, "_MOST_WARM_S", 8.0)

    def reads(seconds: list[float]) -> int:
        ticks = iter([0.0])
        now, count = [0.0], [0]

        def clock() -> float:  # begin, then before and after each read
            if next(ticks, None) is None:
                count[0] += 1
                if count[0] % 2 == 0:
                    now[0] += seconds[min(count[0] // 2, len(seconds)) - 1]
            return now[0]

        calibrate._warm(np.empty(1 << 12, np.uint8), clock)
        return count[0] // 2

    assert reads([1.0, 0.9, 0.5, 0.5, 0.5, 0.5]) == 5
    assert reads([0.1] * 100) == 20  # not before two seconds
    assert reads([1.0, 0.5] * 100) == 11  # eight seconds


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
def test_measuring_finds_every_rate_and_survives_json(small_shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "QUICK_SCHEMES", ("Q4_0", "bf16"))
    steps: list[str] = []
    monkeypatch.setattr(calibrate, "_warm", lambda memory, _: steps.append("warm") or memory.fill(1))
    rates = calibrate.measure(quick=True, clock=time.process_time, on_step=steps.append)
    assert [i for i, step in enumerate(steps) if step == "warm"] == [2, 3]  # weights, keys and values; before all rates
    assert set(rates.products) == {"Q4_0 int8", "Q4_0 fp32", "bf16 fp32"}
    assert rates.products["Q4_0 int8"].rows == rates.products["bf16 fp32"].rows == (1, 2, 4, 8, 16, 32, 64, 512)
    assert rates.products["Q4_0 fp32"].rows == (1, 4, 16, 64, 512)
    assert set(rates.attention_decode) == set(rates.attention_prefill) == {"fp32", "bf16", "fp8", "int8"}
    assert set(rates.layer_s) == {"int8", "fp32"}
    assert all(1e-7 <= seconds < 0.1 for seconds in rates.layer_s.values())
    assert rates.token_s < 1
    assert set(rates.row_s) == {"int8", "fp32"}
    assert len(steps) == 9
    assert rates.spread == 0.0
    rates = replace(rates, spread=0.02)
    again = kernel_rates.from_json(json.loads(json.dumps(kernel_rates.as_json(rates))))
    assert again == rates


def test_a_clock_that_doubles_halves_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted right: a call that takes a second by the clock does its own number of them."""
    ticks = iter(range(10_000))
    best, memory = calibrate._Turns(lambda: float(next(ticks))), torch.empty(1 << 20, dtype=torch.uint8)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    assert calibrate._attention_s("bf16", SMALL_ATTENTION[0], 1, memory, best) == 1 / 64
    assert calibrate._attention_s("bf16", SMALL_ATTENTION[0], 16, memory, best) == 1 / sum(range(80 - 16 + 1, 81))
    monkeypatch.setattr(calibrate, "HIDDEN", 256)
    monkeypatch.setattr(calibrate, "INTERMEDIATE", 128)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(calibrate, "MANY_OUT", 320)
    subject = calibrate._Subject.of("Q8_0", "int8")
    product = calibrate._product(subject, cpu_memory(subject.nbytes), best)
    assert product.weights_per_s[0] == 8 * 3 * 256 * 128
    assert product.weights_per_s[4] == 4 * 3 * 256 * 128  # half of the experts
    assert product.weights_per_s[-1] == 320 * 256  # one matrix, beyond what smoothing would make of it


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
def test_experts_are_copies_that_fill_memory_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in memory of its own: what is measured must be read from memory, and memory of one kind serves the next."""
    monkeypatch.setattr(calibrate, "HIDDEN", 256)
    monkeypatch.setattr(calibrate, "INTERMEDIATE", 128)
    monkeypatch.setattr(calibrate, "MANY_OUT", 192)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 20 << 20)
    subject = calibrate._Subject.of("Q8_0", "int8")
    assert subject.nbytes >= 80 << 20 or subject.num_experts == 64 * calibrate.TOP_K
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    subject = calibrate._Subject.of("f32", "fp32")
    assert subject.nbytes == subject.num_experts * 3 * 256 * 128 * 4
    memory = cpu_memory(subject.nbytes + 4096)
    experts = subject.experts(memory)
    places = sorted(w.buffer.ctypes.data for group in (experts.gate, experts.up, experts.down) for w in group)
    assert len(set(places)) == 3 * subject.num_experts
    assert min(b - a for a, b in pairwise(places)) == 256 * 128 * 4
    assert places[0] == memory.ctypes.data
    for weight in (experts.gate[3], experts.up[-1]):
        assert torch.equal(weight.dequantize(), subject.gate.dequantize())
    assert torch.equal(experts.down[-1].dequantize(), subject.down.dequantize())


def test_attention_goes_through_both_shapes_and_depends_on_how_many_heads_share_a_key() -> None:
    cost = AttentionCost(3e-10, 2e-11)
    shapes = ((1024.0, 24576.0), (512.0, 2048.0))
    found = AttentionCost.of_two(*((n, o, cost.seconds(n, o)) for n, o in shapes))
    assert (found.number_s, found.operation_s) == pytest.approx((3e-10, 2e-11))
    assert cost.seconds(384.0, 2304.0) == pytest.approx(384 * 3e-10 + 2304 * 2e-11)


@pytest.mark.parametrize(("first_s", "second_s"), [(1.0, 1e-9), (1e-9, 1.0)])
def test_attention_that_was_disturbed_is_never_negative(first_s: float, second_s: float) -> None:
    found = AttentionCost.of_two((1024.0, 24576.0, first_s), (512.0, 2048.0, second_s))
    assert min(found.number_s, found.operation_s) == 0.0
    assert found.seconds(1024.0, 24576.0) >= 0.999 * first_s
    assert found.seconds(512.0, 2048.0) >= 0.999 * second_s


def _pass(speed: float) -> KernelRates:
    return KernelRates(
        "x",
        {"Q4_0 int8": ProductRate((1, 4), (speed, speed / 2))},
        {"bf16": AttentionCost(1 / speed, 2 / speed)},
        {"bf16": AttentionCost(3 / speed, 4 / speed)},
        {"int8": 5 / speed, "fp32": 6 / speed},
        7 / speed,
        {"int8": 8 / speed, "fp32": 9 / speed},
    )


def test_one_disturbed_pass_does_not_count() -> None:
    found = calibrate.median_of([_pass(1.0), _pass(0.25), _pass(1.0)])
    assert found == _pass(1.0)
    assert found.spread == 0.0
    assert calibrate.median_of([_pass(2.0)]) == _pass(2.0)


def test_passes_that_do_not_agree_say_how_far_they_lay_apart() -> None:
    found = calibrate.median_of([_pass(1.0), _pass(0.5), _pass(0.8)])
    assert replace(found, spread=0.0) == _pass(0.8)
    assert found.spread == pytest.approx((1.25 - 1.0) / 1.25)
    even = calibrate.median_of([_pass(1.0), _pass(0.5)])
    assert even.products["Q4_0 int8"].weights_per_s == pytest.approx((1 / 1.5, 0.5 / 1.5))
    assert even.token_s == pytest.approx(10.5)


def test_attention_costs_are_of_one_pass() -> None:
    """Its two figures come from one equation: medians of each would be of no pass at all."""
    costs = [AttentionCost(1.0, 0.0), AttentionCost(0.0, 0.3), AttentionCost(2.0, 0.5)]
    passes = [replace(_pass(1.0), attention_decode={"bf16": cost}) for cost in costs]
    shape = calibrate.ATTENTION[0]
    ordered = sorted(costs, key=lambda cost: cost.seconds(shape.numbers, shape.operations))
    assert calibrate.median_of(passes).attention_decode["bf16"] == ordered[1]


def test_the_median_of_the_turns_counts() -> None:
    """The luckiest turn is not what a model sees, and the worst one is not either."""
    now = [0.0]
    seconds = iter([50.0, 5.0, 1.0, 3.0, 9.0, 2.0])

    def call() -> None:
        now[0] += next(seconds)

    assert calibrate._Turns(lambda: now[0]).of([call], 5) == 3.0


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that doctor measures, in a moment."""
    smaller = {"HIDDEN": 256, "INTERMEDIATE": 128, "MANY_OUT": 512, "CHUNK": 16, "SMALL": TINY}
    warm = {"_LEAST_WARM_S": 0.0, "_MOST_WARM_S": 0.1, "_WARM_ROUNDS_S": 0.0}
    for name, value in {**smaller, **warm, "ATTENTION": SMALL_ATTENTION}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)


def _turns(seconds: list[float], times: int) -> tuple[float, list[str]]:
    """What is found of two calls that take turns and so many seconds, and who was called."""
    now, called = [0.0], []

    def call(name: str) -> None:
        called.append(name)
        now[0] += seconds[min(len(called), len(seconds)) - 1]

    turns = calibrate._Turns(lambda: now[0])
    return turns.of([partial(call, "a"), partial(call, "b")], times), called


def test_turns_end_when_they_agree_and_the_first_does_not_count() -> None:
    found, called = _turns([50.0, 1.0, 1.0, 1.0, 1.0], times=40)
    assert (found, called) == (1.0, ["a", "b", "a", "b", "a"])
    found, called = _turns([50.0, 3.0, 1.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0], times=8)
    assert (found, len(called)) == (3.0, 9)  # they disagree: 8 turns


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
@pytest.mark.parametrize("new", [1, 16])
def test_attention_is_measured_over_pages_that_were_written(monkeypatch: pytest.MonkeyPatch, new: int) -> None:
    """All pages that nobody wrote to are one page of zeros, which no measurement of memory may read."""
    seen = []
    monkeypatch.setattr(calibrate.kernels, "paged_attention", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(calibrate, "CHUNK", 16)
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert calibrate._cache_bytes("fp8", SMALL_ATTENTION[0]) == 64 * 64 * 2 * 2 * 64  # as many copies as there may be
    calibrate._attention_s("fp8", SMALL_ATTENTION[0], new, memory, calibrate._Turns(time.perf_counter))
    keys, values = (arguments[1:3] for arguments in seen[:1]).__next__()
    assert keys.data_ptr() == memory.data_ptr()  # what was read until it was fast
    assert values.data_ptr() == memory.data_ptr() + keys.numel()
    assert all(float(each.float().min()) == 1.0 for arguments in seen for each in arguments[1:3])
    blocks = [frozenset(arguments[3].flatten().tolist()) for arguments in seen]
    copies = min(64, 1 + 2 * (1 << 20) // (64 * 2 * 2 * 64)) if new == 1 else 1
    assert len(set(blocks)) == min(copies, len(blocks))
    assert all(one == other or not one & other for one in blocks for other in blocks)


def test_short_calls_take_more_turns() -> None:
    """What disturbs the first milliseconds (threads that have not gone to sleep) must not be half of what is seen."""
    found, called = _turns([*[3e-4] * 60, *[1e-4] * 400], times=4)
    assert found == pytest.approx(1e-4)
    assert 100 < len(called) <= calibrate._MOST_TURNS + 1


def test_rounds_subtract_what_a_slower_while_adds() -> None:
    now, pace = [0.0], [1.0]
    paces = iter([1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.0])

    def first() -> None:
        pace[0] = next(paces)
        now[0] += 2.0 * pace[0]

    def second() -> None:
        now[0] += 3.0 * pace[0]

    rounds = calibrate._Turns(lambda: now[0]).rounds([first, second], 6)  # the first of seven does not count
    assert [round(b - a, 9) for a, b in rounds] == [1.0, 1.0, 5.0, 5.0, 1.0, 1.0]


def test_short_rounds_do_not_count_for_a_while() -> None:
    """Models that wait for their turn for ten seconds are slow at first, where the host takes idle pages away."""
    now, made = [0.0], [0]

    def call() -> None:
        made[0] += 1
        now[0] += 0.02 if now[0] < 0.15 else 0.01

    assert calibrate._Turns(lambda: now[0]).rounds([call], 3) == [pytest.approx((0.01,))] * 3
    assert made[0] == 8 + 4 + 3


def test_fp8_weights_that_are_measured_are_as_real_ones() -> None:
    """Codes drawn evenly are of numbers down to 2^-9 of the largest 448: a twentieth of them subnormal."""
    matrix = calibrate._matrix("fp8_block128", 64, 512)
    values = torch.from_numpy(matrix.codes).view(torch.float8_e4m3fn).float().abs()  # type: ignore[union-attr]
    assert float(values.max()) == 448.0
    assert 40 < float(values.std()) < 120
    assert float((values < 2**-6).float().mean()) < 1e-3


@pytest.mark.skipif(not cpu.available, reason="measures native kernels")
def test_what_a_chunk_costs_is_what_is_left_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Fake:
        """Two seconds a layer."""

        def __init__(self, layers: int) -> None:
            self.layers = layers

        def chunk(self, tokens: int) -> None:
            assert tokens == 16
            now[0] += 2.0 * self.layers

    monkeypatch.setattr(calibrate, "SMALL", TINY)
    monkeypatch.setattr(calibrate, "CHUNK", 16)
    weights = TINY.layer_weights
    models = calibrate._Models((), {}, {"int8": (Fake(2), Fake(10))})  # type: ignore[arg-type]

    def found(product_s: float, attention_s: float) -> float:
        rate = ProductRate((1, 16), (weights / product_s,) * 2)
        attention = AttentionCost(0.0, max(attention_s, 1e-9) / (4 * 64 * 16 * 17 / 2))
        return calibrate._row_s("int8", models, calibrate._Turns(lambda: now[0]), {"Q4_0 int8": rate}, attention)

    assert found(0.5, 0.0) == pytest.approx(1.5 / (16 * 64))
    assert found(0.5, 1.0) == pytest.approx(0.5 / (16 * 64))
    assert found(9.0, 0.0) == 0.0  # never negative


def test_floats_meet_fp32_whatever_is_asked() -> None:
    rates = KernelRates("x", {"bf16 fp32": RATE}, {}, {}, {}, 1.0)
    assert rates.product("bf16", "int8") is RATE
    assert rates.product("Q4_0", "int8") is None


@pytest.mark.parametrize("shape", [TINY, SMALL])
def test_a_skeleton_has_the_weights_that_its_shape_says(shape: SkeletonShape) -> None:
    asked: list[int] = []

    def matrix(rows: int, columns: int) -> torch.Tensor:
        asked.append(rows * columns)
        return torch.full((rows, columns), 2.0**-8, dtype=torch.bfloat16)

    skeleton = Skeleton(1, shape, matrix, vocab=64)
    query, key, out, wide, tall = asked
    assert shape.layer_weights == query + 2 * key + out + 9 * (2 * wide + tall)
    keys = skeleton._engine.runner.kv_cache.layers[0].tensors.keys  # type: ignore[attr-defined]
    assert shape.numbers == 2 * keys.shape[2] * keys.shape[3]
    assert shape.operations == 4 * query // shape.hidden
    skeleton.step()
