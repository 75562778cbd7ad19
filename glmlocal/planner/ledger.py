"""What every byte of a placement is for: the ledger of each device, line by line, for people and for the runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from glmlocal.models.footprint import Part
from glmlocal.planner.demand import EXPERT_STAGING, Demand, padded
from glmlocal.planner.machine import Basis
from glmlocal.planner.plan import CPU, Device, Line, Placement
from glmlocal.units import format_bytes


def devices(demand: Demand, placement: Placement, kv_tokens: int) -> tuple[Device, ...]:
    """GPUs for layers, GPUs for experts only, RAM, and NVMe where experts live there."""
    return (
        *_gpu_devices(demand, placement, kv_tokens),
        *_slot_gpus(demand, placement),
        _ram(demand, placement, kv_tokens),
        *_nvme(demand, placement),
    )


def _ram(demand: Demand, placement: Placement, kv_tokens: int) -> Device:
    owners, chain = placement.layer_device, range(len(placement.layer_device))
    mine = [i for i in chain if owners[i] == CPU]
    lines = [
        *demand.ram_overhead,
        *_weight_lines(demand, mine, placement.gpu_experts, head=placement.head_device == CPU),
        Line("embeddings", demand.embedding_bytes, "exact", "rows are read from the mapped file, one per token"),
        *_kv_lines(demand, mine, kv_tokens),
    ]
    if any(owners[i] != CPU and _elsewhere(placement, i) for i in chain):
        lines.append(Line("staging", 2 * demand.staging_bytes, "modelled", "pinned, two buffers"))
    if any(placement.nvme_experts):
        note = "two layers' experts on their way from NVMe"
        lines.append(Line("read buffers", demand.read_buffers_bytes, "modelled", note))
    lines += _expert_lines(demand, chain, placement.ram_experts)
    lines += _expert_lines(demand, chain, placement.ram_slots, "expert slots")
    return Device("RAM", "ram", demand.ram_bytes, tuple(line for line in lines if line.nbytes))


def _nvme(demand: Demand, placement: Placement) -> Iterator[Device]:
    if demand.machine.nvme is not None and any(placement.nvme_experts):
        counted = zip(demand.weights.expert, placement.nvme_experts, strict=True)
        pack_bytes = sum(padded(size) * count for size, count in counted)
        line = Line("expert pack", pack_bytes, _basis(demand), "every expert whose home is not on a GPU")
        yield Device("NVMe", "nvme", demand.machine.nvme.capacity_bytes, (line,))


def _slot_gpus(demand: Demand, placement: Placement) -> Iterator[Device]:
    """Those that hold experts only, where one expert fits."""
    for number in demand.slot_free_bytes if placement.slot_device else ():
        gpu = demand.machine.expert_gpus[number]
        slots = [
            (padded(size), count)
            for size, device, count in zip(
                demand.weights.expert, placement.slot_device, placement.gpu_slots, strict=True
            )
            if device == number
        ]
        used, count = sum(size * each for size, each in slots), sum(each for _, each in slots)
        lines = (
            Line("GPU expert slots", used, "exact", f"{count} slots; what is in them is in RAM or on NVMe too"),
            Line("GPU staging", demand.slot_staging_bytes, "exact", f"{EXPERT_STAGING} slots to stream through"),
        )
        yield Device(f"gpu:{number} {gpu.gpu.name}", "gpu", demand.slot_bytes(gpu), lines if used else ())


def _gpu_devices(demand: Demand, placement: Placement, kv_tokens: int) -> Iterator[Device]:
    for number, gpu in enumerate(demand.machine.gpus):
        mine = [i for i, owner in enumerate(placement.layer_device) if owner == number]
        lines = [*demand.gpu_overhead(gpu)] if mine else []
        lines += _weight_lines(demand, mine, placement.gpu_experts, head=placement.head_device == number)
        lines += _kv_lines(demand, mine, kv_tokens)
        if any(_elsewhere(placement, i) for i in mine):
            note = "two buffers through which experts that are not here are streamed while prefilling"
            lines.append(Line("staging", 2 * demand.staging_bytes, "modelled", note))
        kept = tuple(line for line in lines if line.nbytes)
        yield Device(f"gpu:{number} {gpu.name}", "gpu", demand.vram_bytes(gpu), kept)


def _elsewhere(placement: Placement, layer: int) -> int:
    """Experts of a layer that have their home in RAM or on NVMe."""
    return placement.ram_experts[layer] + placement.nvme_experts[layer]


def _weight_lines(demand: Demand, mine: Sequence[int], experts: Sequence[int], *, head: bool) -> list[Line]:
    """Weights of the layers ``mine`` by component and scheme, without the embedding table."""
    alike = Counter(demand.kinds[i] for i in mine)  # nearly all are: faster added up
    decoder, mtp = ([(kind, n) for kind, n in alike.items() if demand.is_mtp(kind) == it] for it in (False, True))
    counted = [(part, count) for kind, count in decoder for part in demand.chain[kind].parts]
    if head:
        counted += [(part, 1) for part in demand.footprint.top if part.component != "embeddings"]
    lines = _part_lines(demand, counted)
    lines += _part_lines(demand, [(part, count) for kind, count in mtp for part in demand.chain[kind].parts], "MTP ")
    return lines + _expert_lines(demand, mine, experts)


def _part_lines(demand: Demand, parts: Iterable[tuple[Part, int]], prefix: str = "") -> list[Line]:
    """Of parts and how many there are of each."""
    totals: dict[tuple[str, str], int] = {}
    for part, count in parts:
        component = "weights" if part.component == "mtp" else part.component
        totals[component, part.scheme] = totals.get((component, part.scheme), 0) + count * part.nbytes
    return [
        Line(f"{prefix}{component}, {scheme}", nbytes, _basis(demand), "sum over the layers that live here")
        for (component, scheme), nbytes in totals.items()
        if nbytes
    ]


def _expert_lines(
    demand: Demand, mine: Iterable[int], counts: Sequence[int], what: str = "routed experts"
) -> list[Line]:
    """Experts of the layers ``mine``, ``counts`` of each layer of the chain."""
    numbers: Counter[int] = Counter()
    for i in mine if any(counts) else ():
        numbers[demand.kinds[i]] += counts[i]
    totals: dict[tuple[str, str], list[int]] = {}
    for kind, count in numbers.items():
        expert = demand.chain[kind].expert
        if expert is not None and count:
            sums = totals.setdefault((f"MTP {what}" if demand.is_mtp(kind) else what, expert.scheme), [0, 0])
            sums[0] += count
            sums[1] += count * expert.nbytes
    return [
        Line(f"{name}, {scheme}", nbytes, _basis(demand), f"{count} experts of {format_bytes(nbytes / count)}")
        for (name, scheme), (count, nbytes) in totals.items()
    ]


def _kv_lines(demand: Demand, mine: Sequence[int], kv_tokens: int) -> list[Line]:
    num_layers, kv = len(demand.footprint.layers), demand.kv_bytes
    lines = []
    for what, chosen in (
        ("KV cache", [i for i in mine if i < num_layers]),
        ("MTP KV cache", [i for i in mine if i >= num_layers]),
    ):
        per_token = sum(kv[i] for i in chosen)
        note = f"{kv_tokens} tokens × {per_token} bytes in {demand.kv_dtype}, {len(chosen)} layers"
        lines.append(Line(f"{what}, {demand.kv_dtype}", kv_tokens * per_token, "exact", note))
    return [line for line in lines if line.nbytes]


def _basis(demand: Demand) -> Basis:
    return "exact" if demand.footprint.is_exact else "modelled"
