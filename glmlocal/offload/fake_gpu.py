"""A GPU made of host memory, for machines without one: the same code runs, and what does not wait is caught.

Uploads and products run late, each kind in order on a thread of its own, as on two streams. Until an upload's event its
slot is full of 0xff, which is NaN in every float; until a product's its rows are NaN. Products are those of the native
CPU kernels, so that the bits do not depend on where an expert is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.errors import PlanError
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.cpu.slots import SlotExperts, bind_layout
from glmlocal.offload.device import Event, SlotMemory
from glmlocal.offload.host import HostPool
from glmlocal.units import format_bytes

POISON = 0xFF
DELAY_S = 0.0005  # about what 12 MB take over PCIe 4.0 x16


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    future: Future[None]

    def is_done(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        self.future.result()


class _Stream:
    """Runs what it is given in order, each after a delay, on its own thread."""

    def __init__(self, name: str, delay_s: Callable[[], float]) -> None:
        self._thread, self._delay_s = ThreadPoolExecutor(1, thread_name_prefix=name), delay_s

    def begin(self, work: Callable[[], None], after: Sequence[Event]) -> _Done:
        def run() -> None:
            time.sleep(self._delay_s())
            for event in after:
                event.wait()
            work()

        return _Done(self._thread.submit(run))


class FakeGpu:
    """``memory_bytes`` of the host's; ``delay_s`` is asked anew for each upload and product."""

    def __init__(self, name: str, memory_bytes: int, delay_s: Callable[[], float] = lambda: DELAY_S) -> None:
        self.name, self._free_bytes = name, memory_bytes
        self._uploads, self._products = _Stream(f"{name}-uploads", delay_s), _Stream(f"{name}-products", delay_s)

    def allocate(self, num_slots: int, slot_bytes: int) -> SlotMemory:
        if num_slots * slot_bytes > self._free_bytes:
            raise PlanError(
                f"{self.name} has {format_bytes(self._free_bytes)} left, {num_slots} expert slots of "
                f"{format_bytes(slot_bytes)} were planned; give less with --vram"
            )
        self._free_bytes -= num_slots * slot_bytes
        return _Memory(HostPool(num_slots, slot_bytes), self._uploads)

    def bind(self, layout: ExpertLayout, num_experts: int, activations: Activations) -> _Experts:
        return _Experts(bind_layout(layout, num_experts, activations), self._products)


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    pool: HostPool
    uploads: _Stream

    def upload(self, slot: int, source: NDArray[np.uint8], after: Event | None = None) -> Event:
        place = self.pool.view(slot)
        if after is None:  # else it is still in use
            place.fill(POISON)

        def copy() -> None:
            place.fill(POISON)
            place[: source.nbytes] = source

        return self.uploads.begin(copy, [after] if after is not None else [])


@dataclass(frozen=True, slots=True, eq=False)
class _Experts:
    slots: SlotExperts
    products: _Stream

    def rows(
        self,
        memory: SlotMemory,
        x: Tensor,
        topk_ids: Tensor,
        placed: Sequence[tuple[int, int]],
        out: Tensor,
        after: Sequence[Event] = (),
    ) -> Event:
        assert isinstance(memory, _Memory)
        experts = [expert for expert, _ in placed]
        addresses = [memory.pool.address(slot) for _, slot in placed]
        out[torch.isin(topk_ids.flatten(), torch.tensor(experts, dtype=torch.int32))] = torch.nan
        return self.products.begin(lambda: self.slots.rows(x, topk_ids, experts, addresses, out), after)
