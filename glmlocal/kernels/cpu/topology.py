"""Which CPUs this process may use, and how many threads that is worth. Reads /proc and /sys; no state."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from glmlocal.machine.cgroups import cpu_limit
from glmlocal.machine.files import read_text


def worker_cpus(allowed: Iterable[int] | None = None, root: Path = Path("/")) -> tuple[int, ...]:
    """Allowed logical CPUs, one per physical core: a sibling thread shares the execution units that kernels fill."""
    if allowed is None:
        allowed = os.sched_getaffinity(0)
    chosen: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        chosen.setdefault(read_text(siblings) or str(cpu), cpu)
    return tuple(chosen.values())


def default_num_threads(root: Path = Path("/")) -> int:
    """One thread per allowed physical core, no more than the CPU limit lets run all the time, at least one."""
    return max(1, min(len(worker_cpus(root=root)), math.floor(min(cpu_limit(root), 1 << 16))))
