"""The cost model: by hand on shapes where a hand is enough, and what it must never do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate
from glmlocal.planner.efficiency import DEFAULT, Efficiency, Speeds
from glmlocal.planner.forecast import ACCEPTANCE, PlacedModel, forecast
from glmlocal.planner.hits import hit_rate
from glmlocal.planner.machine import Nvme
from glmlocal.planner.plan import Plan, Wants
from glmlocal.planner.solve import plan
from planned import H100, H200, RTX4090, air, glm45, machine

INT4 = {"scheme": "int4 group 32", "bits": 4.5, "quant": "int4"}
ONE = (1.0, 1.0, 1.0)
NONE = (0.0, 0.0, 0.0)
# Every rate as the machine says, no time but what rates explain.
IDEAL = Efficiency(
    **{name: NONE if name.endswith("_s") else ONE for name in DEFAULT.__dataclass_fields__},
)


def ideal(found: Plan, model, efficiency: Efficiency = IDEAL):
    return forecast(model, found.placement, found.machine, found.resolved, efficiency)


def test_decode_on_cpu_is_bytes_over_bandwidth():
    model, hardware = air(**INT4), machine(ram_gib=96, ram_gb_per_s=60)
    found = plan(model, hardware, Wants())
    per_layer = [layer.resident_bytes + (8 * layer.expert.nbytes if layer.expert else 0) for layer in model.layers]
    nbytes = sum(per_layer) + sum(part.nbytes for part in model.top)
    rates = ideal(found, model).decode_tokens_per_s
    kv = 46 * 4096  # bytes of the one position that a step at context 0 reads
    assert 1 / rates[0].value == pytest.approx((nbytes + kv) / 60e9, rel=1e-3)
    assert 1 / rates[8192].value - 1 / rates[0].value == pytest.approx(8192 * kv / 60e9)
    slow = replace(hardware, cpu=replace(hardware.cpu, fp32_gflop_per_s=300.0))
    rates_of_slow = ideal(plan(model, slow, Wants()), model).decode_tokens_per_s
    attention = 46 * 4 * 96 * 128 / 300e9  # seconds per position; its bytes take less
    assert 1 / rates_of_slow[8192].value - 1 / rates_of_slow[0].value == pytest.approx(8192 * attention, rel=1e-3)
    assert (rates[0].bound_by, rates[0].basis) == ("cpu memory", "modelled")


def test_decode_costs_outside_the_weights():
    model = air(**INT4)
    found = plan(model, machine(ram_gib=96), Wants())
    plain = 1 / ideal(found, model).decode_tokens_per_s[0].value
    with_costs = replace(IDEAL, cpu_layer_s=(1e-3,) * 3, cpu_token_s=(5e-3,) * 3)
    costly = 1 / ideal(found, model, with_costs).decode_tokens_per_s[0].value
    assert costly - plain == pytest.approx(46 * 1e-3 + 5e-3)


def test_decode_on_one_gpu():
    model = air("fp8_channel", 8)
    found = plan(model, machine(H200), Wants(draft=0))
    nbytes = sum(layer.resident_bytes + (8 * layer.expert.nbytes if layer.expert else 0) for layer in model.layers)
    nbytes += sum(part.nbytes for part in model.top)
    for context in (0, 131072):
        rate = ideal(found, model).decode_tokens_per_s[context]
        assert 1 / rate.value == pytest.approx((nbytes + 46 * 2048 * (context + 1)) / 4800e9)
    assert ideal(found, model).hit_rate is None


def test_misses_cost_the_cpu_what_binomial_luck_says():
    model = air(**INT4)
    found = plan(model, machine(RTX4090, ram_gib=64), Wants())
    expert = model.layers[1].expert
    here = found.placement.gpu_experts[1:]
    near = hit_rate(here[0] / 128)
    hit = found.forecast.hit_rate
    assert hit == pytest.approx(sum(hit_rate(n / 128) for n in here) / 45)
    dense = sum(layer.resident_bytes for layer in model.layers) + sum(p.nbytes for p in model.top) + 46 * 4096
    least = dense / 1008e9 + 45 * 8 * (1 - near) * expert.nbytes / 60e9  # every max at the mean of its misses
    most = dense / 1008e9 + 45 * 8 * expert.nbytes * (1 / 1008e9 + (1 - near) / 60e9)  # nothing overlaps
    assert least < 1 / ideal(found, model).decode_tokens_per_s[0].value < most


def test_nvme_is_read_while_the_cpu_computes():
    model, hardware = air(**INT4), machine(ram_gib=22, nvme=Nvme(2 * 10**12, 7.0))
    found = plan(model, hardware, Wants())
    expert, slots = model.layers[1].expert.nbytes, found.placement.ram_slots[1:]
    reading = sum(8 * (1 - hit_rate(n / 128)) * expert / 7e9 for n in slots)
    computing = sum(layer.resident_bytes + (8 * expert if layer.expert else 0) for layer in model.layers) / 60e9
    seconds = {
        overlap: 1 / ideal(found, model, replace(IDEAL, io_overlap=(overlap,) * 3)).decode_tokens_per_s[0].value
        for overlap in (0.0, 1.0)
    }
    assert max(reading, computing) < seconds[1.0] < seconds[0.0]
    head = model.top[-1].nbytes / 60e9
    assert seconds[0.0] == pytest.approx(reading + computing + head, rel=1e-3)


def test_prefill_on_cpu_is_operations_over_peak():
    model, hardware = air(**INT4), machine(ram_gib=96)
    found = plan(model, hardware, Wants())
    tokens = 2048
    integer = sum(sum(p.params for p in layer.parts if p.is_integer) for layer in model.layers)
    integer += 45 * 8 * model.layers[1].expert.params
    routers = 45 * 128 * 4097
    attention = 46 * 4 * 96 * 128 * tokens * (tokens + 1) / 2 / 1500e9
    head = model.top[-1].nbytes / 60e9
    seconds = 2 * tokens * integer / 6000e9 + 2 * tokens * routers / 1500e9 + attention + head
    assert tokens / ideal(found, model).prefill_tokens_per_s.value == pytest.approx(seconds, rel=0.01)
    assert ideal(found, model).prefill_tokens_per_s.bound_by == "cpu arithmetic"
    exact = plan(model, hardware, Wants(activations="fp32"))
    fp32 = 2 * tokens * (integer + routers) / 1500e9 + attention + head
    assert tokens / ideal(exact, model).prefill_tokens_per_s.value == pytest.approx(fp32, rel=0.01)


def test_short_prompts_read_many_experts_for_few_tokens():
    """16 tokens touch 82 of 128 experts: bytes bind, and the time is nearly that of reading the layer."""
    model, hardware = air(**INT4), machine(ram_gib=96)
    found = plan(model, hardware, Wants(context=16))
    touched = 128 * (1 - (1 - 8 / 128) ** 16)
    rate = ideal(found, model).prefill_tokens_per_s
    assert rate.bound_by == "cpu memory"
    assert 16 / rate.value > 45 * touched * model.layers[1].expert.nbytes / 60e9


def test_prefill_with_few_experts_here_streams_or_computes_whichever_is_sooner():
    model = air(**INT4)
    found = plan(model, machine(RTX4090, ram_gib=64), Wants())
    slow_cpu = replace(found.machine, cpu=replace(found.machine.cpu, fp32_gflop_per_s=1.0, int8_gop_per_s=1.0))
    slow_both = replace(slow_cpu, gpus=(replace(RTX4090, link_gb_per_s=1.0),))
    rates = [
        forecast(model, found.placement, hardware, found.resolved).prefill_tokens_per_s
        for hardware in (found.machine, slow_cpu, slow_both)
    ]
    assert rates[0].bound_by == "cpu arithmetic"
    assert rates[1].bound_by == "link"
    assert rates[0].value >= rates[1].value > 5 * rates[2].value


def test_time_to_first_token_grows_faster_than_the_prompt():
    times = plan(air(**INT4), machine(ram_gib=96), Wants()).forecast.time_to_first_token_s
    assert sorted(times) == [1024, 32768]
    assert times[32768].value > 33 * times[1024].value
    assert times[1024].low < times[1024].value < times[1024].high


def test_ranges_bracket_and_are_wider_where_nothing_was_measured():
    model, hardware = air(**INT4), machine(ram_gib=96)
    measured = replace(
        hardware, ram=replace(hardware.ram, basis="measured"), cpu=replace(hardware.cpu, basis="measured")
    )
    wide, narrow = (plan(model, each, Wants()).forecast.decode_tokens_per_s[0] for each in (hardware, measured))
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high
    assert (wide.basis, narrow.basis) == ("modelled", "measured")


def test_drafts_pay_where_experts_are_few_and_not_where_they_add_up():
    rates = plan(glm45(), machine(*[H100] * 16), Wants()).forecast
    assert sorted(rates.drafts_tokens_per_s) == [1, 2, 3]
    plain = rates.decode_tokens_per_s[0].value
    for drafts, rate in rates.drafts_tokens_per_s.items():
        assert rate.value < plain * (1 + sum(ACCEPTANCE[:drafts]))
    assert rates.drafts_tokens_per_s[1].value > 1.2 * plain
    on_nvme = plan(air(**INT4), machine(ram_gib=22, nvme=Nvme(2 * 10**12, 7.0)), Wants()).forecast
    assert on_nvme.drafts_tokens_per_s[3].value < on_nvme.decode_tokens_per_s[0].value
    assert plan(air(has_mtp=False, **INT4), machine(ram_gib=96), Wants()).forecast.drafts_tokens_per_s == {}


def test_a_window_bounds_what_long_contexts_cost_but_for_the_index():
    model = air(**INT4)
    windowed = replace(
        model,
        attention_window=2048,
        index_kv_bytes={dtype: (256,) * 46 for dtype in model.kv_bytes},
        index_flops=(1000,) * 46,
    )
    found = plan(windowed, machine(ram_gib=96, ram_gb_per_s=60), Wants())
    full, short = (ideal(found, each).decode_tokens_per_s for each in (model, windowed))
    assert short[0].value == pytest.approx(full[0].value, rel=1e-3)
    assert short[32768].value > 1.3 * full[32768].value
    slower = 1 / short[32768].value - 1 / short[8192].value
    assert slower == pytest.approx(46 * (32768 - 8192) * 256 / 60e9)  # reading the index; scoring takes less


def test_prefill_on_one_gpu_by_hand():
    model, slow = air("fp8_channel", 8), replace(H200, bf16_tflop_per_s=10.0, fp8_tflop_per_s=20.0)
    found = plan(model, machine(slow), Wants(draft=0))
    tokens, in_fp8, in_bf16 = 2048, 45 * 8 * model.layers[1].expert.params, 0
    for part in (part for layer in model.layers for part in layer.parts):
        in_fp8 += part.params if part.scheme == "fp8_channel" else 0
        in_bf16 += part.params if part.scheme == "f32" else 0
    attention = 46 * 4 * 96 * 128 * tokens * (tokens + 1) / 2
    seconds = 2 * tokens * in_fp8 / 20e12 + (2 * tokens * in_bf16 + attention) / 10e12
    assert tokens / ideal(found, model).prefill_tokens_per_s.value == pytest.approx(seconds, rel=0.01)


def test_a_window_bounds_the_attention_of_prompts():
    model = air(**INT4)
    windowed = replace(model, attention_window=64)
    found = plan(model, machine(ram_gib=96), Wants())
    seconds = [2048 / ideal(found, each).prefill_tokens_per_s.value for each in (model, windowed)]
    pairs = 2048 * 2049 // 2 - (64 * 65 // 2 + (2048 - 64) * 64)
    assert seconds[0] - seconds[1] == pytest.approx(46 * 4 * 96 * 128 * pairs / 1500e9, rel=1e-6)


def test_every_draft_costs_a_pass_of_mtp_layer_and_head():
    model = air("fp8_channel", 8)
    found = plan(model, machine(H200), Wants(draft=3))
    seconds = {
        drafts: (1 + sum(ACCEPTANCE[:drafts])) / rate.value
        for drafts, rate in ideal(found, model).drafts_tokens_per_s.items()
    }
    mtp = (model.mtp.resident_bytes + 8 * model.mtp.expert.nbytes + 2048) / 4800e9  # with its own head
    expert = model.layers[1].expert.nbytes / 4800e9
    for drafts, rows in ((1, 2), (2, 3)):
        more = [45 * 128 * (1 - (1 - 8 / 128) ** count) * expert for count in (rows, rows + 1)]
        assert seconds[drafts + 1] - seconds[drafts] == pytest.approx(mtp + more[1] - more[0])


def test_hops_and_waiting_for_the_cpu_are_paid_for():
    two = plan(air("fp8_channel", 8), machine(H100, H100), Wants(draft=0))
    model = air(**INT4)
    hybrid = plan(model, machine(RTX4090, ram_gib=64), Wants())
    nears = [hit_rate(number / 128) for number in hybrid.placement.gpu_experts[1:]]
    for found, of, name, expected in (
        (two, air("fp8_channel", 8), "hop_s", 3.0),  # to the first GPU, to the second, back
        (hybrid, model, "sync_s", sum(1 - near**8 for near in nears)),
    ):
        costly = replace(IDEAL, **{name: (1.0, 1.0, 1.0)})
        seconds = [1 / ideal(found, of, each).decode_tokens_per_s[0].value for each in (IDEAL, costly)]
        assert seconds[1] - seconds[0] == pytest.approx(expected)


def test_prefill_streams_only_what_is_missing():
    model = air(**INT4)
    found = plan(model, machine(RTX4090, ram_gib=64), Wants())
    slow_cpu = replace(found.machine, cpu=replace(found.machine.cpu, fp32_gflop_per_s=0.1, int8_gop_per_s=0.1))
    rate = forecast(model, found.placement, slow_cpu, found.resolved, IDEAL).prefill_tokens_per_s
    missing = sum(found.placement.ram_experts[1:]) * model.layers[1].expert.nbytes / 25e9  # a chunk touches all
    assert rate.bound_by == "link"
    assert 2048 / rate.value == pytest.approx(2048 / found.resolved.max_num_batched_tokens * missing, rel=0.05)


def test_prefill_reads_from_nvme_only_what_has_no_slot():
    model = air(**INT4)
    found = plan(model, machine(ram_gib=22, nvme=Nvme(2 * 10**12, 0.5)), Wants())
    away = sum(128 - slots for slots in found.placement.ram_slots[1:]) * model.layers[1].expert.nbytes / 0.5e9
    rate = ideal(found, model).prefill_tokens_per_s
    assert rate.bound_by == "nvme"
    assert 2048 / rate.value == pytest.approx(2048 / found.resolved.max_num_batched_tokens * away, rel=0.05)


Q4 = {"scheme": "int4", "bits": 4.5, "quant": "int4"}


def rates_of(scheme: str = "Q4_0") -> KernelRates:
    """One row: 10⁹ weights/s of the scheme, 0.5 of bf16 and f32; many: 0.1 and 0.05 of 10⁹ at 100 rows."""
    fast, slow = ProductRate((1, 100), (1e9, 0.1e9)), ProductRate((1, 100), (0.5e9, 0.05e9))
    products = {f"{scheme} int8": fast, "bf16 fp32": slow, "f32 fp32": slow}
    decode, prefill = AttentionCost(0.25e-9, 0.5e-9), AttentionCost(0.5e-9, 0.125e-9)
    return KernelRates("x", products, {"bf16": decode}, {"bf16": prefill}, {"int8": 1e-3, "fp32": 2e-3}, 20e-3)


def measured_machine(**changes: object):
    hardware = machine(ram_gib=96)
    cpu = replace(hardware.cpu, basis="measured", kernels=replace(rates_of(), **changes))
    return replace(hardware, cpu=cpu, ram=replace(hardware.ram, basis="measured"))


def test_decode_is_what_was_measured_of_our_kernels():
    """Seconds of every weight that a token meets, of its layers, of attention and of what is around; no peak counts."""
    model, hardware = air(**Q4), measured_machine()
    found = plan(model, hardware, Wants(kv_dtype="bf16"))
    integer = sum(sum(p.params for p in layer.parts if p.is_integer) for layer in model.layers)
    integer += 45 * 8 * model.layers[1].expert.params
    floats = sum(sum(p.params for p in layer.parts if not p.is_integer) for layer in model.layers)
    floats += sum(part.params for part in model.top[1:])
    attention = 46 * 8193 * (4 * 96 * 128 * 0.5e-9 + 2 * 8 * 128 * 0.25e-9)
    wanted = integer / 1e9 + floats / 0.5e9 + attention + 46 * 1e-3 + 20e-3
    rates = found.forecast.decode_tokens_per_s
    assert 1 / rates[8192].value == pytest.approx(wanted, rel=1e-3)
    assert rates[8192].basis == "measured"
    faster = replace(hardware, cpu=replace(hardware.cpu, fp32_gflop_per_s=9e9, int8_gop_per_s=9e9))
    assert plan(model, faster, Wants(kv_dtype="bf16")).forecast.decode_tokens_per_s == rates


def test_a_layer_costs_what_it_does_with_the_activations_that_are_used():
    model, hardware = air(**Q4), measured_machine()
    costly = measured_machine(layer_s={"int8": 1e-3, "fp32": 3e-3})
    for activations, more in (("int8", 0.0), ("fp32", 46 * 1e-3)):
        wants = Wants(activations=activations)
        times = [1 / plan(model, each, wants).forecast.decode_tokens_per_s[0].value for each in (hardware, costly)]
        assert times[1] - times[0] == pytest.approx(more, abs=1e-9)


def test_a_chunk_costs_by_its_hidden_states():
    model, hardware, tokens = air(**Q4), measured_machine(), 1024
    costly = measured_machine(row_s={"int8": 1e-9, "fp32": 9.0})
    times = [plan(model, each, Wants()).forecast.time_to_first_token_s[tokens].value for each in (hardware, costly)]
    assert times[1] - times[0] == pytest.approx(46 * tokens * 4096 * 1e-9)


def test_prefill_interpolates_by_the_rows_that_each_expert_gets():
    model, tokens = air(**Q4), 512
    found = plan(model, measured_machine(), Wants(kv_dtype="bf16", context=tokens))
    touched = 128 * (1 - (1 - 8 / 128) ** tokens)
    rows = tokens * 8 / touched
    expert_s = 1 / rates_of().products["Q4_0 int8"].at(rows)
    experts = 45 * touched * model.layers[1].expert.params * expert_s
    fixed = sum(sum(p.params for p in layer.parts if p.is_integer) for layer in model.layers) / (0.1e9 * 100 / tokens)
    floats = sum(sum(p.params for p in layer.parts if not p.is_integer) for layer in model.layers)
    floats = floats / (0.05e9 * 100 / tokens)
    attention = 46 * (4 * 96 * 128 * 0.125e-9 + 2 * 8 * 128 * 0.5e-9) * tokens * (tokens + 1) / 2
    around = sum(part.params for part in model.top[1:]) / 0.5e9 + 46 * 1e-3 + 20e-3
    wanted = experts + fixed + floats + attention + around
    assert tokens / found.forecast.prefill_tokens_per_s.value == pytest.approx(wanted, rel=1e-3)
    assert rows == pytest.approx(32, rel=0.01)


def test_schemes_and_dtypes_that_were_not_measured_are_modelled():
    hardware = measured_machine(products={"bf16 fp32": ProductRate((1,), (1e6,))})
    plain = replace(hardware, cpu=replace(hardware.cpu, kernels=None))
    slow, modelled = (plan(air(**Q4), each, Wants()).forecast for each in (hardware, plain))
    experts = 45 * 8 * air(**Q4).layers[1].expert.nbytes / (0.8 * 60e9)
    assert 1 / slow.decode_tokens_per_s[0].value > 100 > 1 / modelled.decode_tokens_per_s[0].value > experts


def test_an_expert_of_two_schemes_takes_the_time_of_its_three_matrices():
    rates = KernelRates(
        "x", {"Q4_K int8": ProductRate((1,), (3e9,)), "Q6_K int8": ProductRate((1,), (1e9,))}, {}, {}, {}, 1e-6
    )
    hardware = replace(machine(), cpu=replace(machine().cpu, kernels=rates))
    seconds = Speeds(hardware, DEFAULT, 1).product("Q4_K + Q6_K", 1.0, 3e9, 1, is_integer=True)
    assert sum(seconds) == pytest.approx(2 / 3 + 1)


def test_rates_of_kernels_count_for_the_threads_they_were_measured_with():
    hardware = measured_machine()
    same, other = (plan(air(**Q4), hardware, Wants(threads=n)).forecast for n in (hardware.cpu.threads, 3))
    assert (same.decode_tokens_per_s[0].basis, other.decode_tokens_per_s[0].basis) == ("measured", "modelled")
    plain = replace(hardware, cpu=replace(hardware.cpu, kernels=None, basis="modelled"))
    assert other == plan(air(**Q4), plain, Wants(threads=3)).forecast


def placed(model, hardware, **wants) -> PlacedModel:
    found = plan(model, hardware, Wants(**wants), with_advice=False)
    return PlacedModel(model, found.placement, found.machine, found.resolved, IDEAL)


def indexed(model, *, index_bytes: int, index_flops: int):
    """With an indexer in every second layer whose keys are part of the cache, and a window, as GLM-5 has."""
    has = [i % 2 == 0 for i in range(len(model.layers))]
    own = {dtype: tuple(index_bytes if each else 0 for each in has) for dtype in ("bf16", "fp8")}
    kv = {dtype: tuple(a + b for a, b in zip(model.kv_bytes[dtype], own[dtype], strict=True)) for dtype in own}
    return replace(
        model,
        kv_bytes=kv,
        index_kv_bytes=own,
        index_flops=tuple(index_flops if each else 0 for each in has),
        attention_window=256,
        mtp=None,
    )


def test_layers_that_are_equal_but_not_one_are_counted():
    """A checkpoint's layers are made one by one; a release's alike ones are one value."""
    one, hardware = air(**INT4), machine(ram_gib=96)
    apart = replace(one, layers=tuple(replace(layer) for layer in one.layers))
    assert placed(apart, hardware).steps == placed(one, hardware).steps
    assert sum(placed(apart, hardware).steps.values()) == 46


def test_an_indexers_keys_are_counted_once():
    model = indexed(air(**INT4), index_bytes=512, index_flops=1)
    for step in placed(model, machine(ram_gib=96), context=4096).steps:
        own = step.index_kv_numbers
        assert own in (0, 256)
        assert step.kv_numbers + own == 2048 + own  # 4096 bytes of bf16, and the indexer's
        assert step.kv_bytes - step.index_kv_bytes == 4096


def test_an_indexer_scores_every_pair_of_a_prompt_and_attention_those_in_its_window():
    hardware = machine(ram_gib=96)
    without, with_it = (indexed(air(**INT4), index_bytes=512, index_flops=flops) for flops in (0, 10**9))
    seconds = {}
    for tokens in (1, 2, 400):
        clocks = (placed(model, hardware, context=4096) for model in (without, with_it))
        first, second = (model.prefill(model.speeds[1], tokens).total for model in clocks)
        seconds[tokens] = second - first
    assert seconds[2] / seconds[1] == pytest.approx(3.0)
    assert seconds[400] / seconds[1] == pytest.approx(400 * 401 / 2)


def test_attention_of_the_mtp_layer_is_that_of_the_last():
    model = air("fp8_channel", 8)
    model = replace(model, attention_flops=(1,) * 45 + (7,))
    assert placed(model, machine(H200)).mtp.attention_flops == 7


def test_measured_rates_have_a_range_of_their_own():
    """Products, attention, layers, rows of a chunk and the token alike: 0.87 to 1.13 of the rates."""
    kernels = KernelRates(
        "x",
        {"Q4_0 int8": ProductRate((1,), (1e9,))},
        {"bf16": AttentionCost(1e-9, 0.0)},
        {"bf16": AttentionCost(2e-9, 0.0)},
        {"int8": 1e-3, "fp32": 2e-3},
        3e-3,
        {"int8": 4e-9, "fp32": 5e-9},
    )
    hardware = machine(ram_gib=96)
    hardware = replace(hardware, cpu=replace(hardware.cpu, kernels=kernels, basis="measured"))
    for guess, part in enumerate(DEFAULT.measured):
        speeds = Speeds(hardware, DEFAULT, guess)
        assert sum(speeds.product("int4", 1.0, 1e9, 1, is_integer=True)) == pytest.approx(1.0 / part)
        assert speeds.attention("bf16", 10**9, 0, in_prefill=False) == pytest.approx(1.0 / part)
        assert speeds.attention("bf16", 10**9, 0, in_prefill=True) == pytest.approx(2.0 / part)
        assert speeds.layer_s("int8") == pytest.approx(1e-3 / part)
        assert speeds.row_s("fp32") == pytest.approx(5e-9 / part)
        assert speeds.token_s == pytest.approx(3e-3 / part)
    assert DEFAULT.measured[0] < DEFAULT.measured[1] == 1.0 < DEFAULT.measured[2]
