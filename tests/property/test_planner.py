"""What must hold for every model and machine: capacities, homes, and that more is never less."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from glmlocal.errors import ConfigError
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate
from glmlocal.models.footprint import Footprint, Layer
from glmlocal.planner.demand import Demand
from glmlocal.planner.layout import layouts
from glmlocal.planner.machine import Cpu, Gpu, Machine, Nvme, Ram
from glmlocal.planner.plan import CPU, Plan, Wants
from glmlocal.planner.plan_json import as_json, from_json
from glmlocal.planner.solve import choose, plan
from glmlocal.units import GIB, MIB
from planned import follow, footprint

SCHEMES = [("bf16", 16.0), ("fp8_channel", 8.0), ("int4", 4.5)]


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    scheme, bits = draw(st.sampled_from(SCHEMES))
    layers = draw(st.integers(2, 12))
    made = footprint(
        "made up",
        scheme=scheme,
        bits=bits,
        layers=layers,
        dense=draw(st.integers(0, min(3, layers - 1))),
        hidden=draw(st.sampled_from([1024, 4096, 6144])),
        moe=draw(st.sampled_from([512, 1536])),
        experts=draw(st.sampled_from([1, 8, 64, 160])),
        context=draw(st.sampled_from([100, 8192, 131072, 1 << 20])),
        has_mtp=draw(st.booleans()),
    )
    if draw(st.booleans()):
        return made
    uneven = draw(st.lists(st.sampled_from([1, 1, 2]), min_size=layers, max_size=layers))  # some layers quantized less
    changed = tuple(grown(layer, factor) for layer, factor in zip(made.layers, uneven, strict=True))
    return replace(made, layers=changed)


def grown(layer: Layer, factor: int) -> Layer:
    expert = layer.expert and replace(layer.expert, nbytes=layer.expert.nbytes * factor)
    return replace(layer, expert=expert)


def gpus(read: st.SearchStrategy[float]) -> st.SearchStrategy[Gpu]:
    memory = st.integers(1, 48 << 10).map(lambda mib: mib * MIB)
    return st.builds(
        Gpu, st.just("made"), memory, read, st.sampled_from([3.0, 25.0]), st.just(80.0), st.none(), st.none()
    )


@st.composite
def kernels(draw: st.DrawFn) -> KernelRates:
    """As doctor might find them, disturbed or not; one row reads at most as fast as RAM of the machines below."""
    gb_per_s, rows = draw(st.sampled_from([20.0, 40.0])), (1, 4, 32, 512)
    slower = st.lists(st.sampled_from([1.0, 1.3, 0.5, 0.1]), min_size=3, max_size=3)
    products = {}
    for name, nbytes in (("bf16 fp32", 2.0), ("f32 fp32", 4.0), ("fp8_block128 fp32", 1.0), ("Q4_0 int8", 0.5625)):
        rates = [gb_per_s * 1e9 / nbytes]
        for factor in draw(slower):
            rates.append(rates[-1] * factor)
        products[name] = ProductRate(rows, tuple(rates))
    attention = {"bf16": AttentionCost(1e-11, 2e-11), "fp8": AttentionCost(0.0, 2.5e-11)}
    return KernelRates("made", products, attention, attention, {"int8": 30e-6, "fp32": 90e-6}, 1e-3)


@st.composite
def machines(draw: st.DrawFn, *, mixed: bool = True) -> Machine:
    """GPUs read at least twice as fast as RAM, RAM more than NVMe: a machine in which the tiers are in that order."""
    ram = Ram(0, draw(st.integers(1 << 10, 96 << 10)) * MIB, draw(st.sampled_from([40.0, 80.0, 200.0])))
    one = draw(gpus(st.sampled_from([500.0, 1000.0, 3000.0])))
    more = draw(st.integers(0, 3))
    cards = tuple(draw(gpus(st.sampled_from([500.0, 1000.0, 3000.0]))) for _ in range(more)) if mixed else (one,) * more
    cpu = Cpu("made", 8, 1000.0, draw(st.sampled_from([None, 4000.0])), kernels=draw(st.none() | kernels()))
    nvme = draw(
        st.none() | st.builds(Nvme, st.integers(1, 200).map(lambda gib: gib * GIB), st.sampled_from([3.0, 12.0]))
    )
    return Machine(cards, cpu, replace(ram, total_bytes=ram.available_bytes), nvme)


@st.composite
def wishes(draw: st.DrawFn, model: Footprint, *, offload: bool = True) -> Wants:
    """``offload``: perhaps with --cpu-offload-gb, which takes RAM that a larger GPU would not need."""
    limit = model.max_position_embeddings
    return Wants(
        context=draw(st.none() | st.integers(2, limit)),
        batch=draw(st.sampled_from([1, 4, 8])),
        draft=draw(st.sampled_from([None, 0, 1])) if model.mtp else None,
        vram_bytes=draw(st.none() | st.integers(0, 40).map(lambda gib: gib * GIB)),
        cpu_offload_bytes=draw(st.sampled_from([None, None, 2 * GIB])) if offload else None,
    )


RAM_SHARES = st.none() | st.floats(0.3, 0.9)  # of a model's bytes: few of the machines above need slots over NVMe
CASES = footprints().flatmap(lambda model: st.tuples(st.just(model), machines(), wishes(model)))


@settings(deadline=None)
@given(CASES, st.booleans(), st.sampled_from([0, 32, 4096, 1 << 17]), st.sampled_from([0, GIB]), RAM_SHARES)
def test_the_ledger_adds_up_to_what_was_placed(case, offload, kv_tokens, table_bytes, ram_share):
    """A layout is sums of bytes, its ledger their reasons: two ways to count the same."""
    model, machine, wants = case
    model = replace(model, top=(replace(model.top[0], nbytes=table_bytes), *model.top[1:]))
    if ram_share is not None:
        ram = replace(machine.ram, available_bytes=4 * GIB + int(ram_share * model.nbytes))
        machine = replace(machine, gpus=(), ram=ram, nvme=Nvme(200 * GIB, 3.0))
    wants = replace(wants, offload=offload, cpu_offload_bytes=wants.cpu_offload_bytes if offload else None)
    demand = Demand(model, machine, wants, "bf16", wants.draft or 0)
    for found in layouts(demand, kv_tokens):
        used = [device.used_bytes for device in found.devices]
        assert [*found.used_bytes][: len(used)] == used
        assert not any(found.used_bytes[len(used) :])  # nothing on NVMe, and no device for it
        assert found.fits == all(device.used_bytes <= device.capacity_bytes for device in found.devices)


@settings(deadline=None)
@given(CASES, st.booleans())
def test_every_plan_adds_up(case, offload):
    model, machine, wants = case
    wants = replace(wants, offload=offload, cpu_offload_bytes=wants.cpu_offload_bytes if offload else None)
    found = plan(model, machine, wants)
    assert found.fits == (found.placement is not None) == (found.shortfall is None) == (found.forecast is not None)
    if not found.fits:
        assert any(device.used_bytes > device.capacity_bytes for device in found.devices)
        assert found.shortfall.nbytes > 0
        return
    assert all(device.used_bytes <= device.capacity_bytes for device in found.devices)
    assert all(line.nbytes > 0 for device in found.devices for line in device.lines)
    place, resolved = found.placement, found.resolved
    chain = [*model.layers, *([model.mtp] if resolved.num_drafts else [])]
    homes = zip(place.gpu_experts, place.ram_experts, place.nvme_experts, strict=True)
    assert [sum(home) for home in homes] == [layer.num_experts if layer.expert else 0 for layer in chain]
    assert all(0 <= slots <= home for slots, home in zip(place.ram_slots, place.nvme_experts, strict=True))
    assert all(CPU <= device < len(machine.gpus) for device in place.layer_device)
    if not offload:
        assert not any(place.nvme_experts)
        assert not machine.gpus or not any(place.ram_experts)
    assert resolved.kv_tokens >= resolved.context
    assert 2 <= resolved.context <= model.max_position_embeddings
    assert resolved.context == (wants.context or resolved.context)
    assert found.max_context >= resolved.context
    held = sum(layer.nbytes for layer in chain) + sum(part.nbytes for part in model.top)
    lines = [line for device in found.devices if device.kind != "nvme" for line in device.lines]
    weights = sum(n.nbytes for n in lines if n.basis == "exact" and "KV" not in n.what and "slots" not in n.what)
    on_disk = sum(layer.expert.nbytes * n for layer, n in zip(chain, place.nvme_experts, strict=True) if layer.expert)
    assert weights + on_disk == held
    kv = [*model.kv_bytes[resolved.kv_dtype], *([model.mtp_kv_bytes[resolved.kv_dtype]] if resolved.num_drafts else [])]
    assert sum(line.nbytes for line in lines if "KV" in line.what) == resolved.kv_tokens * sum(kv)


@settings(deadline=None)
@given(CASES)
def test_json_is_the_identity(case):
    model, machine, wants = case
    found = plan(model, machine, wants)
    assert from_json(json.dumps(as_json(found))) == found


def bigger(machine: Machine, change: str, number: int) -> Machine:
    """One resource of the machine, larger or faster."""
    if change == "ram":
        return replace(machine, ram=replace(machine.ram, available_bytes=machine.ram.available_bytes + number * MIB))
    if change == "ram rate":
        return replace(machine, ram=replace(machine.ram, read_gb_per_s=machine.ram.read_gb_per_s * 1.2))
    if change == "vram":
        return replace(
            machine, gpus=tuple(replace(g, memory_bytes=g.memory_bytes + number * MIB) for g in machine.gpus)
        )
    if change == "vram rate":
        return replace(machine, gpus=tuple(replace(g, read_gb_per_s=g.read_gb_per_s * 1.2) for g in machine.gpus))
    if change == "link":
        return replace(machine, gpus=tuple(replace(g, link_gb_per_s=g.link_gb_per_s * 1.2) for g in machine.gpus))
    if change == "cpu":
        return replace(machine, cpu=replace(machine.cpu, fp32_gflop_per_s=machine.cpu.fp32_gflop_per_s * 1.2))
    if machine.nvme is None:
        return replace(machine, nvme=Nvme(number * GIB, 5.0))
    if change == "nvme rate":
        return replace(machine, nvme=replace(machine.nvme, read_gb_per_s=machine.nvme.read_gb_per_s * 1.2))
    return replace(machine, nvme=replace(machine.nvme, capacity_bytes=machine.nvme.capacity_bytes + number * GIB))


CHANGES = st.sampled_from(["ram", "ram rate", "vram", "vram rate", "link", "cpu", "nvme", "nvme rate"])


def tiers(found: Plan) -> tuple[bool, ...]:
    """Where experts are, and whether layers are the CPU's."""
    place = found.placement
    return (*map(any, (place.gpu_experts, place.ram_experts, place.nvme_experts)), CPU in place.layer_device)


