"""Which CPUs and how many threads, from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmlocal.kernels.cpu import topology


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in pairs.items()}


def test_one_cpu_per_physical_core(tmp_path: Path) -> None:
    root = write(tmp_path, siblings({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "2,6"}))
    assert topology.worker_cpus([0, 1, 4, 5], root) == (0, 1)
    assert topology.worker_cpus([5, 4, 6], root) == (4, 5, 6)


def test_unknown_topology_counts_every_cpu(tmp_path: Path) -> None:
    assert topology.worker_cpus([3, 1, 2], tmp_path) == (1, 2, 3)


def test_the_default_is_cores_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert topology.default_num_threads(tmp_path) == 4
    limited = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"})
    assert topology.default_num_threads(limited) == 2
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000"})
    assert topology.default_num_threads(tmp_path) == 1


def test_this_machine_has_at_least_one() -> None:
    assert topology.worker_cpus()
    assert topology.default_num_threads() >= 1
