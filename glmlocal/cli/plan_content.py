"""What the reports on a Plan say, whatever they look like: labels, numbers as people read them, sums of ledger lines.

No terminal, no markup, no torch. Names in a plan can come from files; they are made harmless here, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from glmlocal.cli.terminal import one_line
from glmlocal.planner.machine import Basis, Machine
from glmlocal.planner.plan import Device, Line, Plan, Rate
from glmlocal.units import format_bytes, format_count

# What a bar shows, in its order.
CATEGORIES = ("experts", "other weights", "KV cache", "MTP", "buffers", "margin")
_BUFFERS = ("activations", "CUDA context", "runtime", "staging", "read buffers")
FREE = "free"

_CERTAINTY: tuple[Basis, ...] = ("exact", "measured", "modelled")  # a sum is as certain as its least certain part
_MOST_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class Bar:
    """A device: what it has, and who takes how much of it."""

    name: str
    capacity_bytes: int
    segments: tuple[tuple[str, int], ...]  # (category, bytes), those that are not empty

    @property
    def used_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.segments)

    @property
    def text(self) -> str:
        return f"{format_bytes(self.used_bytes)} of {format_bytes(self.capacity_bytes)}"


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes by what they are for and where; the last row is the sum."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...], Basis], ...]  # (what, bytes per column, basis)


@dataclass(frozen=True, slots=True)
class Speed:
    """A line of the forecast."""

    label: str
    value: str
    range: str  # empty where the value is promised as it is
    bound_by: str
    basis: Basis
    note: str


def category(what: str) -> str:
    """Which part of a bar a ledger line belongs to."""
    what = what.partition(",")[0]
    if what.startswith("MTP"):
        return "MTP"
    if "expert" in what:
        return "experts"
    if what.startswith("KV cache"):
        return "KV cache"
    if what in _BUFFERS:
        return "buffers"
    return "margin" if what == "margin" else "other weights"


def bars(plan: Plan) -> tuple[Bar, ...]:
    """One per device, in the plan's order; devices that nothing is on are left out unless nothing is on any."""
    used = [device for device in plan.devices if device.lines] or list(plan.devices)
    return tuple(_bar(device) for device in used)


def _bar(device: Device) -> Bar:
    sums = dict.fromkeys(CATEGORIES, 0)
    for line in device.lines:
        sums[category(line.what)] += line.nbytes
    segments = tuple((name, nbytes) for name, nbytes in sums.items() if nbytes)
    return Bar(one_line(device.name), device.capacity_bytes, segments)


def ledger(plan: Plan) -> Ledger:
    """Lines of one kind together, as ``attention, bf16`` and ``attention, f32``; many GPUs as one column."""
    groups = _columns([device for device in plan.devices if device.lines])
    found: dict[str, tuple[list[int], list[Basis]]] = {}
    for column, (_, devices) in enumerate(groups):
        for line in (line for device in devices for line in device.lines):
            sums, bases = found.setdefault(_what(line), ([0] * len(groups), []))
            sums[column] += line.nbytes
            bases.append(line.basis)
    rows = [(what, tuple(sums), least_certain(bases)) for what, (sums, bases) in found.items()]
    rows.sort(key=lambda row: CATEGORIES.index(category(row[0])))
    total = tuple(sum(row[1][column] for row in rows) for column in range(len(groups)))
    rows.append(("together", total, least_certain(row[2] for row in rows)))
    return Ledger(tuple(name for name, _ in groups), tuple(rows))


def _what(line: Line) -> str:
    what = one_line(line.what.partition(",")[0])
    return "MTP weights" if what.startswith("MTP") and what != "MTP KV cache" else what


def _columns(devices: Sequence[Device]) -> list[tuple[str, list[Device]]]:
    if len(devices) <= _MOST_COLUMNS:
        return [(one_line(device.name), [device]) for device in devices]
    gpus = [device for device in devices if device.kind == "gpu"]
    others = [(one_line(device.name), [device]) for device in devices if device.kind != "gpu"]
    return [(f"{len(gpus)} GPUs", gpus), *others]


def least_certain(bases: Iterable[Basis]) -> Basis:
    return max(bases, key=_CERTAINTY.index, default="exact")


def verdict(plan: Plan) -> str:
    """``GLM-4.5-Air-FP8 fits 2× H100.``"""
    return f"{title(plan)} {'fits' if plan.fits else 'does not fit'} {machine_name(plan.machine)}"


def title(plan: Plan) -> str:
    quant = "" if plan.resolved.quant == "keep" else f" as {plan.resolved.quant}"
    return one_line(plan.name) + quant


def machine_name(machine: Machine) -> str:
    """``2× H100, 1× RTX 4090``, or the memory where there are no GPUs."""
    kinds = dict.fromkeys(gpu.name for gpu in machine.gpus)
    gpus = [f"{sum(gpu.name == kind for gpu in machine.gpus)}× {one_line(kind)}" for kind in kinds]
    own = " (this machine)" if machine.is_this_machine else ""
    return (", ".join(gpus) or f"{format_bytes(machine.ram.total_bytes)} of RAM") + own


