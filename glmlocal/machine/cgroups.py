"""What the control groups above this process grant it: CPU time and memory, versions 1 and 2, nested groups included.

The group's path comes from /proc/self/cgroup, where it is mounted from /proc/self/mountinfo. A container often has only
its own group mounted, under a path that exists outside alone: files that are missing on the way up are skipped, and the
mount itself is always looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glmlocal.machine.files import as_int, key_values, read_int, read_text

_NO_LIMIT = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A group's limit and what its processes hold that the kernel cannot take back by dropping cached file pages."""

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def cpu_limit(root: Path = Path("/")) -> float:
    """CPUs' worth of time, the least that any group grants; inf where there is no limit."""
    limit = math.inf
    for version, group in _groups(root, "cpu"):
        if version == 2:
            quota, period = [*read_text(group / "cpu.max").split(), "", ""][:2]
        else:
            quota, period = read_text(group / "cpu.cfs_quota_us"), read_text(group / "cpu.cfs_period_us")
        limit = min(limit, _quota(quota, period))
    return limit


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The limit of the group that has the least left; None where there is no limit."""
    limits = [
        limit
        for version, group in _groups(root, "memory")
        if (limit := _memory_v2(group) if version == 2 else _memory_v1(group)) is not None
    ]
    return min(limits, key=lambda limit: limit.available_bytes, default=None)


def _quota(quota_us: str, period_us: str) -> float:
    quota, period = as_int(quota_us), as_int(period_us)  # no number: "max", "-1" or no such file
    return quota / period if quota and period else math.inf


def _memory_v2(group: Path) -> MemoryLimit | None:
    # Above memory.high everything is slowed down until it fits again: a limit in all but name.
    limits = [n for name in ("memory.max", "memory.high") if (n := read_int(group / name)) is not None]
    used = read_int(group / "memory.current")
    if not limits or used is None:
        return None
    stat = key_values(group / "memory.stat")
    return MemoryLimit(min(limits), _held(used, stat.get("inactive_file", 0) + stat.get("active_file", 0)))


def _memory_v1(group: Path) -> MemoryLimit | None:
    stat = key_values(group / "memory.stat")
    # The hierarchical limit also tells of groups outside a container, which have no directory here.
    named = (read_int(group / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit"))
    limits = [n for n in named if n is not None and n < _NO_LIMIT]
    used = read_int(group / "memory.usage_in_bytes")
    if not limits or used is None:
        return None
    cached = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return MemoryLimit(min(limits), _held(used, cached))


def _held(used: int, cached: int) -> int:
    return max(0, used - cached)


@dataclass(frozen=True, slots=True)
class _Mount:
    version: int
    controllers: frozenset[str]  # of version 1
    root: str  # the group that the mount point shows
    point: Path


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, directory) of this process's groups for a controller, innermost first."""
    mounts = _mounts(root)
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        named, _, path = rest.partition(":")
        version = 2 if named == "" else 1
        if version == 1 and controller not in named.split(","):
            continue
        for mount in mounts or _usual_mounts(root, named):
            if mount.version == version and (version == 2 or controller in mount.controllers):
                yield from ((version, group) for group in _upwards(mount, path))


def _upwards(mount: _Mount, path: str) -> Iterator[Path]:
    inside = mount.root.rstrip("/")
    below = path[len(inside) :] if path == inside or path.startswith(inside + "/") else ""
    parts = [part for part in below.split("/") if part]
    if ".." in parts:  # a group outside of this cgroup namespace
        parts = []
    for length in range(len(parts), -1, -1):
        yield mount.point.joinpath(*parts[:length])


def _mounts(root: Path) -> list[_Mount]:
    mounts = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3 or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        point = root / _unescape(fields[4]).lstrip("/")
        version = 2 if kinds[0] == "cgroup2" else 1
        mounts.append(_Mount(version, frozenset(kinds[2].split(",")), _unescape(fields[3]), point))
    return mounts


def _usual_mounts(root: Path, controllers: str) -> list[_Mount]:
    """Where distributions mount them, for a /proc without mountinfo."""
    base, named = root / "sys/fs/cgroup", frozenset(controllers.split(","))
    if controllers == "":
        return [_Mount(2, named, "/", base), _Mount(2, named, "/", base / "unified")]
    return [_Mount(1, named, "/", base / name) for name in sorted({controllers, *named})]


def _unescape(text: str) -> str:
    """Blanks and backslashes in mountinfo are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
