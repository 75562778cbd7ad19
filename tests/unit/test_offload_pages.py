"""Expert slots: spread over NUMA nodes, pinned where that is wanted and allowed, in huge pages or without."""

from __future__ import annotations

import errno
import logging
import mmap
import resource
import sys
from pathlib import Path

import pytest

from glmlocal.offload import host, pages
from glmlocal.offload.host import HostPool
from glmlocal.units import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def system(root: Path, has_memory: str, allowed: str) -> Path:
    (root / "sys/devices/system/node").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "sys/devices/system/node/has_memory").write_text(has_memory)
    (root / "proc/self/status").write_text(f"Name:\tpython\nMems_allowed_list:\t{allowed}\n")
    return root


@pytest.mark.parametrize(
    ("has_memory", "allowed", "found"),
    [
        ("0\n", "0", (0,)),
        ("0-1\n", "0-1", (0, 1)),
        ("0,2-3,7\n", "0-3", (0, 2, 3)),
        ("0-7\n", "5", (5,)),
        ("\n", "0", ()),
        ("x\n", "0", ()),
    ],
)
def test_nodes_with_memory_that_the_process_may_use(
    tmp_path: Path, has_memory: str, allowed: str, found: tuple[int, ...]
) -> None:
    assert pages.nodes(system(tmp_path, has_memory, allowed)) == found


def test_a_system_that_does_not_say_has_no_nodes(tmp_path: Path) -> None:
    assert pages.nodes(tmp_path) == ()


def policy_at(address: int) -> str:
    """The kernel's word for the mapping that an address is in."""
    best, policy = 0, ""
    for line in Path("/proc/self/numa_maps").read_text("ascii").splitlines():
        start, word = line.split()[:2]
        if best <= int(start, 16) <= address:
            best, policy = int(start, 16), word
    return policy


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_pages_are_taken_from_the_nodes_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes a set of one node, too: the call is right wherever this runs."""
    (node, *_) = pages.nodes()
    pool = HostPool(4, MIB)
    assert pages.interleave(pool.address(0), pool.nbytes, (node,)) == 0
    assert policy_at(pool.address(0)) == f"interleave:{node}"
    assert pages.interleave(pool.address(0), pool.nbytes, ()) == errno.ENOSYS
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(pages, "nodes", lambda: (0, 1))
    monkeypatch.setattr(pages, "interleave", lambda address, num_bytes, among: asked.append(among) or errno.EINVAL)
    HostPool(4, MIB).view(3)[:] = 1
    assert asked == [(0, 1)], "on two nodes, and that it fails is no matter"


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmLck")).split()[1]) * 1024


def may_lock(num_bytes: int) -> bool:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return limit == resource.RLIM_INFINITY or limit >= num_bytes


@pytest.mark.skipif(not may_lock(MIB), reason="the system allows no locked memory")
def test_pinned_slots_are_locked_and_can_be_given_back() -> None:
    before = locked_bytes()
    pool = HostPool(4, MIB // 4, pinned=True)
    pool.view(1)[:] = 7
    assert locked_bytes() == before + pool.nbytes
    pool.release(1)
    assert locked_bytes() == before + pool.nbytes - pool.slot_bytes
    assert not pool.view(1).any(), "a locked page would have stayed"
    pool.view(1)[:] = 9
    assert (pool.view(1) == 9).all()


def test_what_may_not_be_pinned_is_said_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pages, "pin", lambda address, num_bytes: errno.ENOMEM)
    with caplog.at_level(logging.WARNING):
        pool = HostPool(2, MIB, pinned=True)
    assert "ulimit -l" in caplog.text
    pool.view(0)[:] = 1
    pool.release(0)
    assert not pool.view(0).any()


def test_a_kernel_without_huge_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Map(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "no huge pages")
            super().madvise(option, *rest)

    monkeypatch.setattr(host.mmap, "mmap", Map)
    pool = HostPool(3, MIB)
    pool.view(2)[:] = 5
    assert (pool.view(2) == 5).all()
    pool.release(2)
    assert not pool.view(2).any()
