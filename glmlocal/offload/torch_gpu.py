"""A GPU through torch: uploads on a stream of their own through pinned memory, products on another.

Everything is written for any torch device, and tests run it on "cpu", where nothing runs late. On CUDA it has not been
run: there was no such machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.errors import PlanError
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.torch_records import RecordExperts
from glmlocal.offload.device import Event, SlotMemory
from glmlocal.units import format_bytes

_STAGING_BUFFERS = 2  # pinned: one is filled while the other is on its way


class TorchGpu:
    """Belongs to the engine's thread; uploads are begun on one of its own, because filling pinned memory takes time."""

    def __init__(self, device: torch.device) -> None:
        self.name, self._device = str(device), device
        self._products = _Stream(device)

    def allocate(self, num_slots: int, slot_bytes: int) -> SlotMemory:
        try:
            return _Memory(self._device, num_slots, slot_bytes)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and what a driver says is
            raise PlanError(
                f"{self.name} does not give the {format_bytes(num_slots * slot_bytes)} that {num_slots} expert slots "
                f"take ({str(error).partition(chr(10))[0]}); give less with --vram"
            ) from error

    def bind(self, layout: ExpertLayout, num_experts: int, activations: Activations) -> _Experts:
        return _Experts(_experts(self._device, layout, activations), self._products)


class RowsOfExperts(Protocol):
    """``torch_records.RecordExperts``, or ``triton_experts.TritonExperts``."""

    def rows(
        self, x: Tensor, topk_ids: Tensor, slots: Tensor, placed: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]: ...


def _experts(device: torch.device, layout: ExpertLayout, activations: Activations) -> RowsOfExperts:
    """Kernels where there are some for the layout, and Triton, which builds of torch for GPUs bring along."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from glmlocal.kernels import triton_experts

        if triton_experts.takes(layout):
            return triton_experts.TritonExperts(layout, activations)
    return RecordExperts(layout, activations)


class _Stream:
    """Of CUDA; elsewhere everything is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def mark(self) -> torch.cuda.Event | None:
        """What has been put on the stream so far."""
        return None if self._stream is None else self._stream.record_event()


def _has_passed(event: torch.cuda.Event | None) -> bool:
    """What went wrong on the device is for those to hear who wait."""
    try:
        return event is None or event.query()
    except RuntimeError:
        return True


@dataclass(frozen=True, slots=True, eq=False)
class _Upload:
    begun: Future[torch.cuda.Event | None]

    def is_done(self) -> bool:
        """Also where it has failed."""
        return self.begun.done() and (self.begun.exception() is not None or _has_passed(self.begun.result()))

    def wait(self) -> None:
        if (event := self.begun.result()) is not None:
            event.synchronize()


class _Memory:
    def __init__(self, device: torch.device, num_slots: int, slot_bytes: int) -> None:
        self._stream, self._thread = _Stream(device), ThreadPoolExecutor(1, thread_name_prefix=f"{device}-uploads")
        with self._stream.use():  # pinning, too, is done by a device: by this one, and no context is made on another
            self.slots = torch.empty((num_slots, slot_bytes), dtype=torch.uint8, device=device)
            is_cuda = device.type == "cuda"
            self._staging = torch.empty((_STAGING_BUFFERS, slot_bytes), dtype=torch.uint8, pin_memory=is_cuda)
        self._sent: list[torch.cuda.Event | None] = [None] * _STAGING_BUFFERS
        self._turn = 0

    def upload(self, slot: int, source: NDArray[np.uint8], after: Event | None = None) -> _Upload:
        return _Upload(self._thread.submit(self._copy, slot, source, after))

    def _copy(self, slot: int, source: NDArray[np.uint8], after: Event | None) -> torch.cuda.Event | None:
        turn = self._turn = (self._turn + 1) % _STAGING_BUFFERS
        if (sent := self._sent[turn]) is not None:
            sent.synchronize()
        staging = self._staging[turn, : source.nbytes]
        staging.copy_(torch.from_numpy(source))
        with self._stream.use():
            if isinstance(after, _Product):
                self._stream.wait_for(after.event)
            self.slots[slot, : source.nbytes].copy_(staging, non_blocking=True)
            event = self._sent[turn] = self._stream.mark()
        return event


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """Results on their way to pinned memory, and the rows they belong to."""

    event: torch.cuda.Event | None
    pairs: Tensor  # int64
    results: Tensor  # fp32 [pairs, hidden]
    out: Tensor

    def is_done(self) -> bool:
        return _has_passed(self.event)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()
        self.out[self.pairs] = F.pad(self.results, (0, self.out.shape[1] - self.results.shape[1]))


@dataclass(frozen=True, slots=True, eq=False)
class _Experts:
    experts: RowsOfExperts
    stream: _Stream

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
        with self.stream.use():
            for event in after:
                assert isinstance(event, _Upload)
                self.stream.wait_for(event.begun.result())
            device = self.stream.device
            pairs, results = self.experts.rows(x.to(device), topk_ids, memory.slots, placed)
            here = torch.empty(results.shape, pin_memory=device.type == "cuda")
            here.copy_(results, non_blocking=True)
            return _Product(self.stream.mark(), pairs, here, out)
