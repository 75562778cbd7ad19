"""Machine: what a plan may use. Values only; ``hardware.py`` reads them from words, ``probe.py`` from this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmlocal.machine.kernel_rates import KernelRates

Basis = Literal["exact", "measured", "modelled"]  # modelled: from a datasheet, or from a formula


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str  # "H100", "RTX4090", "24GiB@1008"
    memory_bytes: int  # usable: what the driver reports
    read_gb_per_s: float  # its memory's
    link_gb_per_s: float  # from host memory, one direction, as reached in practice
    bf16_tflop_per_s: float  # dense
    int8_top_per_s: float | None  # None: no tensor cores for it
    fp8_tflop_per_s: float | None  # None: FP8 is loaded as bytes and converted
    basis: Basis = "modelled"
    is_unified: bool = False  # its memory is the host's; ``probe`` has divided it, nothing is counted twice


@dataclass(frozen=True, slots=True)
class ExpertGpu:
    """A GPU as this version runs one: it holds and computes routed experts, everything else is the CPU's."""

    gpu: Gpu
    free_bytes: int  # of its memory, for slots: driver, kernels and a margin taken off


@dataclass(frozen=True, slots=True)
class Cpu:
    name: str
    threads: int
    fp32_gflop_per_s: float
    int8_gop_per_s: float | None  # None: no integer dot product
    basis: Basis = "modelled"
    kernels: KernelRates | None = None  # what doctor measured of our own, with these threads; None: only the peaks


@dataclass(frozen=True, slots=True)
class Ram:
    total_bytes: int  # what there is: a cgroup's limit where one is lower
    available_bytes: int  # what glmlocal may use of it, the system's reserve taken off
    read_gb_per_s: float
    basis: Basis = "modelled"


@dataclass(frozen=True, slots=True)
class Nvme:
    capacity_bytes: int  # free, for packs
    read_gb_per_s: float
    path: str | None = None
    basis: Basis = "modelled"


@dataclass(frozen=True, slots=True)
class Machine:
    gpus: tuple[Gpu, ...]
    cpu: Cpu
    ram: Ram
    nvme: Nvme | None
    is_this_machine: bool = False  # nothing was described by hand
    expert_gpus: tuple[ExpertGpu, ...] = ()  # only where ``gpus``, which hold whole layers, are none
    notes: tuple[str, ...] = ()  # what was assumed, and how to know better; a sentence each, for the report