def check_not_slower(less: Plan, more: Plan) -> None:
    """Layouts compete by decode speed at an empty context: one of another kind may cost prompts, or certainty.

    What there is more of may also serve a longer context, if none was wished.
    """
    assert more.fits >= less.fits
    if not less.fits:
        return
    slack, is_as_long = 1 - 1e-9, less.resolved.context == more.resolved.context
    before, after = less.forecast, more.forecast
    if tiers(less) != tiers(more):
        assert not is_as_long or after.decode_tokens_per_s[0].value >= before.decode_tokens_per_s[0].value * slack
        return
    for context, rate in before.decode_tokens_per_s.items():
        if context in after.decode_tokens_per_s:
            now = after.decode_tokens_per_s[context]
            assert now.value >= rate.value * slack
            assert now.low >= rate.low * slack
            assert now.high >= rate.high * slack
    if is_as_long:
        assert after.prefill_tokens_per_s.value >= before.prefill_tokens_per_s.value * slack
        for prompt, seconds in before.time_to_first_token_s.items():
            assert after.time_to_first_token_s[prompt].value * slack <= seconds.value


@settings(max_examples=300, deadline=None)
@given(footprints(), machines(mixed=False), CHANGES, st.integers(1, 30_000), st.data())
def test_more_of_anything_is_never_slower(model, machine, change, number, data):
    wants = data.draw(wishes(model, offload=False))
    check_not_slower(plan(model, machine, wants), plan(model, bigger(machine, change, number), wants))


