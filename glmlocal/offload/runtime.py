"""Offload: everything between a pack and the layers that use it, built from a plan's budget."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from glmlocal.errors import PlanError
from glmlocal.formats.expert_pack import ExpertPack
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.cpu.slots import SlotExperts, bind_layout
from glmlocal.offload import host, trace
from glmlocal.offload.eviction import Policy, lfru
from glmlocal.offload.experts import OffloadedExperts, RowBuffer
from glmlocal.offload.foresight import Foresight
from glmlocal.offload.gpu_pool import GpuPool, GpuShare
from glmlocal.offload.nvme import PackSource, Reader, open_reader
from glmlocal.offload.stats import OffloadStats, bottleneck, since, together
from glmlocal.offload.store import ExpertStore
from glmlocal.units import format_bytes

log = logging.getLogger(__name__)

OpenReader = Callable[[ExpertPack, int], Reader]
PIN = "GLMLOCAL_PIN_SLOTS"  # of the environment; 1: the slots are never swapped out
CHECK_S = 0.5  # how often the memory that is left is looked at
STALL_WARNS_ABOVE = 0.5  # of the time, waiting for the disk
_WARN_AFTER_S = 5.0


class Offload:
    """Slots in RAM over a pack, and on GPUs over those, for layers whose records have one size.

    Belongs to the engine's thread.
    """

    def __init__(
        self,
        pack: ExpertPack,
        layers: Sequence[int],
        budget_bytes: int,
        *,
        top_k: int,
        activations: Activations = "int8",
        gpus: Sequence[GpuShare] = (),
        policy: Policy | None = None,
        open_reader: OpenReader = open_reader,
        available_bytes: Callable[[], int] = host.available_bytes,
    ) -> None:
        """As many slots as fit into ``budget_bytes``; a layer is in one of the ``gpus`` at the most.

        Raises CheckpointError, and PlanError if no slot fits.
        """
        self._pack, self._activations = pack, activations
        self._layouts = {layer: pack.layout(layer) for layer in layers}
        slot_bytes = max(layout.record_bytes for layout in self._layouts.values())
        num_slots = min(budget_bytes // slot_bytes, len(layers) * pack.num_experts)
        if num_slots < 1:
            raise PlanError(
                f"{format_bytes(budget_bytes)} are too little for one expert of {format_bytes(slot_bytes)}; "
                "give more --ram"
            )
        self._most_reads = max(top_k, 1)
        self._pool = host.HostPool(num_slots, slot_bytes, pinned=os.environ.get(PIN) == "1")
        self._source = PackSource(pack, self._pool, open_reader(pack, 2 * self._most_reads))
        chosen = policy or lfru(num_slots, len(layers) * top_k)
        self.store = ExpertStore(layers, pack.num_experts, num_slots, self._source, chosen, most_reads=self._most_reads)
        self._buffer, self.foresight = RowBuffer(), Foresight()
        self._bound: dict[ExpertLayout, SlotExperts] = {}
        self._available_bytes, self._next_check_s = available_bytes, 0.0
        self._full: tuple[float, OffloadStats] | None = None  # when the slots were full, and what had been by then
        self._has_warned = False
        self._gpus = [
            GpuPool(
                share,
                self._layouts,
                pack.num_experts,
                slot_bytes,
                self.store,
                self._pool.view,
                top_k=top_k,
                activations=activations,
            )
            for share in gpus
            if share.num_slots
        ]
        self._gpu_of = {layer: gpu for gpu in self._gpus for layer in gpu.store.layers}
        self._earlier = trace.load(pack)
        if self._earlier is not None:
            for store in self.stores:
                store.seed(self._earlier.heats)

    @property
    def nbytes(self) -> int:
        """Of the slots, filled or not."""
        return self._pool.nbytes

    @property
    def stores(self) -> list[ExpertStore]:
        return [self.store, *(gpu.store for gpu in self._gpus)]

    def experts(self, layer: int) -> OffloadedExperts:
        """The routed experts of a layer, for the model."""
        layout = self._layouts[layer]
        slots = self._bound.get(layout)
        if slots is None:
            slots = self._bound[layout] = bind_layout(layout, self._pack.num_experts, self._activations)
        gpu = self._gpu_of.get(layer)
        return OffloadedExperts(
            layer,
            slots,
            self.store,
            self._pool,
            self._buffer,
            self._look_after,
            self.foresight,
            self._bytes_per_s,
            gpu,
        )

    def warm(self) -> int:
        """Read the experts that were hottest in earlier runs into the slots, as many as fit, and the hottest of those
        onto GPUs; how many were read.

        What cannot be read is left for the request that needs it to hear of.
        """
        if self._earlier is None:
            return 0
        heats = self._earlier.heats
        hottest = sorted((key for key in heats if key.layer in self._layouts), key=lambda key: (-heats[key], key))
        hottest = hottest[: self.store.num_slots]
        for begin in range(0, len(hottest), self._most_reads):
            self.store.prefetch(hottest[begin : begin + self._most_reads])
            self.store.drain()
        for gpu in self._gpus:
            gpu.warm([key for key in hottest if key.layer in gpu.store.layers])
        return self.store.stats().prefetched

    def stats(self) -> OffloadStats:
        reader = self._source.reader
        return OffloadStats(
            self.store.stats(),
            self.store.num_slots,
            self.store.num_slots * self._pool.slot_bytes,
            reader.bytes_read,
            reader.busy_s,
            reader.direct,
            together([gpu.stats() for gpu in self._gpus]),
        )

    def close(self) -> None:
        """Wait for what is under way, and keep what was learned of the routing for the next start."""
        self.drain()
        if num_tokens := self.store.stats().num_tokens:
            earlier = self._earlier.num_tokens if self._earlier is not None else 0
            heats = self.store.heats()
            for gpu in self._gpus:  # which are asked first, and so know of all uses
                heats |= gpu.store.heats()
            trace.save(self._pack, trace.RouteTrace(earlier + num_tokens, heats))

    def _bytes_per_s(self) -> float:
        reader = self._source.reader
        return reader.bytes_read / busy_s if (busy_s := reader.busy_s) else 0.0

    def drain(self) -> None:
        """Wait for all reads and uploads that are under way."""
        for store in reversed(self.stores):
            store.drain()

    def _look_after(self) -> None:
        now = time.monotonic()
        if now < self._next_check_s:
            return
        self._next_check_s = now + CHECK_S
        self._fit_memory()
        self._warn(now)

    def _fit_memory(self) -> None:
        """Give slots back when memory runs short, so that nobody has to be killed, and take them when it is back."""
        available, slot_bytes = self._available_bytes(), self._pool.slot_bytes
        if surplus := host.slots_to_release(available, slot_bytes):
            gone = self.store.shrink(surplus)
            for slot in gone:
                self._pool.release(slot)
            if gone:
                log.warning(
                    "only %s of memory are left: %d expert slots were given back, %d remain; answers get slower",
                    format_bytes(available),
                    len(gone),
                    self.store.num_slots,
                )
        elif self.store.num_slots < self._pool.num_slots and (regain := host.slots_to_regain(available, slot_bytes)):
            self.store.grow(regain)

    def _warn(self, now: float) -> None:
        """Once, when most of the time goes by waiting for the disk. Counts from when the slots were full."""
        if self._has_warned:
            return
        stats = self.stats()
        if self._full is None:
            if stats.store.evictions:
                self._full = now, stats
            return
        start_s, then = self._full
        seconds, lately = now - start_s, since(stats, then)
        if seconds >= _WARN_AFTER_S and lately.store.stall_s > STALL_WARNS_ABOVE * seconds:
            self._has_warned = True
            log.warning("%s", bottleneck(lately, seconds, len(self._layouts) * self._pack.num_experts))
