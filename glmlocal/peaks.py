"""The machine's ceilings, measured: memory reads beyond the caches, fp32 multiply-adds, int8 dot products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glmlocal import memory
from glmlocal.kernels.cpu import topology
from glmlocal.machine.cpu import last_level_cache_bytes
from glmlocal.units import MIB

LEAST_READ_BYTES = 512 * MIB
CACHE_FACTOR = 8  # the buffer is this much larger than the last-level caches: at most an eighth can come from them
BUSY_ABOVE = 0.15  # two measurements that differ by more were disturbed


@dataclass(frozen=True, slots=True)
class Peaks:
    """Rates of all ``threads`` together."""

    threads: int
    read_gb_per_s: float
    fp32_gflop_per_s: float
    int8_gop_per_s: float | None  # None where the kernels have no integer dot product
    read_bytes: int  # size of the buffer that was read

    def best_of(self, other: Peaks) -> Peaks:
        """The larger of each: disturbances only ever slow a measurement down."""
        int8 = [rate for rate in (self.int8_gop_per_s, other.int8_gop_per_s) if rate is not None]
        return Peaks(
            self.threads,
            max(self.read_gb_per_s, other.read_gb_per_s),
            max(self.fp32_gflop_per_s, other.fp32_gflop_per_s),
            max(int8, default=None),
            max(self.read_bytes, other.read_bytes),
        )

    def difference(self, other: Peaks) -> float:
        """The largest relative difference between the two."""
        pairs = [(self.read_gb_per_s, other.read_gb_per_s), (self.fp32_gflop_per_s, other.fp32_gflop_per_s)]
        if self.int8_gop_per_s is not None and other.int8_gop_per_s is not None:
            pairs.append((self.int8_gop_per_s, other.int8_gop_per_s))
        return max(abs(a - b) / max(a, b) if max(a, b) > 0 else 0.0 for a, b in pairs)


def measure(num_threads: int | None = None) -> Peaks:
    """Measure with so many threads (None: one per usable core); takes about half a second per GiB of buffer.

    The extension's own probes where it was built, also when the ops run on plain torch; torch's sum and matrix product
    where it was not.
    """
    threads = num_threads or topology.default_num_threads()
    num_bytes = read_bytes(last_level_cache_bytes(), memory.available_bytes())
    native = _native()
    if native is None:
        return Peaks(threads, _torch_read(num_bytes, threads), _torch_fp32(threads), None, num_bytes)
    before = native.num_threads()
    native.configure_threads(list(topology.worker_cpus()), threads)
    try:
        return Peaks(
            threads,
            native.read_bandwidth(num_bytes),
            _best(native.fma_peak),
            _best(native.int8_peak),
            num_bytes,
        )
    finally:
        native.configure_threads(list(topology.worker_cpus()), before)


def read_bytes(cache_bytes: int, available_bytes: int) -> int:
    """How large a buffer to read: well beyond the caches, within half of the memory that is free."""
    wanted = max(LEAST_READ_BYTES, CACHE_FACTOR * cache_bytes)
    return max(16 * MIB, min(wanted, available_bytes // 2) // MIB * MIB)


def _native() -> Any | None:
    try:
        from glmlocal.kernels.cpu import _cpu
    except ImportError:
        return None
    return _cpu


def _best(probe: Callable[[], float], times: int = 5) -> float:
    """The arithmetic probes take milliseconds: one of them alone may meet a slow clock."""
    return max(probe() for _ in range(times))


def _torch_read(num_bytes: int, threads: int) -> float:
    import torch

    data = torch.ones(num_bytes // 4)
    return num_bytes / _best_s(lambda: data.sum(), threads) / 1e9


def _torch_fp32(threads: int, size: int = 1024) -> float:
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    return float(2 * size**3 / _best_s(lambda: a @ b, threads) / 1e9)


def _best_s(work: Callable[[], object], threads: int, passes: int = 7) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        best = float("inf")
        for _ in range(passes):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        torch.set_num_threads(before)
