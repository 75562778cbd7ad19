"""Where the system keeps pages: on which NUMA nodes, and never on a swap device. Calls that may fail return an errno.

The C library has no function for mbind(2); numbers of system calls are those of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import platform
from pathlib import Path

_MBIND = {"x86_64": 237, "aarch64": 235}
_INTERLEAVE = 3  # MPOL_INTERLEAVE
_ONFAULT = 1  # MLOCK_ONFAULT: pages that are not there yet are locked when they come
_MOST_NODES = 1024


def nodes(root: Path = Path("/")) -> tuple[int, ...]:
    """NUMA nodes with memory that this process may use; empty where the system does not say."""
    try:
        there = _ranges((root / "sys/devices/system/node/has_memory").read_text("ascii"))
        status = (root / "proc/self/status").read_text("utf-8")
        allowed = next(line for line in status.splitlines() if line.startswith("Mems_allowed_list:"))
        return tuple(sorted(there & _ranges(allowed.partition(":")[2])))
    except (OSError, StopIteration, ValueError):
        return ()


def interleave(address: int, num_bytes: int, among: tuple[int, ...]) -> int:
    """Take the pages that are not there yet from these nodes in turns. 0, or an errno."""
    number = _MBIND.get(platform.machine())
    if number is None or not among or max(among) >= _MOST_NODES:
        return errno.ENOSYS
    mask = sum(1 << node for node in among).to_bytes(_MOST_NODES // 8, "little")
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (number, address, num_bytes, _INTERLEAVE)
    failed = libc.syscall(*map(ctypes.c_long, arguments), mask, ctypes.c_long(_MOST_NODES + 1), ctypes.c_long(0))
    return ctypes.get_errno() if failed else 0


def pin(address: int, num_bytes: int) -> int:
    """Keep the pages in memory from when they are first used. 0, or an errno: ENOMEM beyond RLIMIT_MEMLOCK."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mlock2"):
        return errno.ENOSYS
    failed = libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(_ONFAULT))
    return ctypes.get_errno() if failed else 0


def unpin(address: int, num_bytes: int) -> None:
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))


def _ranges(text: str) -> set[int]:
    """``0-2,5`` → 0, 1, 2, 5."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
