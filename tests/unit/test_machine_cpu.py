"""Cores, caches, nodes, flags and load, from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmlocal.machine import cpu
from machines import machine, tree


def test_a_machine_of_two_sockets(tmp_path: Path) -> None:
    found = cpu.probe(machine(tmp_path), range(8))
    assert (found.name, found.sockets, found.cores, found.logical, found.allowed_cores) == ("Fast CPU 9000", 2, 4, 8, 4)
    assert found.last_level_cache_bytes == 64 << 20
    assert found.instruction_sets == ("avx2", "avx_vnni")
    assert [(node.number, sorted(node.cpus), node.memory_bytes) for node in found.nodes] == [
        (0, [0, 1, 4, 5], 1 << 20),
        (1, [2, 3, 6, 7], 2 << 20),
    ]


def test_only_what_is_allowed_counts(tmp_path: Path) -> None:
    found = cpu.probe(machine(tmp_path), [5, 1])  # the two threads of one core
    assert (found.allowed, found.allowed_cores, found.cores) == ((1, 5), 1, 4)
    assert found.last_level_cache_bytes == 32 << 20


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    found = cpu.probe(tmp_path, [3, 4])
    assert (found.name, found.cores, found.logical, found.sockets, found.nodes) == ("unknown", 2, 2, 1, ())
    assert found.last_level_cache_bytes == 0
    assert found.instruction_sets == ()


def test_this_machine() -> None:
    found = cpu.probe()
    assert found.allowed
    assert 1 <= found.allowed_cores <= found.cores <= found.logical


def test_what_others_use(tmp_path: Path) -> None:
    #                     user nice system idle iowait irq softirq steal guest
    tree(tmp_path, {"proc/stat": "cpu  9 9 9 9 9 9 9 9 9\ncpu0 100 0 0 100 0 0 0 0 5\ncpu1 0 0 0 50 0 0 0 0\nintr 5"})
    before = cpu.times(tmp_path)
    assert before == {0: (100, 200), 1: (0, 50)}
    tree(tmp_path, {"proc/stat": "cpu0 110 5 5 160 10 0 0 10\ncpu1 10 0 10 50 0 0 0 20\ncpu2 1 1 1 1 1"})
    after = cpu.times(tmp_path)
    assert cpu.busy_cpus(before, after, (0, 1)) == pytest.approx(30 / 100 + 1)
    assert cpu.busy_cpus(before, after, (0,)) == pytest.approx(0.3)
    assert cpu.busy_cpus(before, before, (0, 1, 2)) == 0
