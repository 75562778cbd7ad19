"""Limits of control groups, from made-up /proc and /sys trees."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest

from glmlocal import memory
from glmlocal.machine import cgroups
from glmlocal.machine.files import cpu_list, key_values
from machines import tree

GIB = 1 << 30
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "no colon\n:\n0::"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 0"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000"}, math.inf),
        # The tightest of the groups on the way up counts.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "250000 100000",
            },
            2.5,
        ),
        # In a container the path is the host's; the group itself is mounted at the root.
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        # Started outside of its cgroup namespace: nothing above the mount may be read.
        (
            {"proc/self/cgroup": "0::/../../x", "sys/fs/cgroup/cpu.max": "300000 100000", "sys/x/cpu.max": "1 100000"},
            3.0,
        ),
        # Both versions at once, version 2 beside the others, without its controllers.
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n0::/",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "125000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "50000",
            },
            2.5,
        ),
        ({"proc/self/cgroup": "3:cpuset:/\n0::/", "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1"}, math.inf),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            math.inf,
        ),
        # Mounted elsewhere, at a point with a blank.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "proc/self/mountinfo": r"31 23 0:28 / /my\040groups rw - cgroup2 none rw",
                "my groups/a/cpu.max": "120000 100000",
                "sys/fs/cgroup/a/cpu.max": "10000 100000",
            },
            1.2,
        ),
        # Docker's version 1: the mount shows the container's own group, the path has the host's prefix.
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/docker/1f/inner",
                "proc/self/mountinfo": "40 31 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro - cgroup x cpu,cpuacct\n"
                "41 31 0:30 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "350000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_quota_us": "175000",
                "sys/fs/cgroup/cpu,cpuacct/inner/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/cpu.cfs_quota_us": "1",
                "sys/fs/cgroup/memory/cpu.cfs_period_us": "100000",
            },
            1.75,
        ),
        # /docker/1f0 is not inside of /docker/1f.
        (
            {
                "proc/self/cgroup": "2:cpu:/docker/1f0",
                "proc/self/mountinfo": "40 31 0:29 /docker/1f /c ro - cgroup cgroup rw,cpu",
                "c/cpu.cfs_quota_us": "350000",
                "c/cpu.cfs_period_us": "100000",
                "c/0/cpu.cfs_quota_us": "1",
                "c/0/cpu.cfs_period_us": "100000",
            },
            3.5,
        ),
    ],
)
def test_cpu_limits_of_both_versions(tmp_path: Path, files: dict[str, str], limit: float) -> None:
    assert cgroups.cpu_limit(tree(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, None),
        # What is only cached can be taken back.
        (
            {
                "proc/self/cgroup": "0::/a",
                "proc/self/mountinfo": V2_MOUNT,
                "sys/fs/cgroup/a/memory.max": str(8 * GIB),
                "sys/fs/cgroup/a/memory.current": str(7 * GIB),
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {3 * GIB}\nactive_file {GIB}\nshmem 7",
            },
            (8 * GIB, 3 * GIB),
        ),
        ({
            "proc/self/cgroup": "0::/a",
            "sys/fs/cgroup/a/memory.max": str(8 * GIB),
            "sys/fs/cgroup/a/memory.high": str(6 * GIB),
            "sys/fs/cgroup/a/memory.current": str(GIB),
        }, (6 * GIB, GIB)),
        # The parent has the higher limit and less left.
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/memory.max": str(8 * GIB),
                "sys/fs/cgroup/a/b/memory.current": str(GIB),
                "sys/fs/cgroup/a/memory.max": str(16 * GIB),
                "sys/fs/cgroup/a/memory.current": str(15 * GIB),
            },
            (16 * GIB, 15 * GIB),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x/y\n0::/",
                "sys/fs/cgroup/memory/x/y/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/x/y/memory.usage_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(4 * GIB),
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(2 * GIB),
                "sys/fs/cgroup/memory/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
            },
            (4 * GIB, GIB),
        ),
        # The limit of a group outside of the container shows in the statistics alone.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1f",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {3 * GIB}",
            },
            (3 * GIB, GIB),
        ),
    ],
)  # fmt: skip
def test_memory_limits_of_both_versions(tmp_path: Path, files: dict[str, str], limit: tuple[int, int] | None) -> None:
    found = cgroups.memory_limit(tree(tmp_path, files))
    assert (None if found is None else (found.limit_bytes, found.used_bytes)) == limit


def test_available_memory_is_the_smaller_of_system_and_group(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "3000", "sys/fs/cgroup/memory.current": "1000"}
    assert memory.available_bytes(tree(tmp_path, files)) == 2000
    tree(tmp_path, {"sys/fs/cgroup/memory.current": "4000"})
    assert memory.available_bytes(tmp_path) == 0
    tree(tmp_path, {"sys/fs/cgroup/memory.max": str(4 * total)})
    assert 0 < memory.available_bytes(tmp_path) <= total


def test_lists_and_numbers_of_the_kernel() -> None:
    assert cpu_list("0-2,5,x,7-") == {0, 1, 2, 5, 7}
    assert cpu_list("") == frozenset()
    assert cpu_list("0-99999999999") == frozenset()


def test_lines_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       24 kB\nodd\nnegative -1\nfile 7\n")
    assert key_values(tmp_path / "meminfo") == {"MemTotal": 24, "file": 7}
    assert key_values(tmp_path / "none") == {}
