"""Plan: where every byte of a model goes, how fast it will be, or why it does not fit. Frozen values; to and from JSON.

The loader executes this very value. Sizes are ints in bytes, rates are tokens per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from glmlocal.planner.machine import Basis, Machine

DECODE_CONTEXTS = (0, 8192, 32768)  # and the plan's full context
FIRST_TOKEN_PROMPTS = (1024, 32768)
CPU = -1  # as a layer's device


@dataclass(frozen=True, slots=True)
class Wants:
    """What the user asked for; None and "auto" are resolved by ``solve.plan`` and nowhere later."""

    context: int | None = None
    batch: int = 8
    kv_dtype: str = "auto"
    activations: str = "auto"
    draft: int | None = None  # drafts per step; None: auto
    vram_bytes: int | None = None  # limit per GPU
    ram_bytes: int | None = None  # limit
    cpu_offload_bytes: int | None = None  # per GPU, as vLLM's --cpu-offload-gb
    offload: bool = True  # False: everything on the GPUs (or, without GPUs, in RAM)
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """What will be run."""

    context: int  # tokens of one sequence, prompt and answer
    batch: int
    kv_tokens: int  # the pool's size: what all sequences may hold together
    kv_dtype: str
    activations: str
    num_drafts: int
    quant: str
    max_num_batched_tokens: int
    threads: int


@dataclass(frozen=True, slots=True)
class Line:
    what: str  # "attention", "routed experts", "KV cache", "activations", "CUDA context", "margin", …
    nbytes: int
    basis: Basis
    note: str = ""  # how the number came about: a formula with its numbers, for --explain


@dataclass(frozen=True, slots=True)
class Device:
    name: str  # "cuda:0 H100", "RAM", "NVMe"
    kind: Literal["gpu", "ram", "nvme"]
    capacity_bytes: int
    lines: tuple[Line, ...]

    @property
    def used_bytes(self) -> int:
        return sum(line.nbytes for line in self.lines)


@dataclass(frozen=True, slots=True)
class Placement:
    """One entry per decoder layer, the MTP layer last where it is loaded. Every expert has exactly one home:

    ``gpu_experts + ram_experts + nvme_experts`` is the layer's number of experts.
    """

    layer_device: tuple[int, ...]  # index of the GPU that holds attention, KV, norms, router, shared experts; or CPU
    gpu_experts: tuple[int, ...]  # experts whose home is that GPU
    ram_experts: tuple[int, ...]  # experts whose home is RAM
    nvme_experts: tuple[int, ...]  # experts whose home is the pack on NVMe
    ram_slots: tuple[int, ...]  # slots in RAM that cache experts of the layer whose home is NVMe
    head_device: int
    # Caches above those homes, on the GPUs of ``Machine.expert_gpus``; empty where there are none.
    slot_device: tuple[int, ...] = ()  # index of the GPU with slots for the layer's experts; or CPU
    gpu_slots: tuple[int, ...] = ()  # how many


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second, or seconds; ``low`` … ``high`` is the range that is promised."""

    value: float
    low: float
    high: float
    basis: Basis
    bound_by: str  # "cpu memory", "gpu memory", "cpu arithmetic", "link", "nvme", …
    note: str = ""  # the formula with its numbers


@dataclass(frozen=True, slots=True)
class Forecast:
    decode_tokens_per_s: Mapping[int, Rate]  # context → of one sequence
    prefill_tokens_per_s: Rate
    time_to_first_token_s: Mapping[int, Rate]  # prompt tokens → seconds
    hit_rate: float | None  # of routed experts in the fastest tier; None where all are there
    drafts_tokens_per_s: Mapping[int, Rate]  # MTP drafts per step → decode at context 0; empty without an MTP layer
    hit_rate_basis: Basis = "modelled"  # measured: from a route trace that was recorded here


@dataclass(frozen=True, slots=True)
class Shortfall:
    device: str
    nbytes: int
    text: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The smallest first."""

    text: str  # a sentence
    option: str | None = None  # what to type: "--context 16384"


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    quant: str
    fits: bool
    total_params: int
    active_params: int
    weights_bytes: int
    download_bytes: int
    disk_bytes: int  # download and, where NVMe is a home, the pack
    kv_bytes_per_token: int
    max_context: int  # the largest context that would fit, experts in the same tiers as planned; 0: none
    machine: Machine
    wants: Wants
    resolved: Resolved
    placement: Placement | None  # None: does not fit
    devices: tuple[Device, ...]  # also when it does not fit: what it would take
    forecast: Forecast | None
    shortfall: Shortfall | None
    advice: tuple[Advice, ...]
