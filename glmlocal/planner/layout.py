"""Which device gets which layer and how many of its experts, once it is known what will be run.

Sums of bytes only: what each of them is for, ``ledger.py`` says of the layout that is chosen. What is asked for
(context, KV pool, drafts) is decided in ``solve.py``; ``layers.py`` is the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import mul

from glmlocal.planner import layers, ledger
from glmlocal.planner.demand import Bytes, Demand, padded, total
from glmlocal.planner.machine import Gpu
from glmlocal.planner.plan import CPU, Device, Placement


@dataclass(frozen=True)
class Layout:
    """``is_fast``: all experts are in the fastest tier that there is, but for those that were asked to leave it."""

    demand: Demand
    kv_tokens: int
    placement: Placement
    used_bytes: tuple[int, ...]  # of every GPU for layers, then RAM, then NVMe
    is_fast: bool

    @property
    def fits(self) -> bool:
        demand, nvme = self.demand, self.demand.machine.nvme
        gpus = (demand.vram_bytes(gpu) for gpu in demand.machine.gpus)
        capacities = (*gpus, demand.ram_bytes, 0 if nvme is None else nvme.capacity_bytes)
        return all(used <= capacity for used, capacity in zip(self.used_bytes, capacities, strict=True))

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        return ledger.devices(self.demand, self.placement, self.kv_tokens)


def holds(demand: Demand, kv_tokens: int, kv_fraction: float = 1.0) -> bool:
    """Can all experts be in the fastest tier beside a pool of so many tokens? Much quicker than ``lay_out``.

    ``kv_fraction``: how much of the memory that the weights leave the pool may take, where there are no GPUs.
    """
    if demand.gpus:
        offload = demand.wants.cpu_offload_bytes or 0
        runs = [(nbytes + kv * kv_tokens, count) for nbytes, kv, count in demand.runs]
        return layers.pack_runs(runs, [free + _relief(demand, offload) for free in demand.free_bytes]) is not None
    if demand.needs_gpus:
        return False
    overhead = total(demand.ram_overhead) + demand.embedding_bytes
    free = demand.ram_bytes - overhead - sum(demand.weights.full)
    return sum(demand.kv_bytes) * kv_tokens <= free * kv_fraction


def pace(demand: Demand, kv_tokens: int) -> float:
    """How long the decoder layers and the head wait for their GPUs' memory, to compare; 0 where all are alike."""
    rates = {number: gpu.read_gb_per_s for number, gpu in demand.gpus}
    if len(set(rates.values())) < 2:
        return 0.0
    owners, _, _ = _on_gpus(demand, demand.sizes(kv_tokens), demand.gpus, whole=False)
    on_head = owners[-1]  # and the MTP layer
    return sum(1 / rates[owner] for owner in (*owners[: len(demand.footprint.layers)], on_head) if owner != CPU)


@lru_cache(maxsize=1 << 8)
def lay_out(demand: Demand, kv_tokens: int) -> Layout:
    """Place everything beside a KV pool of so many tokens. What does not fit shows as a device with too much.

    Kept, because searches for a context ask for the same again.
    """
    return _first_that_fits(demand, kv_tokens)


def _first_that_fits(demand: Demand, kv_tokens: int) -> Layout:
    first: Layout | None = None
    for layout in layouts(demand, kv_tokens):  # the others are not made where one fits
        if layout.fits:
            return layout
        first = first or layout
    assert first is not None, "there is always one"
    return first


def layouts(demand: Demand, kv_tokens: int) -> Iterator[Layout]:
    """Ways to place everything; more than one only where experts have to leave the GPUs.

    Staging costs memory on both sides: whole layers on the GPUs need none, nor does doing without GPUs.
    """
    layout = _lay_out(demand, kv_tokens, demand.gpus)
    yield layout
    if demand.is_hopeless(kv_tokens):
        return
    if demand.gpus and not demand.needs_gpus and not (layout.fits and layout.is_fast):
        yield replace(_lay_out(demand, kv_tokens, demand.gpus, whole=True), is_fast=False)
        if not demand.is_hopeless(kv_tokens, with_gpus=False):
            yield replace(_lay_out(demand, kv_tokens, []), is_fast=False)


def _lay_out(demand: Demand, kv_tokens: int, gpus: list[tuple[int, Gpu]], *, whole: bool = False) -> Layout:
    """``whole``: where not everything fits, as many layers on the GPUs as fit with all of their experts."""
    sizes = demand.sizes(kv_tokens)
    owners, gpu_experts, is_fast = _on_gpus(demand, sizes, gpus, whole=whole)
    left = [count - given for count, given in zip(sizes.num_experts, gpu_experts, strict=True)]
    used = _used(demand, sizes, owners, gpu_experts, left)
    homes, slots, nvme = left, [0] * len(left), [0] * len(left)
    pack_bytes, spilled = 0, _times(sizes.expert, left)
    may_spill = spilled > 0 and demand.machine.nvme is not None and demand.wants.offload
    if may_spill and used[CPU] + spilled > demand.ram_bytes:
        homes, nvme = nvme, left
        used[CPU] += demand.read_buffers_bytes
        slots = layers.fill(sizes.expert, left, max(0, demand.ram_bytes - used[CPU]))
        pack_bytes, spilled = _times(map(padded, sizes.expert), nvme), _times(sizes.expert, slots)
    used[CPU] += spilled
    placement = Placement(
        tuple(owners), tuple(gpu_experts), tuple(homes), tuple(nvme), tuple(slots), head_device=owners[-1]
    )
    if demand.machine.expert_gpus and not demand.machine.gpus:
        placement = _over_gpus(demand, sizes, placement)
    return Layout(demand, kv_tokens, placement, (*used, pack_bytes), is_fast and not any(nvme))


