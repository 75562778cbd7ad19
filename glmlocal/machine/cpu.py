"""What the processor is: its name, cores, caches, memory nodes and instruction sets. Reads /proc and /sys; no state."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmlocal.machine.files import as_int, cpu_list, read_int, read_text
from glmlocal.units import KIB

_CPUS = "sys/devices/system/cpu"
# An instruction set of the kernels, slowest first, and the flags of /proc/cpuinfo that it needs.
ISA_FLAGS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx_vnni": frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}),
    "amx": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "amx_tile", "amx_int8"}),
    "neon": frozenset({"asimd"}),
}


@dataclass(frozen=True, slots=True)
class NumaNode:
    number: int
    cpus: frozenset[int]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """``allowed`` are the logical CPUs this process may run on; ``cores`` count physical ones."""

    name: str
    architecture: str
    sockets: int
    cores: int
    logical: int
    allowed: tuple[int, ...]
    allowed_cores: int
    last_level_cache_bytes: int
    flags: frozenset[str]
    nodes: tuple[NumaNode, ...]

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Those known to ISA_FLAGS that it has."""
        return tuple(name for name, needed in ISA_FLAGS.items() if needed <= self.flags)


def probe(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> Cpu:
    """Missing files leave a field empty, zero, or counted as if every logical CPU were a core."""
    allowed = tuple(sorted(os.sched_getaffinity(0) if allowed is None else allowed))
    online = sorted(cpu_list(read_text(root / _CPUS / "online"))) or list(allowed)
    info = _cpuinfo(root)
    return Cpu(
        name=info.get("model name") or info.get("cpu model") or info.get("hardware") or "unknown",
        architecture=platform.machine(),
        sockets=len({read_text(root / _CPUS / f"cpu{cpu}/topology/physical_package_id") for cpu in online}),
        cores=_num_cores(root, online),
        logical=len(online),
        allowed=allowed,
        allowed_cores=_num_cores(root, allowed),
        last_level_cache_bytes=last_level_cache_bytes(root, allowed),
        flags=frozenset((info.get("flags") or info.get("features") or "").split()),
        nodes=_nodes(root),
    )


def last_level_cache_bytes(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> int:
    """All last-level caches that the allowed CPUs reach, together; 0 where the kernel does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0) if allowed is None else allowed:
        found = [
            (level, read_text(index / "shared_cpu_list") or str(cpu), _cache_size(read_text(index / "size")))
            for index in (root / _CPUS / f"cpu{cpu}/cache").glob("index[0-9]*")
            if (level := read_int(index / "level")) is not None and read_text(index / "type") != "Instruction"
        ]
        if found:
            level, shared, size = max(found)
            caches[level, shared] = size
    return sum(caches.values())


def times(root: Path = Path("/")) -> dict[int, tuple[int, int]]:
    """Per logical CPU, in clock ticks since the start: (time at work or stolen by other machines, all time)."""
    found = {}
    for line in read_text(root / "proc/stat").splitlines():
        name, *fields = line.split()
        number = as_int(name[3:]) if name.startswith("cpu") else None
        ticks = [as_int(field) or 0 for field in fields[:8]]  # user nice system idle iowait irq softirq steal
        if number is not None and len(ticks) >= 5:
            found[number] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    return found


def busy_cpus(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]], allowed: Iterable[int]) -> float:
    """How many of the allowed CPUs' worth of time went to something between two ``times``."""
    busy = 0.0
    for cpu in allowed:
        if cpu in before and cpu in after:
            work, ticks = (b - a for a, b in zip(before[cpu], after[cpu], strict=True))
            busy += min(1.0, max(0, work) / ticks) if ticks > 0 else 0.0
    return busy


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first processor, names in lower case."""
    info: dict[str, str] = {}
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if not colon and info:
            break  # the next processor
        info.setdefault(name.strip().lower(), value.strip())
    return info


def _num_cores(root: Path, cpus: Iterable[int]) -> int:
    return len({read_text(root / _CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def _cache_size(text: str) -> int:
    factor = {"K": KIB, "M": KIB * KIB, "G": KIB**3}.get(text[-1:], 1)
    return (as_int(text.rstrip("KMG")) or 0) * factor


def _nodes(root: Path) -> tuple[NumaNode, ...]:
    nodes = []
    for directory in (root / "sys/devices/system/node").glob("node[0-9]*"):
        number = as_int(directory.name[4:])
        if number is not None:
            memory_kib = _node_memory_kib(directory / "meminfo")
            nodes.append(NumaNode(number, cpu_list(read_text(directory / "cpulist")), memory_kib * KIB))
    return tuple(sorted(nodes, key=lambda node: node.number))


def _node_memory_kib(path: Path) -> int:
    """``Node 0 MemTotal: 123 kB``."""
    for line in read_text(path).splitlines():
        words = line.split()
        if words[2:3] == ["MemTotal:"]:
            return as_int(words[3]) or 0
    return 0
