"""How much memory there is, and how much of it this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

from glmlocal.machine.cgroups import memory_limit
from glmlocal.machine.files import key_values
from glmlocal.units import KIB


def system_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Of the whole system, its total and what is available of it; (0, 0) where nobody can say.

    Sandboxes hide /proc/meminfo or replace it; then the C library is asked, whose "available" leaves out what caches
    could give back.
    """
    info = key_values(root / "proc/meminfo")
    if {"MemTotal", "MemAvailable"} <= info.keys():
        return info["MemTotal"] * KIB, info["MemAvailable"] * KIB
    try:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * page_bytes, os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    except (OSError, ValueError):
        return 0, 0


def available_bytes(root: Path = Path("/")) -> int:
    """The smaller of what the system has free and what the control groups (v1 and v2) still allow, in bytes."""
    _, available = system_bytes()
    limit = memory_limit(root)
    return available if limit is None else min(available, limit.available_bytes)
