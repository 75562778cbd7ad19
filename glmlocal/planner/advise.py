"""What is short when a model does not fit, and the smallest changes that would make it fit; hints where it does.

Nothing is advised that was not solved: every change is given to the solver, and those that do not fit are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glmlocal.models.footprint import Footprint
from glmlocal.planner.hardware import reserve_bytes
from glmlocal.planner.layout import Layout
from glmlocal.planner.machine import Machine
from glmlocal.planner.plan import CPU, Advice, Placement, Plan, Shortfall, Wants
from glmlocal.units import GIB, format_bytes

DRAFTS_RUN = False  # this version's runtime loads the MTP layer but does not speculate
MOST_GPUS = 64

Solve = Callable[[Footprint, Machine, Wants], Layout]


def shortfall(footprint: Footprint, layout: Layout) -> Shortfall:
    """What is missing on the device that misses most; on all GPUs together where moving layers would not help."""
    worst = max(layout.devices, key=lambda device: device.used_bytes - device.capacity_bytes)
    where, used, capacity = worst.name, worst.used_bytes, worst.capacity_bytes
    gpus = [device for device in layout.devices if device.kind == "gpu"]
    if worst.kind == "gpu" and len(gpus) > 1:
        together, room = sum(gpu.used_bytes for gpu in gpus), sum(gpu.capacity_bytes for gpu in gpus)
        if together > room:
            where, used, capacity = f"{len(gpus)} GPUs", together, room
    beside = ", with what the GPUs hold taken off" if gpus and worst.kind != "gpu" else ""
    text = (
        f"{footprint.name} needs {format_bytes(used)} of {where}{beside}, but {format_bytes(capacity)} can be used: "
        f"{format_bytes(used - capacity)} are missing"
    )
    return Shortfall(where, used - capacity, text)


def for_running(plan: Plan) -> tuple[Advice, ...]:
    """Of a plan that fits: whether MTP pays, and what this version cannot run yet."""
    return (*_drafts(plan), *_not_run_yet(plan))


def _drafts(plan: Plan) -> Iterator[Advice]:
    if plan.forecast is None or not plan.forecast.drafts_tokens_per_s:
        return
    drafts = plan.forecast.drafts_tokens_per_s
    best = max(drafts, key=lambda count: drafts[count].value)
    plain, gain = plan.forecast.decode_tokens_per_s[0].value, 0.0
    gain = drafts[best].value / plain
    if gain > 1:
        drafts_text = "1 draft" if best == 1 else f"{best} drafts"
        yield Advice(f"MTP with {drafts_text} per step is predicted to decode {gain:.2f} times as fast")
    else:
        yield Advice(f"MTP is not predicted to pay: with 1 draft per step {drafts[1].value / plain:.2f} times as fast")


def _not_run_yet(plan: Plan) -> Iterator[Advice]:
    if plan.placement is not None and set(plan.placement.layer_device) != {CPU}:
        yield Advice("this version plans for layers on GPUs but runs models in RAM and from NVMe, with experts on GPUs")
    if plan.resolved.num_drafts and not DRAFTS_RUN:
        yield Advice("this version plans for MTP drafts but does not speculate yet")


def for_fitting(
    plan: Plan, footprint: Footprint, alternatives: Sequence[Footprint], solve: Solve
) -> tuple[Advice, ...]:
    """Of a plan that does not fit: what would, the smallest change first."""
    found = list(_offload(plan, footprint, solve))
    smallest_pool = replace(plan.wants, context=2, batch=1)
    for advice in (_context, _kv_dtype, _batch) if solve(footprint, plan.machine, smallest_pool).fits else ():
        found += advice(plan, footprint, solve)
    found += _drafts_off(plan, footprint, solve)
    found += _quant(plan, alternatives, solve)
    for advice in (_ram, _gpus):
        found += advice(plan, footprint, solve)
    return tuple(found)


def _offload(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    """Experts of each GPU to RAM: as many GiB as are missing on the one that misses most.

    Also where RAM would have to be larger, unless most of the model would live there: RAM is then what is missing.
    """
    if not plan.machine.gpus:
        return
    wants, machine = replace(plan.wants, offload=True), plan.machine
    endless = _with_ram(machine, sum(device.used_bytes for device in plan.devices) * 2)
    asked = (plan.wants.cpu_offload_bytes or 0) // GIB
    spilled = solve(footprint, replace(endless, nvme=None), replace(wants, ram_bytes=None, cpu_offload_bytes=None))
    if not spilled.fits:
        return
    gib = max(1, -(-_most_spilled(spilled.placement, footprint) // GIB), asked)
    wants = replace(wants, ram_bytes=None, cpu_offload_bytes=gib * GIB)
    there = solve(footprint, endless, wants)
    if not there.fits:
        return
    needed = sum(device.used_bytes for device in there.devices if device.kind == "ram")
    text = f"move {gib} GiB of experts per GPU to RAM: {format_bytes(needed)} of it are then needed"
    option = f"--cpu-offload-gb {gib}"
    given = replace(wants, ram_bytes=plan.wants.ram_bytes)
    if solve(footprint, machine, given).fits:
        yield Advice(text, option)
        return
    gib, on_gpus = _ram_gib(needed), sum(device.used_bytes for device in there.devices if device.kind == "gpu")
    if on_gpus > needed and solve(footprint, _with_ram(machine, gib * GIB), wants).fits:
        has = format_bytes(min(machine.ram.available_bytes, plan.wants.ram_bytes or machine.ram.available_bytes))
        yield Advice(f"{text}, {has} can be used here", f"{option} --ram {gib}GiB")


def _most_spilled(place: Placement, footprint: Footprint) -> int:
    """Bytes of experts that the GPU which misses most of its layers' experts does not hold."""
    chain = [*footprint.layers, *([footprint.mtp] if footprint.mtp is not None else [])]
    spilled: dict[int, int] = {}
    for layer, device, experts in zip(chain, place.layer_device, place.ram_experts, strict=False):
        if layer.expert is not None:
            spilled[device] = spilled.get(device, 0) + layer.expert.nbytes * experts
    return max(spilled.values())


