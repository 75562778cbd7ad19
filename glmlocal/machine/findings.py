"""What ``glmlocal doctor`` makes of what it found: facts in, findings out. Pure; the facts are those of ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glmlocal.machine.cpu import ISA_FLAGS
from glmlocal.units import format_bytes

Level = Literal["ok", "warn", "fix"]
BUSY_CPUS = 0.3  # of one CPU, while nothing of ours runs
BUSY_DIFFERENCE = 0.15  # between two measurements of the same peak
BUSY_SPREAD = 0.05  # between the two nearest of three measurements of the kernels, on average of all figures
SLOW_DISK_GB_PER_S = 0.5
_X86 = ("avx2", "avx_vnni", "avx512", "amx")  # instruction sets that a build for x86-64 can have
_SPEED = {"generic": 0, **{name: rank for rank, name in enumerate(ISA_FLAGS, 1)}}


@dataclass(frozen=True, slots=True)
class Finding:
    """``fix``: broken or badly set, and can be changed; ``warn``: it costs speed; ``ok``: as it should be."""

    level: Level
    subject: str
    text: str
    advice: str = ""


Facts = Mapping[str, Any]


def findings(facts: Facts) -> list[Finding]:
    """At least one finding per subject, those to fix first."""
    subjects: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
        _kernels, _cores, _busy, _numa, _memory, _huge_pages, _disk, _gpus, _stored,
    )  # fmt: skip
    found = []
    for subject in subjects:
        found += list(subject(facts))
    return sorted(found, key=lambda finding: ("fix", "warn", "ok").index(finding.level))


def _kernels(facts: Facts) -> Iterator[Finding]:
    kernels = facts["kernels"]
    if kernels["problem"]:
        yield Finding("fix", "kernels", kernels["problem"], _kernel_advice(kernels))
    best = kernels["available"][-1] if kernels["available"] else "reference"
    if kernels["forced"] and kernels["cause"] is None and kernels["isa"] != best:
        yield Finding(
            "warn",
            "kernels",
            f"GLMLOCAL_CPU_ISA={kernels['forced']} holds the kernels at {kernels['isa']}, {best} would run",
            "unset GLMLOCAL_CPU_ISA",
        )
    elif not kernels["problem"]:
        yield Finding("ok", "kernels", f"native {kernels['isa']}")
    better = [isa for isa in kernels["missing"] if isa in _X86 and _SPEED[isa] > _SPEED.get(best, len(_SPEED))]
    if better and kernels["native"]:
        yield Finding(
            "warn",
            "kernels",
            f"this CPU has {', '.join(better)}, this build of glmlocal does not",
            "install it again from source with a newer compiler (GCC 12 or Clang 15)",
        )
    unused = [isa for isa in kernels["missing"] if isa not in _X86]
    if unused:
        yield Finding("ok", "kernels", f"this CPU has {', '.join(unused)}, which glmlocal has no kernels for yet")


def _kernel_advice(kernels: Facts) -> str:
    if kernels["cause"] == "isa":
        return "unset GLMLOCAL_CPU_ISA, or set it to one of those"
    if kernels["cause"] == "torch":
        return "install torch again: pip install --force-reinstall 'torch>=2.9,<2.14'"
    if kernels["has_compiler"]:
        return "there is a compiler: install glmlocal again, with `pip install .` in its source tree"
    return "install a C++20 compiler (for example `apt install g++`), then glmlocal again"


def _cores(facts: Facts) -> Iterator[Finding]:
    cpu = facts["cpu"]
    limit, cores = cpu["limit"], cpu["allowed_cores"]
    if limit is not None and limit < cores:
        yield Finding(
            "fix",
            "cores",
            f"the control group grants {limit:g} CPUs' worth of time on {cores} cores: {cpu['threads']} threads run",
            "raise the quota (docker --cpus, Kubernetes limits.cpu, systemd CPUQuota)",
        )
    if cores < cpu["cores"]:
        yield Finding(
            "warn",
            "cores",
            f"only {cores} of {cpu['cores']} cores may be used",
            "look at taskset, docker --cpuset-cpus or the service's CPUAffinity, unless it is meant",
        )
    if (limit is None or limit >= cores) and cores >= cpu["cores"]:
        yield Finding("ok", "cores", f"all {cores} cores, {cpu['threads']} threads")


def is_busy(facts: Facts) -> bool:
    """Did something else run while the machine was measured?"""
    is_unsteady = _difference(facts) > BUSY_DIFFERENCE or _spread(facts) > BUSY_SPREAD
    return facts["cpu"]["busy_cpus"] > BUSY_CPUS or is_unsteady


def _difference(facts: Facts) -> float:
    peaks = facts["peaks"]
    return 0.0 if peaks is None or peaks["difference"] is None else float(peaks["difference"])


def _spread(facts: Facts) -> float:
    return 0.0 if facts["kernel_rates"] is None else float(facts["kernel_rates"]["spread"])


def _busy(facts: Facts) -> Iterator[Finding]:
    busy = facts["cpu"]["busy_cpus"]
    if busy > BUSY_CPUS:
        text = f"something else uses {busy:.1f} CPUs (or the host gives them away): what was measured is too low"
        yield Finding("warn", "load", text, "stop it and run doctor again")
    elif _spread(facts) > BUSY_SPREAD:
        text = f"no two of three measurements of the kernels agree: {_spread(facts):.0%} apart, where 1% is usual"
        yield Finding("warn", "load", text, "run doctor again when the machine, or the host under it, is quiet")
    elif is_busy(facts):
        text = f"the peaks changed by {_difference(facts):.0%} during the measurement: something else runs at times"
        yield Finding("warn", "load", text, "run doctor again when the machine is quiet")
    else:
        yield Finding("ok", "load", "nothing else is using the CPUs")


def _numa(facts: Facts) -> Iterator[Finding]:
    nodes = facts["cpu"]["numa_nodes"]
    if len(nodes) > 1:
        size = max(node["memory_bytes"] for node in nodes)
        yield Finding(
            "warn",
            "NUMA",
            f"{len(nodes)} memory nodes of up to {format_bytes(size)}: cores read another node's memory more slowly",
            "`numactl --cpunodebind=0 --membind=0` for a model that fits in one, else `numactl --interleave=all`",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts["memory"]
    total, available, limit = memory["total_bytes"], memory["available_bytes"], memory["limit_bytes"]
    if limit is not None and limit < total:
        text = f"the control group allows {format_bytes(limit)} of {format_bytes(total)}"
        yield Finding("warn", "memory", text, "raise it (docker --memory, systemd MemoryMax), unless it is meant")
    ceiling = total if limit is None else min(total, limit)
    if available < ceiling / 2:
        text = f"only {format_bytes(available)} of {format_bytes(ceiling)} are free"
        yield Finding("warn", "memory", text, "close other programs before loading a large model")
    elif limit is None or limit >= total:
        yield Finding("ok", "memory", f"{format_bytes(available)} of {format_bytes(total)} are free")
    if memory["swap_used_bytes"] > total / 20:
        text = f"{format_bytes(memory['swap_used_bytes'])} are swapped out: weights there are read at the disk's speed"
        yield Finding("warn", "memory", text, "close other programs, then `swapoff -a && swapon -a`")


def _huge_pages(facts: Facts) -> Iterator[Finding]:
    setting = facts["memory"]["transparent_huge_pages"]
    if setting == "never":
        yield Finding(
            "fix",
            "huge pages",
            "transparent huge pages are off: reading weights misses the TLB all the time",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    elif setting:
        yield Finding("ok", "huge pages", f"transparent huge pages: {setting}")
    else:
        yield Finding("warn", "huge pages", "this kernel does not say whether it has transparent huge pages")


def _disk(facts: Facts) -> Iterator[Finding]:
    disk = facts["disk"]
    if disk["problem"]:
        yield Finding("warn", "disk", disk["problem"], "give another directory with --disk")
        return
    best = max(disk["gb_per_s"].values())
    where = f"{disk['path']} ({disk['filesystem'] or 'unknown filesystem'})"
    if disk["filesystem"] in ("tmpfs", "ramfs"):
        yield Finding("warn", "disk", f"{where} is memory, not a disk", "give the models' directory with --disk")
        return
    if not disk["direct"]:
        text = f"{where} refuses O_DIRECT: what was measured went through the page cache"
        yield Finding("warn", "disk", text, "keep models on a local ext4 or xfs")
    if best < SLOW_DISK_GB_PER_S:
        text = f"{where} reads {best:.2f} GB/s at random: experts that do not fit in memory would come slowly"
        yield Finding("warn", "disk", text, "keep models on an NVMe drive")
    elif disk["direct"]:
        yield Finding("ok", "disk", f"{where} reads {best:.2f} GB/s at random")


def _gpus(facts: Facts) -> Iterator[Finding]:
    gpus, on_bus, versions = facts["gpus"], facts["gpus_on_bus"], facts["versions"]
    for vendor, backend in (("NVIDIA", "cuda"), ("AMD", "rocm")):
        seen = [gpu["name"] for gpu in gpus if gpu["vendor"] == vendor]
        if on_bus.get(vendor, 0) > len(seen):
            text = f"{on_bus[vendor]} {vendor} GPUs are plugged in, the driver shows {len(seen)}"
            yield Finding("fix", "GPU", text, f"install or load {vendor}'s driver; in a container pass the devices in")
        if seen and not versions[f"torch_{backend}"]:
            text = f"{', '.join(seen)}: torch {versions['torch'] or '(missing)'} was built without {backend.upper()}"
            advice = f"install torch's {backend.upper()} build; https://pytorch.org/get-started has the command"
            yield Finding("fix", "GPU", text, advice)
        elif seen:
            yield Finding("ok", "GPU", ", ".join(seen))
    if not gpus and not on_bus:
        yield Finding("ok", "GPU", "none: everything runs on the CPU")


def _stored(facts: Facts) -> Iterator[Finding]:
    problem = facts["stored"]["problem"]
    if problem:
        advice = "set GLMLOCAL_HOME to a directory that can be written to"
        yield Finding("warn", "measurements", f"could not be kept: {problem}", advice)
