"""The native CPU kernels: finds the extension, chooses the instruction set, sizes the thread pool.

``GLMLOCAL_CPU_ISA`` forces one of the instruction sets that this build and this CPU both have, or ``reference``: the
plain torch ops, which also run where the extension was not built.
"""

from __future__ import annotations

import os

from glmlocal.errors import ConfigError, KernelUnavailable
from glmlocal.kernels.cpu import topology

_MOST_THREADS = 1024
_BUILD_HINT = "build it with `pip install .` in the source tree; it needs a C++20 compiler"

try:
    from glmlocal.kernels.cpu import _cpu
except ImportError as error:
    _missing: str | None = f"no native extension: {error}; {_BUILD_HINT}"
else:
    _missing = None


def _choose(wanted: str) -> bool:
    """Apply GLMLOCAL_CPU_ISA; whether the native kernels run."""
    if wanted == "reference":
        return False
    if _missing is not None:
        if wanted:
            raise KernelUnavailable(f"GLMLOCAL_CPU_ISA={wanted}, but there is {_missing}")
        return False
    if wanted:
        available = _cpu.available_isas()
        if wanted not in available:
            choices = ", ".join([*available, "reference"])
            raise KernelUnavailable(f"GLMLOCAL_CPU_ISA={wanted} is not available here; available: {choices}")
        _cpu.set_isa(wanted)
    return True


available = _choose(os.environ.get("GLMLOCAL_CPU_ISA", ""))


def set_num_threads(num_threads: int | None) -> None:
    """Threads that share the work of one op, the calling one included; None: one per core that may be used.

    Raises ConfigError for a number that cannot be meant.
    """
    if num_threads is not None and not 1 <= num_threads <= _MOST_THREADS:
        raise ConfigError(f"{num_threads} threads: wanted 1 to {_MOST_THREADS}, or none for one per core")
    _cpu.configure_threads(list(topology.worker_cpus()), num_threads or topology.default_num_threads())


def num_threads() -> int:
    return int(_cpu.num_threads())


def isa() -> str:
    """The instruction set in use, or "reference"."""
    return str(_cpu.isa()) if available else "reference"


def describe() -> str:
    """One line on what runs, for people."""
    if available:
        return f"native {_cpu.isa()}, {num_threads()} thread{'s' if num_threads() > 1 else ''}"
    return f"reference ({_missing or 'GLMLOCAL_CPU_ISA=reference'})"


if available:
    set_num_threads(None)