def _context(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    if not plan.max_context or plan.max_context >= plan.resolved.context:
        return
    if solve(footprint, plan.machine, replace(plan.wants, context=plan.max_context)).fits:
        yield Advice(f"a context of {plan.max_context} tokens fits", f"--context {plan.max_context}")


def _kv_dtype(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    """The widest that fits; int8 before fp8 where kernels of ours run it, being nearer to the truth."""
    now = footprint.kv_bytes_per_token(plan.resolved.kv_dtype)
    order = ("bf16", "fp8", "int8") if plan.machine.gpus else ("bf16", "int8", "fp8")
    for dtype in order:
        is_narrower = dtype in footprint.kv_bytes and footprint.kv_bytes_per_token(dtype) < now
        if is_narrower and solve(footprint, plan.machine, replace(plan.wants, kv_dtype=dtype)).fits:
            yield Advice(f"a KV cache in {dtype} fits", f"--kv-dtype {dtype}")
            return


def _batch(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    batch = plan.wants.batch // 2
    while batch >= 1:
        if solve(footprint, plan.machine, replace(plan.wants, batch=batch)).fits:
            sequences = "one sequence" if batch == 1 else f"{batch} sequences"
            yield Advice(f"room for {sequences} at a time fits", f"--batch {batch}")
            return
        batch //= 2


def _drafts_off(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    if plan.wants.draft and solve(footprint, plan.machine, replace(plan.wants, draft=0)).fits:
        yield Advice("without MTP it fits", "--draft 0")


def _quant(plan: Plan, alternatives: Sequence[Footprint], solve: Solve) -> Iterator[Advice]:
    for footprint in alternatives:
        wants = plan.wants if footprint.holds_mtp else replace(plan.wants, draft=None)
        if solve(footprint, plan.machine, wants).fits:
            yield Advice(f"quantized to {footprint.quant} while loading it fits", f"--quant {footprint.quant}")
            return


def _ram(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    """What of an endless RAM would be used: the margin grows with it."""
    if not any(device.kind == "ram" and device.used_bytes > device.capacity_bytes for device in plan.devices):
        return
    wants = replace(plan.wants, ram_bytes=None)
    endless = _with_ram(plan.machine, sum(device.used_bytes for device in plan.devices) * 2)
    there = solve(footprint, replace(endless, nvme=None), wants)
    gib = _ram_gib(sum(device.used_bytes for device in there.devices if device.kind == "ram"))
    if solve(footprint, _with_ram(plan.machine, gib * GIB), wants).fits:
        yield Advice(f"a machine with {gib} GiB of RAM would do", f"--ram {gib}GiB")


def _gpus(plan: Plan, footprint: Footprint, solve: Solve) -> Iterator[Advice]:
    """More GPUs of the kind that is there; only where all are of one kind."""
    gpus = plan.machine.gpus
    if not gpus or any(gpu != gpus[0] for gpu in gpus):
        return
    low, high = len(gpus) + 1, MOST_GPUS

    def fits(count: int) -> bool:
        machine = replace(plan.machine, gpus=gpus[:1] * count)
        return solve(footprint, machine, plan.wants).fits

    if low > high or not fits(high):
        return
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    yield Advice(f"{low} such GPUs hold it", f"--gpus {low}x{gpus[0].name}")


def _ram_gib(needed_bytes: int) -> int:
    """The least GiB of RAM of which, with the system's reserve taken off, so much can be used."""
    gib = -(-needed_bytes // GIB)
    while gib * GIB - reserve_bytes(gib * GIB) < needed_bytes:
        gib += 1
    return gib


def _with_ram(machine: Machine, total_bytes: int) -> Machine:
    """As ``--ram`` describes it."""
    ram = replace(machine.ram, total_bytes=total_bytes, available_bytes=total_bytes - reserve_bytes(total_bytes))
    return replace(machine, ram=ram)
