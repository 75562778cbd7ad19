"""Memory control groups, versions 1 and 2: processes in one have no more memory than its limit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmlocal.errors import ConfigError


@contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[Path]:
    """A group, empty at first and at the end. Raises ConfigError where groups cannot be made."""
    root = Path("/sys/fs/cgroup")
    is_v1 = (root / "memory").is_dir()
    group = (root / "memory" if is_v1 else root) / f"glmlocal-{name}-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if is_v1 else "memory.max")
    try:
        group.mkdir()
    except OSError as error:
        raise ConfigError(
            f"cannot make a memory control group ({error}); run this as root, outside containers"
        ) from None
    try:
        if not limit.exists():
            raise ConfigError(
                f"{root} does not control memory: there is no {limit}; enable it in cgroup.subtree_control"
            )
        limit.write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """The command, to be run in the group."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