def _used(
    demand: Demand, sizes: Bytes, owners: Sequence[int], gpu_experts: Sequence[int], left: Sequence[int]
) -> list[int]:
    """Bytes of each GPU, and of RAM (the last, which CPU is the index of) without experts."""
    used, has_staging = [0] * (len(demand.machine.gpus) + 1), set()
    for owner, resident, expert, given, others in zip(
        owners, sizes.resident, sizes.expert, gpu_experts, left, strict=True
    ):
        used[owner] += resident + expert * given
        if others and owner != CPU:
            has_staging |= {owner, CPU}
    for owner in {*owners, CPU}:
        overhead = demand.ram_overhead if owner == CPU else demand.gpu_overhead(demand.machine.gpus[owner])
        used[owner] += total(overhead) + (2 * demand.staging_bytes if owner in has_staging else 0)
    used[CPU] += demand.embedding_bytes
    return used


def _times(sizes: Iterable[int], counts: Iterable[int]) -> int:
    return sum(map(mul, sizes, counts))


def _over_gpus(demand: Demand, sizes: Bytes, placement: Placement) -> Placement:
    """Slots on GPUs that hold experts only: layers shared in proportion to memory, slots evenly among those."""
    free, expert = demand.slot_free_bytes, [padded(size) for size in sizes.expert]
    if not free:
        return placement
    loads = [size * count for size, count in zip(expert, sizes.num_experts, strict=True)]
    usable = list(free)
    owners = [usable[owner] for owner in layers.level(loads, list(free.values()))]
    given = [0] * len(expert)
    for number, nbytes in free.items():
        mine = [i for i, owner in enumerate(owners) if owner == number and expert[i]]
        at_home = demand.wants.cpu_offload_bytes or 0
        room = min(nbytes, sum(loads[i] for i in mine) - at_home)
        counts = layers.fill([expert[i] for i in mine], [sizes.num_experts[i] for i in mine], max(0, room))
        for i, count in zip(mine, counts, strict=True):
            given[i] = count
    device = tuple(owner if count else CPU for owner, count in zip(owners, given, strict=True))
    return replace(placement, slot_device=device, gpu_slots=tuple(given))


def _on_gpus(
    demand: Demand, sizes: Bytes, gpus: list[tuple[int, Gpu]], *, whole: bool
) -> tuple[list[int], list[int], bool]:
    """Owner and experts on it of each layer, and whether nothing had to leave the GPUs."""
    nothing = [0] * len(sizes.expert)
    if not gpus and demand.needs_gpus:
        return nothing, sizes.num_experts, False  # all of it on the first GPU, which is too small for any
    if not gpus:
        return [CPU] * len(nothing), nothing, True
    free = demand.free_bytes
    rates = [gpu.read_gb_per_s for _, gpu in gpus]
    offload = demand.wants.cpu_offload_bytes or 0
    owners = layers.spread(sizes.full, [each + _relief(demand, offload) for each in free], rates)
    is_fast = owners is not None and not layers.over(sizes.resident, owners, free)
    if not is_fast and not demand.wants.offload:
        owners = layers.level(sizes.full, free)
        return [gpus[owner][0] for owner in owners], sizes.num_experts, False
    if owners is None or not is_fast:
        staged = [max(0, each - 2 * demand.staging_bytes) for each in free]
        owners = _pack_or_cpu(sizes.full, free) if whole else _split_for_offload(sizes, staged)
    given = list(nothing)
    for place, budget in enumerate(free):
        mine = [i for i, owner in enumerate(owners) if owner == place]
        experts = sum(sizes.expert[i] * sizes.num_experts[i] for i in mine)
        room = budget - sum(sizes.resident[i] for i in mine)
        if offload or experts > room:
            room = min(room - 2 * demand.staging_bytes, experts - offload)
        counts = layers.fill([sizes.expert[i] for i in mine], [sizes.num_experts[i] for i in mine], max(0, room))
        for i, count in zip(mine, counts, strict=True):
            given[i] = count
    numbers = [number for number, _ in gpus]
    return [numbers[owner] if owner < len(numbers) else CPU for owner in owners], given, is_fast


def _split_for_offload(sizes: Bytes, free: list[int]) -> list[int]:
    """Even by all weights where what is not experts then fits, else by that, else what fits; the rest on the CPU."""
    for loads in (sizes.full, sizes.resident) if all(free) else ():
        owners = layers.level(loads, free)
        if not layers.over(sizes.resident, owners, free):
            return owners
    return _pack_or_cpu(sizes.resident, free)


def _pack_or_cpu(loads: list[int], free: list[int]) -> list[int]:
    """As many layers as fit in order; for the others the number behind the last GPU's, which is the CPU."""
    owners = layers.pack(loads, [*free, float("inf")])
    assert owners is not None, "the last device takes what is left"
    return owners


def _relief(demand: Demand, offload_bytes: int) -> int:
    """What a GPU has more room for when so many bytes of its experts live in RAM."""
    return offload_bytes - 2 * demand.staging_bytes if offload_bytes else 0