@settings(max_examples=300, deadline=None)
@given(footprints(), machines(), CHANGES, st.integers(1, 30_000), st.data())
def test_more_of_anything_still_fits_on_gpus_of_several_kinds(model, machine, change, number, data):
    wants = data.draw(wishes(model, offload=False))
    less, more = plan(model, machine, wants), plan(model, bigger(machine, change, number), wants)
    assert more.fits >= less.fits


@settings(deadline=None)
@given(CASES)
def test_a_longer_context_never_predicts_faster(case):
    model, machine, wants = case
    wants = replace(wants, cpu_offload_bytes=None)
    found = plan(model, machine, wants)
    if found.fits:
        rates = [rate.value for _, rate in sorted(found.forecast.decode_tokens_per_s.items())]
        assert rates == sorted(rates, reverse=True)
        longer = plan(model, machine, replace(wants, context=found.max_context))
        shorter = plan(model, machine, replace(wants, context=max(2, found.max_context // 2)))
        assert longer.fits
        assert shorter.fits
        assert shorter.forecast.decode_tokens_per_s[0].value >= longer.forecast.decode_tokens_per_s[0].value * 0.999999


@settings(deadline=None)
@given(footprints(), footprints(), machines(), st.booleans())
def test_advice_is_right(model, finer, machine, offload):
    wants = Wants(offload=offload)
    alternative = replace(finer, quant="int4", max_position_embeddings=model.max_position_embeddings)
    found = plan(model, machine, wants, alternatives=(alternative,))
    if not found.fits:
        for advice in found.advice:
            assert follow(model, machine, wants, advice.option, (alternative,)).fits, advice
    chosen = choose((model, alternative), machine, wants)
    assert chosen.fits == (found.fits or plan(alternative, machine, wants).fits)


@settings(deadline=None)
@given(footprints(), machines(), st.builds(Wants, context=st.integers(), batch=st.integers(), draft=st.integers()))
def test_any_wish_is_a_plan_or_a_config_error(model, machine, wants):
    try:
        plan(model, machine, wants)
    except ConfigError:
        return
