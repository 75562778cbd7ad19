"""EngineStats: what the engine is doing, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glmlocal.offload.stats import OffloadStats


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """KV blocks on disk."""

    stored_bytes: int
    limit_bytes: int
    saved_tokens: int  # since the start, written
    restored_tokens: int  # since the start, read instead of computed
    dropped_tokens: int  # since the start, not written: the disk was too slow, full or broken
    ignored_files: int  # damaged or foreign


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at the engine. Counts without a word about their time are since the start."""

    num_running: int
    num_waiting: int
    max_batch: int
    max_waiting: int
    decode_tokens_per_s: float  # over the steps of the last seconds; 0 when idle
    prefill_tokens_per_s: float
    kv_used_tokens: int  # of blocks that requests hold
    kv_cached_tokens: int  # of blocks whose prefix can be found again, held or not
    kv_capacity_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    num_submitted: int
    num_finished: int
    num_aborted: int
    num_failed: int
    num_refused: int  # the queue was full
    num_preempted: int
    num_prefilled_tokens: int
    num_decoded_tokens: int
    snapshots: SnapshotStats | None = None
    offload: OffloadStats | None = None  # None: all experts are in RAM

    def as_dict(self) -> dict[str, Any]:
        """The engine's half of ``/v1/stats``."""
        snapshots, offload = self.snapshots, self.offload
        return {
            "queue": {
                "running": self.num_running,
                "waiting": self.num_waiting,
                "max_batch": self.max_batch,
                "max_waiting": self.max_waiting,
            },
            "speed": {
                "decode_tokens_per_s": self.decode_tokens_per_s,
                "prefill_tokens_per_s": self.prefill_tokens_per_s,
            },
            "kv": {
                "used_tokens": self.kv_used_tokens,
                "cached_tokens": self.kv_cached_tokens,
                "capacity_tokens": self.kv_capacity_tokens,
            },
            "prefix_cache": {"queried_tokens": self.prefix_queried_tokens, "hit_tokens": self.prefix_hit_tokens},
            "totals": {
                "submitted": self.num_submitted,
                "finished": self.num_finished,
                "aborted": self.num_aborted,
                "failed": self.num_failed,
                "refused": self.num_refused,
                "preempted": self.num_preempted,
                "prefilled_tokens": self.num_prefilled_tokens,
                "decoded_tokens": self.num_decoded_tokens,
            },
            "kv_snapshots": None
            if snapshots is None
            else {
                "stored_bytes": snapshots.stored_bytes,
                "limit_bytes": snapshots.limit_bytes,
                "saved_tokens": snapshots.saved_tokens,
                "restored_tokens": snapshots.restored_tokens,
                "dropped_tokens": snapshots.dropped_tokens,
                "ignored_files": snapshots.ignored_files,
            },
            "tiers": None if offload is None else offload.tiers(),
            "nvme": None if offload is None else offload.nvme(),
        }
