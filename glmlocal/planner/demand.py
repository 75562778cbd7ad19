"""What is to be placed, in bytes: a model's layers, what each token's keys and values take, what devices keep for us.

Nothing is decided here: which layer goes where is ``layout.py``'s and ``layers.py``'s, what is asked is ``solve.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from glmlocal.models.footprint import Footprint, Layer
from glmlocal.planner.machine import ExpertGpu, Gpu, Machine
from glmlocal.planner.plan import Line, Wants
from glmlocal.units import GIB, MIB

# A prefill chunk: large enough that each weight is read for many tokens, small enough to cancel.
MAX_NUM_BATCHED_TOKENS = 1024
RUNTIME_BYTES = 230 * MIB  # resident set of Python with torch, glmlocal and the extension: 225 to 235 MiB measured
CUDA_CONTEXT_BYTES = GIB // 2  # driver and lazily loaded kernels about 300 MiB (pytorch#107667), libraries' workspace
ACTIVATION_ROWS = 18  # of hidden_size in fp32 that a token of a chunk holds at once: q, k, v, 8 experts' results, …
STAGING_BYTES = GIB  # one of two buffers through which a layer's missing experts are streamed while prefilling
EXPERT_STAGING = 2  # slots of a GPU that holds experts only, through which others are streamed
PACK_ALIGNMENT = 4096  # of an expert's record on NVMe (design.md §3)


def total(lines: Iterable[Line]) -> int:
    return sum(line.nbytes for line in lines)


def padded(nbytes: int) -> int:
    """Of an expert's record: whole pages."""
    return -(-nbytes // PACK_ALIGNMENT) * PACK_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Bytes:
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


@dataclass(frozen=True, eq=False)
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
    def kinds(self) -> tuple[int, ...]:
        """For each layer of the chain the first that is the same object: alike layers mostly are."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(id(layer), i) for i, layer in enumerate(self.chain))

    def is_mtp(self, number: int) -> bool:
        """Is that layer of the chain the MTP layer?"""
        return number >= len(self.footprint.layers)

    @cached_property
    def kv_bytes(self) -> tuple[int, ...]:
        """Of one token, in each layer of the chain."""
        layers = self.footprint.kv_bytes[self.kv_dtype]
        has_mtp = self.footprint.mtp is not None and self.num_drafts > 0
        return (*layers, *([self.footprint.mtp_kv_bytes[self.kv_dtype]] if has_mtp else []))

    @cached_property
    def weights(self) -> Bytes:
        """The chain without a KV pool."""
        resident = [layer.resident_bytes for layer in self.chain]
        resident[-1] += sum(part.nbytes for part in self.footprint.top if part.component != "embeddings")
        expert = [layer.expert.nbytes if layer.expert else 0 for layer in self.chain]
        return Bytes(resident, expert, [layer.num_experts if layer.expert else 0 for layer in self.chain])

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Layers of the chain that follow one another and are alike: bytes, KV bytes of a token, how many."""
        alike = groupby(zip(self.weights.full, self.kv_bytes, strict=True))
        return tuple((nbytes, kv, len(list(run))) for (nbytes, kv), run in alike)

    @cached_property
    def gpus(self) -> list[tuple[int, Gpu]]:
        """Those that can hold something, with their numbers; the fastest first, equal ones in their order."""
        usable = [(i, gpu) for i, gpu in enumerate(self.machine.gpus) if self.gpu_free_bytes(gpu) > 0]
        return sorted(usable, key=lambda item: -item[1].read_gb_per_s)

    @cached_property
    def free_bytes(self) -> list[int]:
        """Of each of ``gpus``, for weights, KV and staging."""
        return [self.gpu_free_bytes(gpu) for _, gpu in self.gpus]

    def is_hopeless(self, kv_tokens: int = 0, *, with_gpus: bool = True) -> bool:
        """Are weights and such a KV pool alone more than all memory together? Then no layout needs to be tried."""
        if self.machine.nvme is not None and self.wants.offload:
            return False
        memory = self.ram_bytes + (sum(self.free_bytes) if with_gpus else 0)
        return sum((nbytes + kv * kv_tokens) * count for nbytes, kv, count in self.runs) > memory

    def sizes(self, kv_tokens: int) -> Bytes:
        """The chain with such a pool."""
        resident = [nbytes + kv * kv_tokens for nbytes, kv in zip(self.weights.resident, self.kv_bytes, strict=True)]
        return replace(self.weights, resident=resident)

    @cached_property
    def embedding_bytes(self) -> int:
        return sum(part.nbytes for part in self.footprint.top if part.component == "embeddings")

    @cached_property
    def read_buffers_bytes(self) -> int:
        """Two layers' experts on their way from NVMe."""
        return 2 * self.footprint.num_experts_per_tok * max(self.weights.expert)

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

    @cached_property
    def slot_staging_bytes(self) -> int:
        """Of each GPU that holds experts only: what others are streamed through, for each size of an expert."""
        return EXPERT_STAGING * sum({padded(size) for size in self.weights.expert if size})

    @cached_property
    def slot_free_bytes(self) -> dict[int, int]:
        """For slots, of those of such GPUs, by number, that have room for an expert of any layer."""
        largest = padded(max(self.weights.expert))
        free = {i: self.slot_bytes(gpu) - self.slot_staging_bytes for i, gpu in enumerate(self.machine.expert_gpus)}
        return {i: nbytes for i, nbytes in free.items() if nbytes >= largest > 0}

    def vram_bytes(self, gpu: Gpu) -> int:
        return gpu.memory_bytes if self.wants.vram_bytes is None else min(gpu.memory_bytes, self.wants.vram_bytes)

    def gpu_free_bytes(self, gpu: Gpu) -> int:
        """For weights, KV and staging."""
        return self.vram_bytes(gpu) - total(self.gpu_overhead(gpu))

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
