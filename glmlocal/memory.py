"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

from glmlocal.machine.cgroups import memory_limit


def available_bytes(root: Path = Path("/")) -> int:
    """The smaller of what the system has free and what the control groups (v1 and v2) still allow, in bytes."""
    available = int(psutil.virtual_memory().available)
    limit = memory_limit(root)
    return available if limit is None else min(available, limit.available_bytes)
