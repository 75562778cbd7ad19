"""Where every byte goes once it is known what will be run: the experts' homes, and a ledger for each device.

``lay_out`` is the one place that adds bytes up. What it is asked for (context, KV pool, drafts) is decided in
``solve.py``; which layer goes where in ``layers.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from glmlocal.models.footprint import Footprint, Layer, Part
from glmlocal.planner import layers
from glmlocal.planner.machine import Basis, ExpertGpu, Gpu, Machine
from glmlocal.planner.plan import CPU, Device, Line, Placement, Wants
from glmlocal.units import GIB, MIB, format_bytes

# A prefill chunk: large enough that each weight is read for many tokens, small enough to cancel.
MAX_NUM_BATCHED_TOKENS = 1024
RUNTIME_BYTES = 230 * MIB  # resident set of Python with torch, glmlocal and the extension: 225 to 235 MiB measured
CUDA_CONTEXT_BYTES = GIB // 2  # driver and lazily loaded kernels about 300 MiB (pytorch#107667), libraries' workspace
ACTIVATION_ROWS = (
    18  # rows of hidden_size in fp32 that a token of a chunk holds at once: q, k, v, 8 experts' results, …
)
STAGING_BYTES = GIB  # one of two buffers through which a layer's missing experts are streamed while prefilling
EXPERT_STAGING = 2  # slots of a GPU that holds experts only, through which others are streamed
PACK_ALIGNMENT = 4096  # of an expert's record on NVMe (design.md §3)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """The chain in bytes. ``resident``: weights outside the routed experts and the KV pool; the last with the head."""

    resident: list[int]
    expert: list[int]  # of one routed expert
    num_experts: list[int]

    @property
    def full(self) -> list[int]:
        return [r + e * n for r, e, n in zip(self.resident, self.expert, self.num_experts, strict=True)]

    @property
    def all_experts(self) -> int:
        return sum(e * n for e, n in zip(self.expert, self.num_experts, strict=True))


@dataclass(frozen=True)
class Demand:
    """What is to be placed. ``num_drafts`` > 0 loads the MTP layer. Without slots: what is derived is kept."""

    footprint: Footprint
    machine: Machine
    wants: Wants
    kv_dtype: str
    num_drafts: int

    @cached_property
    def chain(self) -> tuple[Layer, ...]:
        """The decoder layers, and the MTP layer behind them where it is loaded."""
        mtp = self.footprint.mtp
        return (*self.footprint.layers, *([mtp] if mtp is not None and self.num_drafts else []))

    @cached_property
    def kv_bytes(self) -> tuple[int, ...]:
        """Of one token, in each layer of the chain."""
        layers = self.footprint.kv_bytes[self.kv_dtype]
        has_mtp = self.footprint.mtp is not None and self.num_drafts > 0
        return (*layers, *([self.footprint.mtp_kv_bytes[self.kv_dtype]] if has_mtp else []))

    @cached_property
    def weights(self) -> _Bytes:
        """The chain without a KV pool."""
        resident = [layer.resident_bytes for layer in self.chain]
        resident[-1] += sum(part.nbytes for part in self.footprint.top if part.component != "embeddings")
        expert = [layer.expert.nbytes if layer.expert else 0 for layer in self.chain]
        return _Bytes(resident, expert, [layer.num_experts if layer.expert else 0 for layer in self.chain])

    @cached_property
    def gpus(self) -> list[tuple[int, Gpu]]:
        """Those that can hold something, with their numbers; the fastest first, equal ones in their order."""
        usable = [(i, gpu) for i, gpu in enumerate(self.machine.gpus) if self.gpu_free_bytes(gpu) > 0]
        return sorted(usable, key=lambda item: -item[1].read_gb_per_s)

    def is_hopeless(self, kv_tokens: int = 0) -> bool:
        """Are weights and such a KV pool alone more than all memory together? Then no layout needs to be tried."""
        if self.machine.nvme is not None and self.wants.offload:
            return False
        memory = sum(self.gpu_free_bytes(gpu) for _, gpu in self.gpus) + self.ram_bytes
        return sum(self.weights.full) + sum(self.kv_bytes) * kv_tokens > memory

    @cached_property
    def laid_out(self) -> Callable[[int], Layout]:
        return cache(partial(_first_that_fits, self))

    @property
    def needs_gpus(self) -> bool:
        """Is there anything that may not be in RAM?"""
        return bool(self.machine.gpus) and not self.wants.offload

    @property
    def ram_bytes(self) -> int:
        available = self.machine.ram.available_bytes
        return available if self.wants.ram_bytes is None else min(available, self.wants.ram_bytes)

    def slot_bytes(self, gpu: ExpertGpu) -> int:
        """For experts, staging among them."""
        return gpu.free_bytes if self.wants.vram_bytes is None else min(gpu.free_bytes, self.wants.vram_bytes)

    def vram_bytes(self, gpu: Gpu) -> int:
        return gpu.memory_bytes if self.wants.vram_bytes is None else min(gpu.memory_bytes, self.wants.vram_bytes)

    def gpu_free_bytes(self, gpu: Gpu) -> int:
        """For weights, KV and staging."""
        return self.vram_bytes(gpu) - sum(line.nbytes for line in self.gpu_overhead(gpu))

    def gpu_overhead(self, gpu: Gpu) -> tuple[Line, ...]:
        margin = max(GIB // 2, self.vram_bytes(gpu) // 25)
        return (
            Line("CUDA context", CUDA_CONTEXT_BYTES, "modelled", "driver, kernels and the libraries' workspace"),
            self.activations,
            Line("margin", margin, "modelled", "4 % of the memory, at least 512 MiB: fragmentation, other programs"),
        )

    @cached_property
    def staging_bytes(self) -> int:
        """Of one of the two buffers: a layer's experts, in pieces where they are many."""
        largest = max((layer.expert.nbytes * layer.num_experts for layer in self.chain if layer.expert), default=0)
        return min(STAGING_BYTES, largest)

    @cached_property
    def ram_overhead(self) -> tuple[Line, ...]:
        weights = sum(layer.nbytes for layer in self.chain)
        margin = max(64 * MIB, min(weights, self.ram_bytes) // 200)
        return (
            Line("runtime", RUNTIME_BYTES, "measured", "Python, torch, glmlocal and its kernels, without a model"),
            self.activations,
            Line("margin", margin, "modelled", "0.5 % of the weights or the RAM, the smaller; at least 64 MiB"),
        )

    @cached_property
    def activations(self) -> Line:
        tokens, hidden = MAX_NUM_BATCHED_TOKENS, self.footprint.hidden_size
        rows = self.wants.batch * (self.num_drafts + 1)
        nbytes = ACTIVATION_ROWS * tokens * hidden * 4 + 2 * rows * self.footprint.vocab_size * 4
        note = (
            f"{ACTIVATION_ROWS} rows × {tokens} tokens × {hidden} × 4 bytes, and logits of {rows} tokens twice: "
            f"2 × {rows} × {self.footprint.vocab_size} × 4"
        )
        return Line("activations", nbytes, "modelled", note)


@dataclass(frozen=True, slots=True)
class Layout:
    """``is_fast``: all experts are in the fastest tier that there is, but for those that were asked to leave it."""

    placement: Placement
    devices: tuple[Device, ...]
    is_fast: bool

    @property
    def fits(self) -> bool:
        return all(device.used_bytes <= device.capacity_bytes for device in self.devices)


def _bytes(demand: Demand, kv_tokens: int) -> _Bytes:
    weights = demand.weights
    resident = [nbytes + kv * kv_tokens for nbytes, kv in zip(weights.resident, demand.kv_bytes, strict=True)]
    return _Bytes(resident, weights.expert, weights.num_experts)


def holds(demand: Demand, kv_tokens: int, kv_fraction: float = 1.0) -> bool:
    """Can all experts be in the fastest tier beside a pool of so many tokens? Much quicker than ``lay_out``.

    ``kv_fraction``: how much of the memory that the weights leave the pool may take, where there are no GPUs.
    """
    sizes, gpus = _bytes(demand, kv_tokens), demand.gpus
    if gpus:
        offload = demand.wants.cpu_offload_bytes or 0
        budgets = [demand.gpu_free_bytes(gpu) + _relief(demand, offload) for _, gpu in gpus]
        return layers.pack(sizes.full, budgets) is not None
    if demand.needs_gpus:
        return False
    kv = sum(demand.kv_bytes) * kv_tokens
    overhead = sum(line.nbytes for line in demand.ram_overhead) + _embedding_bytes(demand)
    free = demand.ram_bytes - overhead - (sum(sizes.full) - kv)
    return kv <= free * kv_fraction


def pace(demand: Demand, kv_tokens: int) -> float:
    """How long the decoder layers and the head wait for their GPUs' memory, to compare; 0 where all are alike."""
    rates = {number: gpu.read_gb_per_s for number, gpu in demand.gpus}
    if len(set(rates.values())) < 2:
        return 0.0
    owners, _, _ = _on_gpus(demand, _bytes(demand, kv_tokens), demand.gpus, whole=False)
    on_head = owners[-1]  # and the MTP layer
    return sum(1 / rates[owner] for owner in (*owners[: len(demand.footprint.layers)], on_head) if owner != CPU)


def lay_out(demand: Demand, kv_tokens: int) -> Layout:
    """Place everything beside a KV pool of so many tokens. What does not fit shows as a device with too much.

    The demand remembers it: searches for a context ask for the same again.
    """
    return demand.laid_out(kv_tokens)


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
        for other in (_lay_out(demand, kv_tokens, demand.gpus, whole=True), _lay_out(demand, kv_tokens, [])):
            yield replace(other, is_fast=False)


def _lay_out(demand: Demand, kv_tokens: int, gpus: list[tuple[int, Gpu]], *, whole: bool = False) -> Layout:
    """``whole``: where not everything fits, as many layers on the GPUs as fit with all of their experts."""
    sizes = _bytes(demand, kv_tokens)
    owners, gpu_experts, is_fast = _on_gpus(demand, sizes, gpus, whole=whole)
    left = [count - given for count, given in zip(sizes.num_experts, gpu_experts, strict=True)]
    on_cpu = [i for i, owner in enumerate(owners) if owner == CPU]
    ram_lines = [
        *demand.ram_overhead,
        *_weight_lines(demand, on_cpu, [0] * len(left), head=owners[-1] == CPU),
        Line("embeddings", _embedding_bytes(demand), "exact", "rows are read from the mapped file, one per token"),
        *_kv_lines(demand, on_cpu, kv_tokens),
    ]
    if any(left[i] for i in range(len(left)) if owners[i] != CPU):
        ram_lines.append(Line("staging", 2 * demand.staging_bytes, "modelled", "pinned, two buffers"))
    free = demand.ram_bytes - sum(line.nbytes for line in ram_lines)
    homes, slots, nvme = left, [0] * len(left), [0] * len(left)
    nvme_device: list[Device] = []
    spilled = sum(size * count for size, count in zip(sizes.expert, left, strict=True))
    if spilled > free and demand.machine.nvme is not None and demand.wants.offload:
        buffers = 2 * demand.footprint.num_experts_per_tok * max(sizes.expert)
        ram_lines.append(Line("read buffers", buffers, "modelled", "two layers' experts on their way from NVMe"))
        homes, nvme = nvme, left
        slots = layers.fill(sizes.expert, left, max(0, free - buffers))
        pack_bytes = sum(_padded(size) * count for size, count in zip(sizes.expert, nvme, strict=True))
        capacity = demand.machine.nvme.capacity_bytes
        line = Line("expert pack", pack_bytes, _basis(demand), "every expert whose home is not on a GPU")
        nvme_device = [Device("NVMe", "nvme", capacity, (line,))]
    ram_lines += _expert_lines(demand, range(len(left)), homes)
    ram_lines += _expert_lines(demand, range(len(left)), slots, "expert slots")
    placement = Placement(
        tuple(owners), tuple(gpu_experts), tuple(homes), tuple(nvme), tuple(slots), head_device=owners[-1]
    )
    slot_gpus: list[Device] = []
    if demand.machine.expert_gpus and not demand.machine.gpus:
        placement, slot_gpus = _over_gpus(demand, sizes, placement)
    devices = (
        *_gpu_devices(demand, placement, kv_tokens),
        *slot_gpus,
        Device("RAM", "ram", demand.ram_bytes, tuple(line for line in ram_lines if line.nbytes)),
        *nvme_device,
    )
    return Layout(placement, devices, is_fast and not any(nvme))


def _over_gpus(demand: Demand, sizes: _Bytes, placement: Placement) -> tuple[Placement, list[Device]]:
    """Slots on GPUs that hold experts only: layers shared in proportion to memory, slots evenly among those."""
    gpus, expert = demand.machine.expert_gpus, [_padded(size) for size in sizes.expert]
    staging = EXPERT_STAGING * sum({size for size in expert if size})
    free = [max(0, demand.slot_bytes(gpu) - staging) for gpu in gpus]
    usable = [number for number, nbytes in enumerate(free) if nbytes >= max(expert)]
    if not usable or not any(expert):
        return placement, []
    loads = [size * count for size, count in zip(expert, sizes.num_experts, strict=True)]
    owners = [usable[owner] for owner in layers.level(loads, [free[number] for number in usable])]
    given, devices = [0] * len(expert), []
    for number in usable:
        mine = [i for i, owner in enumerate(owners) if owner == number and expert[i]]
        at_home = demand.wants.cpu_offload_bytes or 0
        room = min(free[number], sum(loads[i] for i in mine) - at_home)
        counts = layers.fill([expert[i] for i in mine], [sizes.num_experts[i] for i in mine], max(0, room))
        for i, count in zip(mine, counts, strict=True):
            given[i] = count
        used = sum(expert[i] * given[i] for i in mine)
        note = f"{sum(counts)} slots; what is in them is in RAM or on NVMe too"
        lines = (
            Line("GPU expert slots", used, "exact", note),
            Line("GPU staging", staging, "exact", f"{EXPERT_STAGING} slots to stream through"),
        )
        name, capacity = f"gpu:{number} {gpus[number].gpu.name}", demand.slot_bytes(gpus[number])
        devices.append(Device(name, "gpu", capacity, lines if used else ()))
    device = tuple(owner if count else CPU for owner, count in zip(owners, given, strict=True))
    return replace(placement, slot_device=device, gpu_slots=tuple(given)), devices


def _on_gpus(
    demand: Demand, sizes: _Bytes, gpus: list[tuple[int, Gpu]], *, whole: bool
) -> tuple[list[int], list[int], bool]:
    """Owner and experts on it of each layer, and whether nothing had to leave the GPUs."""
    nothing = [0] * len(sizes.expert)
    if not gpus and demand.needs_gpus:
        return nothing, sizes.num_experts, False  # all of it on the first GPU, which is too small for any
    if not gpus:
        return [CPU] * len(nothing), nothing, True
    free = [demand.gpu_free_bytes(gpu) for _, gpu in gpus]
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


def _split_for_offload(sizes: _Bytes, free: list[int]) -> list[int]:
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


def _gpu_devices(demand: Demand, placement: Placement, kv_tokens: int) -> list[Device]:
    devices = []
    for number, gpu in enumerate(demand.machine.gpus):
        mine = [i for i, owner in enumerate(placement.layer_device) if owner == number]
        lines = [*demand.gpu_overhead(gpu)] if mine else []
        lines += _weight_lines(demand, mine, placement.gpu_experts, head=placement.head_device == number)
        lines += _kv_lines(demand, mine, kv_tokens)
        if any(placement.ram_experts[i] + placement.nvme_experts[i] for i in mine):
            note = "two buffers through which experts that are not here are streamed while prefilling"
            lines.append(Line("staging", 2 * demand.staging_bytes, "modelled", note))
        kept = tuple(line for line in lines if line.nbytes)
        devices.append(Device(f"gpu:{number} {gpu.name}", "gpu", demand.vram_bytes(gpu), kept))
    return devices


def _weight_lines(demand: Demand, mine: Sequence[int], experts: Sequence[int], *, head: bool) -> list[Line]:
    """Weights of the layers ``mine`` by component and scheme, without the embedding table."""
    num_layers = len(demand.footprint.layers)
    layers_here = demand.footprint.layers
    alike = Counter(id(layers_here[i].parts) for i in mine if i < num_layers)  # nearly all are: faster added up
    parts = {id(layers_here[i].parts): layers_here[i].parts for i in mine if i < num_layers}
    counted = [(part, alike[key]) for key, some in parts.items() for part in some]
    if head:
        counted += [(part, 1) for part in demand.footprint.top if part.component != "embeddings"]
    lines = _part_lines(demand, counted)
    if any(i >= num_layers for i in mine):
        lines += _part_lines(demand, [(part, 1) for part in demand.chain[-1].parts], "MTP ")
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
    totals: dict[tuple[str, str], list[int]] = {}
    chain, num_layers = demand.chain, len(demand.footprint.layers)
    for i in mine if any(counts) else ():
        expert = chain[i].expert
        if expert is not None and counts[i]:
            name = f"MTP {what}" if i >= num_layers else what
            sums = totals.setdefault((name, expert.scheme), [0, 0])
            sums[0] += counts[i]
            sums[1] += counts[i] * expert.nbytes
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


def _embedding_bytes(demand: Demand) -> int:
    return sum(part.nbytes for part in demand.footprint.top if part.component == "embeddings")


def _padded(nbytes: int) -> int:
    return -(-nbytes // PACK_ALIGNMENT) * PACK_ALIGNMENT


def _basis(demand: Demand) -> Basis:
    return "exact" if demand.footprint.is_exact else "modelled"
