"""GpuPool: slots on one device that cache experts above the host's tier, and two more to stream through.

It is an ``ExpertStore`` whose slots are filled from the host's slots. A step uses what is there when it begins and
waits for no upload; experts that are used again and again rise in the background. A device that fails costs the request
that it fails, and is not used any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.errors import EngineError, GlmlocalError
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations
from glmlocal.offload.device import Device, DeviceExperts, Event, SlotMemory
from glmlocal.offload.dispatch import Costs
from glmlocal.offload.eviction import lfru
from glmlocal.offload.stats import GpuStats
from glmlocal.offload.store import Arrival, ExpertStore
from glmlocal.offload.tiers import ExpertKey, Residency
from glmlocal.planner.demand import EXPERT_STAGING

log = logging.getLogger(__name__)

MOST_UPLOADS = 2  # under way at once; a layer begins none while there are any
RISES_AT = 1.5  # heat (``eviction.History``) from which an upload is worth it: used more than once of late

View = Callable[[int], NDArray[np.uint8]]  # a slot of the host's, as bytes


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What of a device is a tier's: slots for experts of these layers, ``EXPERT_STAGING`` not counted."""

    device: Device
    layers: tuple[int, ...]
    num_slots: int
    costs: Costs


class GpuPool:
    """``host`` is the store below, ``view`` its slots of ``slot_bytes``. Belongs to the engine's thread.

    Raises PlanError where the device has not the memory.
    """

    def __init__(
        self,
        share: GpuShare,
        layouts: Mapping[int, ExpertLayout],
        num_experts: int,
        slot_bytes: int,
        host: ExpertStore,
        view: View,
        *,
        top_k: int,
        activations: Activations,
    ) -> None:
        num_slots = min(share.num_slots, len(share.layers) * num_experts)
        self.costs, self.slot_bytes = share.costs, slot_bytes
        self._host, self._name = host, share.device.name
        self._has_failed = False
        self._memory = share.device.allocate(num_slots + EXPERT_STAGING, slot_bytes)
        self._uploads = UploadSource(self._memory, host, view)
        policy = lfru(num_slots, len(share.layers) * top_k)
        self.store = ExpertStore(share.layers, num_experts, num_slots, self._uploads, policy, most_reads=MOST_UPLOADS)
        bound = {layout: share.device.bind(layout, num_experts, activations) for layout in set(layouts.values())}
        self._experts: dict[int, DeviceExperts] = {layer: bound[layouts[layer]] for layer in share.layers}
        self._staging = range(num_slots, num_slots + EXPERT_STAGING)
        self._num_streamed = 0

    @property
    def is_lost(self) -> bool:
        """The device has failed: nothing is asked of it any more."""
        return self._has_failed or self._uploads.has_failed

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            yield
        except GlmlocalError:
            raise
        except Exception as error:  # of a driver, or out of memory
            self._has_failed = True
            raise EngineError(
                f"{self._name} failed ({_first_line(error)}) and is not used any more; ask again, and start again with "
                "less --vram or without --gpus if that was for want of memory"
            ) from error

    @contextmanager
    def hits(
        self, layer: int, uses: Mapping[int, float], x: Tensor, topk_ids: Tensor, rows: Tensor
    ) -> Iterator[dict[int, float]]:
        """Compute the experts that are here while the caller computes the others, whose uses are yielded.

        Arguments as of ``DeviceExperts.rows``; the rows are there when the context is left. Raises EngineError where
        the device fails.
        """
        if self.is_lost:
            yield dict(uses)
            return
        with self.store.acquire_present(layer, uses, len(topk_ids)) as lease:
            placed = lease.take()
            if not placed:
                yield dict(uses)
                return
            with self._on_device():
                done = self._experts[layer].rows(self._memory, x, topk_ids, placed, rows)
            here = dict(placed)
            try:
                yield {expert: weight for expert, weight in uses.items() if expert not in here}
            finally:
                with self._on_device():
                    done.wait()

    def without_hits(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those that are not here."""
        if self.is_lost:
            return list(experts)
        return [e for e in experts if self.store.lookup(ExpertKey(layer, e)) is not Residency.HIT]

    def stream(
        self, layer: int, sources: Sequence[tuple[int, NDArray[np.uint8]]], x: Tensor, topk_ids: Tensor, rows: Tensor
    ) -> Event:
        """Begin to compute (expert, record) of the host's: one is uploaded while another is computed.

        The caller keeps the records, and otherwise as ``DeviceExperts.rows``; it waits before it streams again. Raises
        EngineError, as does waiting, where the device fails; then nothing is under way.
        """
        done: list[Event] = []
        with self._on_device():
            try:
                for i, (expert, source) in enumerate(sources):
                    slot = self._staging[i % EXPERT_STAGING]
                    in_use = done[i - EXPERT_STAGING] if i >= EXPERT_STAGING else None
                    there = self._memory.upload(slot, source, in_use)
                    done.append(self._experts[layer].rows(self._memory, x, topk_ids, [(expert, slot)], rows, [there]))
            except BaseException:
                with suppress(Exception):
                    _wait_for_all(done)
                raise
        self._num_streamed += len(sources)
        return _All(tuple(done), self._on_device)

    def rise(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to upload the hottest of these experts of the layer, where that is worth it and the link is idle."""
        if self.is_lost:
            return
        heat = {key: self.store.heat(key) for key in (ExpertKey(layer, expert) for expert in experts)}
        hot = [
            key
            for key, value in heat.items()
            if value >= RISES_AT
            and self.store.lookup(key) is Residency.MISS
            and self._host.lookup(key) is Residency.HIT
        ]
        if hot:
            self.store.prefetch(sorted(hot, key=lambda key: (-heat[key], key))[:MOST_UPLOADS])

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Upload these experts, hottest first, that the host has, as far as there are slots; waits for it."""
        here = [key for key in keys if self._host.lookup(key) is Residency.HIT][: self.store.num_slots]
        for begin in range(0, len(here), MOST_UPLOADS):
            self.store.prefetch(here[begin : begin + MOST_UPLOADS])
            self.store.drain()

    def stats(self) -> GpuStats:
        store = self.store.stats()
        return GpuStats(
            store.lookups,
            store.hits,
            self.store.num_slots,
            self.store.num_slots * self.slot_bytes,
            (store.prefetched + self._num_streamed) * self.slot_bytes,
            self._num_streamed,
        )


class UploadSource:
    """The ``Source`` of a GPU's store: the host's slots, pinned while they are copied.

    ``has_failed``: an upload has, and others would.
    """

    def __init__(self, memory: SlotMemory, host: ExpertStore, view: View) -> None:
        self.has_failed = False
        self._memory, self._host, self._view = memory, host, view
        self._under_way: dict[int, tuple[Event, int]] = {}  # slot → its event, and the host's slot

    def start(self, key: ExpertKey, slot: int, *, urgent: bool = True) -> bool:
        source = self._host.pin(key)
        if source is None:
            return False
        self._under_way[slot] = self._memory.upload(slot, self._view(source)), source
        return True

    def hurry(self, slot: int) -> None:
        """All uploads are as fast as can be."""

    def cancel(self, slot: int) -> None:
        """Uploads go on: they are few."""

    def arrival(self, timeout_s: float) -> Arrival | None:
        slot = next((slot for slot, (event, _) in self._under_way.items() if event.is_done()), None)
        if slot is None and timeout_s > 0:
            slot = next(iter(self._under_way), None)  # the oldest; an upload takes no longer than it is worth waiting
        if slot is None:
            return None
        event, source = self._under_way.pop(slot)
        try:
            event.wait()
        except Exception as error:  # of a driver: the expert stays where it was
            log.warning("an upload to the GPU failed, it is not used any more: %s", _first_line(error))
            self.has_failed = True
            return Arrival(slot, EngineError(f"an upload to the GPU failed: {error}"))
        finally:
            self._host.unpin(source)
        return Arrival(slot)


@dataclass(frozen=True, slots=True)
class _All:
    events: tuple[Event, ...]
    on_device: Callable[[], AbstractContextManager[None]]

    def is_done(self) -> bool:
        return all(event.is_done() for event in self.events)

    def wait(self) -> None:
        """For all of them, also where one has failed: the others still write."""
        with self.on_device():
            _wait_for_all(self.events)


def _wait_for_all(events: Iterable[Event]) -> None:
    """Raises what one of those that failed says, after all have ended."""
    with ExitStack() as stack:
        for event in reversed(list(events)):
            stack.callback(event.wait)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
