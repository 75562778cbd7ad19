"""KVStore: KV blocks between the cache in memory and files, on threads of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.kv_files import BlockFiles
from glmlocal.engine.stats import SnapshotStats
from glmlocal.layers.kv_cache import KVCache
from glmlocal.units import GIB, MIB

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KVStoreOptions:
    """Where conversations' keys and values survive eviction and restarts."""

    directory: Path
    identity: str  # of the model, from ``model_identity``
    limit_bytes: int = 20 * GIB
    min_tokens: int = 256  # shorter prefixes are computed faster than they are worth keeping
    max_pending_bytes: int = 256 * MIB  # copies that wait for the disk; what is beyond is not kept


class KVStore:
    """``save`` copies a block on the caller's thread and writes it on another; ``restore`` fills blocks on a third.

    Nothing here fails a request: what cannot be written is forgotten, what cannot be read is computed.
    """

    def __init__(self, options: KVStoreOptions, kv_cache: KVCache) -> None:
        """Raises ConfigError for a directory that cannot be used."""
        self._options, self._raw, self._block_size = options, kv_cache.raw_blocks(), kv_cache.block_size
        self._block_bytes = sum(raw.shape[1] for raw in self._raw)
        model = kv_cache.layout_digest(options.identity)
        self._files = BlockFiles(options.directory, options.limit_bytes, model, self._block_bytes)
        self._writer = ThreadPoolExecutor(1, "kv-write")
        self._reader = ThreadPoolExecutor(1, "kv-read")
        self._lock = threading.Lock()  # guards what follows
        self._pending_bytes = 0
        self._num_saved = self._num_restored = self._num_dropped = 0
        self._is_failing = False

    def num_stored(self, names: Sequence[bytes]) -> int:
        """See ``scheduler.BlockStore``."""
        return next((i for i, name in enumerate(names) if name not in self._files), len(names))

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> RestoreJob:
        """See ``scheduler.BlockStore``. The blocks belong to the job until it is done."""
        job = RestoreJob()
        self._reader.submit(self._restore, job, tuple(names), tuple(blocks))
        return job

    def save(self, block: int, name: bytes) -> None:
        """Keep a block whose memory is about to be used for something else."""
        if name in self._files:
            self._files.touch([name])
            return
        with self._lock:
            if self._pending_bytes + self._block_bytes > self._options.max_pending_bytes:
                self._num_dropped += 1
                return
            self._pending_bytes += self._block_bytes
        payload = torch.empty(self._block_bytes, dtype=torch.uint8)
        self._copy_out(block, payload)
        self._writer.submit(self._write, name, payload)

    def close(self, pool: BlockPool) -> None:
        """Write what waits, and the long prefixes that are still in memory. Nothing may run any more."""
        self._reader.shutdown()
        self._writer.shutdown()
        payload = torch.empty(self._block_bytes, dtype=torch.uint8)
        for block, name in reversed(pool.long_blocks()):  # beginnings last: they are the last to be given up
            if self._is_failing:
                return
            if name in self._files:
                self._files.touch([name])
                continue
            self._copy_out(block, payload)
            with self._lock:
                self._pending_bytes += self._block_bytes
            self._write(name, payload)

    def stats(self) -> SnapshotStats:
        size = self._block_size
        return SnapshotStats(
            stored_bytes=self._files.stored_bytes,
            limit_bytes=self._options.limit_bytes,
            saved_tokens=self._num_saved * size,
            restored_tokens=self._num_restored * size,
            dropped_tokens=self._num_dropped * size,
            ignored_files=self._files.num_ignored,
        )

    def _copy_out(self, block: int, payload: Tensor) -> None:
        for piece, raw in zip(payload.split([raw.shape[1] for raw in self._raw]), self._raw, strict=True):
            piece.copy_(raw[block])

    def _write(self, name: bytes, payload: Tensor) -> None:
        try:
            self._files.write(name, payload.numpy().data)
        except OSError as error:
            if not self._is_failing:
                log.warning("KV snapshots cannot be written: %s; conversations are not kept until they can", error)
            is_failing, saved, dropped = True, 0, 1
        else:
            is_failing, saved, dropped = False, 1, 0
        with self._lock:
            self._is_failing = is_failing
            self._num_saved += saved
            self._num_dropped += dropped
            self._pending_bytes -= self._block_bytes

    def _restore(self, job: RestoreJob, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        try:
            payload = torch.empty(self._block_bytes, dtype=torch.uint8)
            into = payload.numpy().data
            for name, block in zip(names, blocks, strict=True):
                if job.is_cancelled or not self._files.read(name, into):
                    break
                for piece, raw in zip(payload.split([raw.shape[1] for raw in self._raw]), self._raw, strict=True):
                    raw[block].copy_(piece)
                job.num_restored += 1
            self._files.touch(names[: job.num_restored])
        except Exception:
            log.exception("reading KV snapshots failed; the prompt is computed")
        finally:
            with self._lock:
                self._num_restored += job.num_restored
            job.is_done = True  # last: from here on the blocks are the scheduler's


class RestoreJob:
    """See ``scheduler.Restore``. Written by the reading thread, but for ``is_cancelled``."""

    def __init__(self) -> None:
        self.is_done = self.is_cancelled = False
        self.num_restored = 0

    def cancel(self) -> None:
        self.is_cancelled = True
