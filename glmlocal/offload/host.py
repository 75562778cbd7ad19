"""HostPool: slots for experts in the host's memory, in huge pages, and how much of it there may be."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmlocal import memory
from glmlocal.errors import PlanError
from glmlocal.offload import pages
from glmlocal.units import MIB, format_bytes

log = logging.getLogger(__name__)

HUGE_PAGE = 2 * MIB
PRESSURE_BYTES = 192 * MIB  # less than this left, and slots are given back
RELIEF_BYTES = 2 * PRESSURE_BYTES  # so much is to be left then; from twice that on, slots are taken again


class HostPool:
    """``num_slots`` slots of ``slot_bytes``, a multiple of the page size, one after another.

    Memory is only reserved here: a slot takes it when it is first filled, from all NUMA nodes in turns, because all
    threads read all slots. ``pinned``: it is never swapped out, where the system allows that. Raises PlanError.
    """

    def __init__(self, num_slots: int, slot_bytes: int, *, pinned: bool = False) -> None:
        if slot_bytes % mmap.PAGESIZE:
            raise ValueError(f"slots of {slot_bytes} bytes, wanted a multiple of {mmap.PAGESIZE}")
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, num_slots * slot_bytes + HUGE_PAGE, flags=flags)
        except OSError as error:
            raise PlanError(
                f"cannot reserve {format_bytes(num_slots * slot_bytes)} for {num_slots} expert slots: "
                f"{error.strerror}; "
                "give less with --ram"
            ) from error
        whole = np.frombuffer(self._map, np.uint8)
        self._skipped = -whole.ctypes.data % HUGE_PAGE
        self._bytes = whole[self._skipped : self._skipped + num_slots * slot_bytes]
        self._address = int(self._bytes.ctypes.data)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        if len(nodes := pages.nodes()) > 1 and (code := pages.interleave(self._address, self.nbytes, nodes)):
            log.info("expert slots are not spread over the NUMA nodes: %s", os.strerror(code))
        self._is_pinned = pinned and self._pin()

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def address(self, slot: int) -> int:
        """Of the slot's first byte; valid as long as the pool lives."""
        return self._address + slot * self.slot_bytes

    def view(self, slot: int) -> NDArray[np.uint8]:
        """The slot's bytes [slot_bytes], writable."""
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system; it reads as zeros until it is filled again."""
        if self._is_pinned:  # until it is filled again, and is not pinned then
            pages.unpin(self.address(slot), self.slot_bytes)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, self._skipped + slot * self.slot_bytes, self.slot_bytes)

    def _pin(self) -> bool:
        if code := pages.pin(self._address, self.nbytes):
            log.warning(
                "expert slots are not pinned (%s); raise the limit of locked memory (`ulimit -l`) to %s",
                os.strerror(code),
                format_bytes(self.nbytes),
            )
        return not code


def slots_to_release(available_bytes: int, slot_bytes: int) -> int:
    """How many slots have to go when so much memory is left: none, or as many as bring RELIEF_BYTES."""
    if available_bytes >= PRESSURE_BYTES:
        return 0
    return -(-(RELIEF_BYTES - available_bytes) // slot_bytes)


def slots_to_regain(available_bytes: int, slot_bytes: int) -> int:
    """How many slots may be taken back: half of what is left beyond twice RELIEF_BYTES."""
    return max(0, (available_bytes - 2 * RELIEF_BYTES) // 2 // slot_bytes)


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take, by the system's and the control groups' account."""
    return memory.available_bytes(root)
