"""Which CPUs this process may use, and how many threads that is worth. Reads /proc and /sys; no state."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path


def worker_cpus(allowed: Iterable[int] | None = None, root: Path = Path("/")) -> tuple[int, ...]:
    """Allowed logical CPUs, one per physical core: a sibling thread shares the execution units that kernels fill."""
    if allowed is None:
        allowed = os.sched_getaffinity(0)
    chosen: dict[str, int] = {}
    for cpu in sorted(allowed):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        chosen.setdefault(_read(siblings) or str(cpu), cpu)
    return tuple(chosen.values())


def cpu_limit(root: Path = Path("/")) -> float:
    """CPUs' worth of time that the control groups above this process grant; inf where there is no limit."""
    limit = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            for group in _groups_up(root / "sys/fs/cgroup", path):
                limit = min(limit, _quota(*(_read(group / "cpu.max").split() or ["max", "1"])))
        elif "cpu" in controllers.split(","):
            for group in _groups_up(root / "sys/fs/cgroup/cpu", path):
                limit = min(limit, _quota(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")))
    return limit


def default_num_threads(root: Path = Path("/")) -> int:
    """One thread per allowed physical core, no more than the CPU limit lets run all the time, at least one."""
    return max(1, min(len(worker_cpus(root=root)), math.floor(min(cpu_limit(root), 1 << 16))))


def _groups_up(mount: Path, path: str) -> list[Path]:
    # A container often sees its own group mounted as the root, with a path that exists only outside: missing files
    # along the way are skipped, the mount itself is always looked at.
    group = mount / path.lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]


def _quota(quota_us: str, period_us: str) -> float:
    if not quota_us.isdigit() or not period_us.isdigit() or int(period_us) == 0:
        return math.inf  # "max", "-1" or no such file
    return int(quota_us) / int(period_us)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