def facts(plan: Plan) -> Iterator[tuple[str, str, Basis]]:
    """(label, text, basis) of what is neither memory nor speed."""
    resolved = plan.resolved
    yield (
        "parameters",
        f"{plan.total_params:,} in all, {format_count(plan.active_params)} active per token",
        "exact",
    )
    yield "weights", f"{format_bytes(plan.weights_bytes)} in the files", "exact"
    yield "download", format_bytes(plan.download_bytes), "modelled"
    if plan.disk_bytes > plan.download_bytes:
        yield "disk", f"{format_bytes(plan.disk_bytes)}: the download and the pack of experts", "modelled"
    else:
        yield "disk", format_bytes(plan.disk_bytes), "modelled"
    yield (
        "context",
        f"{resolved.context:,} tokens, {resolved.batch} sequences that share {resolved.kv_tokens:,}",
        "exact",
    )
    yield "KV cache", f"{plan.kv_bytes_per_token:,} bytes per token ({resolved.kv_dtype})", "exact"
    most = f"{plan.max_context:,} tokens" if plan.max_context else "none"
    yield "largest context", most, _basis_of_memory(plan)
    if plan.forecast is not None and plan.forecast.hit_rate is not None:
        yield "experts at hand", f"{plan.forecast.hit_rate:.0%} of those a token asks for", plan.forecast.hit_rate_basis


def _basis_of_memory(plan: Plan) -> Basis:
    return least_certain(line.basis for device in plan.devices for line in device.lines)


def speeds(plan: Plan) -> Iterator[Speed]:
    """Decode, drafts, prefill, first token; nothing for a plan that does not fit."""
    if plan.forecast is None:
        return
    for context, rate in sorted(plan.forecast.decode_tokens_per_s.items()):
        yield _speed(f"decode at {context:,}" if context else "decode, empty context", rate, "tok/s")
    for drafts, rate in sorted(plan.forecast.drafts_tokens_per_s.items()):
        yield _speed(f"with {drafts} MTP draft{'s' if drafts > 1 else ''}", rate, "tok/s")
    yield _speed("prefill", plan.forecast.prefill_tokens_per_s, "tok/s")
    for prompt, rate in sorted(plan.forecast.time_to_first_token_s.items()):
        yield _speed(f"first token of {prompt:,}", rate, "s")


def _speed(label: str, rate: Rate, unit: str) -> Speed:
    is_range = rate.low < rate.value or rate.high > rate.value
    text = f"{number(rate.low)} – {number(rate.high)}" if is_range else ""
    return Speed(label, f"{number(rate.value)} {unit}", text, one_line(rate.bound_by), rate.basis, one_line(rate.note))


def number(value: float) -> str:
    """Three significant digits, without exponents: 0.116, 6.65, 104, 8,640."""
    if value >= 999.5:
        digits = len(f"{value:.0f}") - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def where(plan: Plan) -> str:
    """In which tiers the experts live: ``GPU``, ``GPU + RAM``, ``RAM + NVMe``; empty for a plan that does not fit."""
    place = plan.placement
    if place is None:
        return ""
    tiers = (("GPU", place.gpu_experts), ("RAM", place.ram_experts), ("NVMe", place.nvme_experts))
    found = [name for name, experts in tiers if any(experts)]
    return " + ".join(found) or ("GPU" if any(device >= 0 for device in place.layer_device) else "RAM")


def advice(plan: Plan, notes: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """(sentence, what to type or nothing), the smallest change first; then ``notes``."""
    for each in plan.advice:
        yield one_line(each.text), one_line(each.option or "")
    for note in notes:
        yield one_line(note), ""


def shortfall(plan: Plan) -> str:
    """What is missing, in a sentence; empty where nothing is."""
    return "" if plan.shortfall is None else one_line(plan.shortfall.text)


def assumptions(plan: Plan) -> Iterator[str]:
    """What the numbers rest on."""
    for note in plan.machine.notes:
        yield one_line(note)
    machine = plan.machine
    for gpu in dict.fromkeys(machine.gpus):
        yield (
            f"{one_line(gpu.name)}: {format_bytes(gpu.memory_bytes)} at {gpu.read_gb_per_s:g} GB/s, link "
            f"{gpu.link_gb_per_s:g} GB/s, {gpu.bf16_tflop_per_s:g} TFLOP/s in bf16 ({gpu.basis})"
        )
    yield (
        f"RAM: {format_bytes(machine.ram.available_bytes)} of {format_bytes(machine.ram.total_bytes)} usable, read at "
        f"{machine.ram.read_gb_per_s:.4g} GB/s ({machine.ram.basis})"
    )
    int8 = "" if machine.cpu.int8_gop_per_s is None else f", {machine.cpu.int8_gop_per_s:.4g} GOP/s in int8"
    yield (
        f"CPU: {one_line(machine.cpu.name)}, {machine.cpu.threads} threads, {machine.cpu.fp32_gflop_per_s:.4g} GFLOP/s "
        f"in fp32{int8} ({machine.cpu.basis})"
    )
    if machine.nvme is not None:
        yield (
            f"disk: {format_bytes(machine.nvme.capacity_bytes)} free, read at {machine.nvme.read_gb_per_s:.3g} GB/s "
            f"({machine.nvme.basis})"
        )


def explanations(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """(device or "speed", what, number, formula) of every figure, as the plan has them."""
    for device in plan.devices:
        for line in device.lines:
            yield (
                one_line(device.name),
                one_line(line.what),
                f"{line.nbytes:,} B",
                f"{one_line(line.note)} ({line.basis})",
            )
    if plan.forecast is not None and plan.forecast.hit_rate is not None:
        if plan.forecast.hit_rate_basis == "measured":
            note = "from the route trace of earlier runs: share of the uses that the hottest experts had (measured)"
        else:
            formula = "mean of 1 - (1 - f^0.52)^1.675 for the part f of each layer's experts that is there"
            note = f"{formula}: a fit over published hosts and policies, no route trace of this model (modelled)"
        yield "speed", "experts at hand", f"{plan.forecast.hit_rate:.0%}", note
    for speed in speeds(plan):
        yield "speed", speed.label, speed.value, f"{speed.note} ({speed.basis})"
