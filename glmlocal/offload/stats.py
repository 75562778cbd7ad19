"""What offloading reports of itself: values for ``/v1/stats``, ``bench`` and the chat footer. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmlocal.offload.store import StoreStats
from glmlocal.units import format_bytes


@dataclass(frozen=True, slots=True)
class GpuStats:
    """Of all GPUs together, since the start. ``lookups`` are distinct experts of a layer and step, as of a store."""

    lookups: int
    hits: int
    slots: int
    slot_bytes: int  # of all of them together
    uploaded_bytes: int
    streamed: int  # experts that were uploaded for one chunk of a prompt

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 0.0


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """Since the start. ``store``, ``slots`` and ``slot_bytes`` are RAM's, which is asked for what no GPU has."""

    store: StoreStats
    slots: int
    slot_bytes: int  # of all of them together
    read_bytes: int
    read_s: float  # with at least one read under way
    direct: bool  # past the page cache
    gpu: GpuStats | None = None  # None: no GPU holds experts

    @property
    def hit_rate(self) -> float:
        return self.store.hits / self.store.lookups if self.store.lookups else 0.0

    @property
    def read_bytes_per_token(self) -> float:
        return self.read_bytes / self.store.num_tokens if self.store.num_tokens else 0.0

    @property
    def read_bytes_per_s(self) -> float:
        """While it was read."""
        return self.read_bytes / self.read_s if self.read_s else 0.0

    def tiers(self) -> list[dict[str, Any]]:
        """The ``tiers`` of ``/v1/stats``, fastest first: what one did not have the next was asked for."""
        lookups, hits, gpu = self.store.lookups, self.store.hits, self.gpu
        misses = lookups - hits
        on_gpu = [] if gpu is None else [(gpu.lookups, gpu.hits, gpu.hit_rate)]
        return [
            *({"tier": "gpu", "lookups": asked, "hits": found, "hit_rate": rate} for asked, found, rate in on_gpu),
            {"tier": "ram", "lookups": lookups, "hits": hits, "hit_rate": self.hit_rate},
            {"tier": "nvme", "lookups": misses, "hits": misses, "hit_rate": 1.0 if misses else 0.0},
        ]

    def nvme(self) -> dict[str, Any]:
        """The ``nvme`` of ``/v1/stats``."""
        return {
            "read_bytes": self.read_bytes,
            "read_bytes_per_s": self.read_bytes_per_s,
            "read_bytes_per_token": self.read_bytes_per_token,
            "stall_s": self.store.stall_s,
        }


def bottleneck(stats: OffloadStats, seconds: float, num_experts: int) -> str:
    """What to say when the disk holds everything up, and what to do about it."""
    missing = max(0, num_experts - stats.slots)
    more = format_bytes(missing * stats.slot_bytes // max(1, stats.slots))
    return (
        f"NVMe is the bottleneck: {stats.store.stall_s / seconds:.0%} of the time is spent waiting for it "
        f"({stats.read_bytes_per_s / 1e9:.1f} GB/s, {stats.hit_rate:.0%} of experts found in RAM); more --ram would "
        f"help (all experts take {more} more), or a smaller --quant when packing, or a faster disk"
    )


def since(now: OffloadStats, then: OffloadStats) -> OffloadStats:
    """What has come about between two looks at one store."""
    one, two = now.store, then.store
    store = StoreStats(
        one.lookups - two.lookups,
        one.hits - two.hits,
        one.evictions - two.evictions,
        one.prefetched - two.prefetched,
        one.prefetch_hits - two.prefetch_hits,
        one.stall_s - two.stall_s,
        one.num_tokens - two.num_tokens,
    )
    gpu = now.gpu
    if gpu is not None and then.gpu is not None:
        gpu = replace(
            gpu,
            lookups=gpu.lookups - then.gpu.lookups,
            hits=gpu.hits - then.gpu.hits,
            uploaded_bytes=gpu.uploaded_bytes - then.gpu.uploaded_bytes,
            streamed=gpu.streamed - then.gpu.streamed,
        )
    read_bytes, read_s = now.read_bytes - then.read_bytes, now.read_s - then.read_s
    return replace(now, store=store, read_bytes=read_bytes, read_s=read_s, gpu=gpu)


def together(stats: Sequence[GpuStats]) -> GpuStats | None:
    """Of several GPUs as one; None of none."""
    if not stats:
        return None
    return GpuStats(
        sum(each.lookups for each in stats),
        sum(each.hits for each in stats),
        sum(each.slots for each in stats),
        sum(each.slot_bytes for each in stats),
        sum(each.uploaded_bytes for each in stats),
        sum(each.streamed for each in stats),
    )


def merged(stats: Sequence[OffloadStats]) -> OffloadStats | None:
    """Of several stores (layers with records of different sizes) as one; None of none."""
    if not stats:
        return None
    total = stats[0]
    for other in stats[1:]:
        one, two = total.store, other.store
        store = StoreStats(
            one.lookups + two.lookups,
            one.hits + two.hits,
            one.evictions + two.evictions,
            one.prefetched + two.prefetched,
            one.prefetch_hits + two.prefetch_hits,
            one.stall_s + two.stall_s,
            max(one.num_tokens, two.num_tokens),
        )
        total = replace(
            total,
            store=store,
            slots=total.slots + other.slots,
            slot_bytes=total.slot_bytes + other.slot_bytes,
            read_bytes=total.read_bytes + other.read_bytes,
            read_s=total.read_s + other.read_s,
            direct=total.direct and other.direct,
            gpu=together([each for each in (total.gpu, other.gpu) if each is not None]),
        )
    return total
