"""Reads records of an expert pack into slots: natively, past the page cache, checked when they are first seen."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from typing import Protocol

from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack import ExpertPack, Record, file_bytes
from glmlocal.kernels.cpu import _cpu
from glmlocal.offload.host import HostPool
from glmlocal.offload.store import Arrival
from glmlocal.offload.tiers import ExpertKey
from glmlocal.units import MIB

log = logging.getLogger(__name__)

# Beside two cores that compute 2.11 GB/s; 4 threads 2.03, with pieces of 1 MiB 2.05, of 4 MiB 2.10
# (docs/experiments.md). A read that is given up ends with its pieces, so they are small.
THREADS = 8
PIECE_BYTES = MIB // 2


class Reader(Protocol):
    """``_cpu.NvmeReader``; tests put one between that fails."""

    @property
    def direct(self) -> bool: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    def submit(self, token: int, offset: int, num_bytes: int, destination: int, urgent: bool) -> bool: ...
    def hurry(self, token: int) -> bool: ...
    def cancel(self, token: int) -> bool: ...
    def next(self, timeout_s: float) -> tuple[int, int] | None:
        """(token, errno or 0, SHORT_READ or CANCELLED) of a read that has ended."""
        ...


def open_reader(pack: ExpertPack, most_reads: int, *, direct: bool = True) -> Reader:
    """Raises CheckpointError. Says so where the filesystem refuses O_DIRECT."""
    try:
        reader = _cpu.NvmeReader(str(pack.path), THREADS, PIECE_BYTES, most_reads, direct)
    except OSError as error:
        raise CheckpointError(f"cannot read {pack.path}: {error.strerror or error}") from error
    if direct and not reader.direct:
        log.warning(
            "%s: the filesystem refuses O_DIRECT; experts are read through the page cache, which is slower and is "
            "asked to drop them; move the pack to a local disk",
            pack.path,
        )
    return reader


@dataclass(frozen=True, slots=True)
class _FileState:
    """What tells that a file is no longer the one whose header was read."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> _FileState:
        found = os.fstat(descriptor)
        return cls(found.st_size, found.st_mtime_ns)


class PackSource:
    """The ``Source`` of a store whose experts live in a pack and whose slots are a HostPool's.

    A record is checked against its checksum the first time it is read; later reads of it are trusted as long as the
    file has not changed. Raises CheckpointError where the pack cannot be opened or is not the one that was.
    """

    def __init__(self, pack: ExpertPack, pool: HostPool, reader: Reader) -> None:
        self._pack, self._pool, self._reader = pack, pool, reader
        self._state = _FileState.of(reader.descriptor)
        if self._state.size != file_bytes(pack.header):
            raise CheckpointError(
                f"{pack.path} has {self._state.size:,} bytes, its header wants {file_bytes(pack.header):,}; it was "
                "changed while it was opened, start again"
            )
        self._seen: set[tuple[int, int]] = set()
        self._under_way: dict[int, Record] = {}  # by slot

    @property
    def reader(self) -> Reader:
        return self._reader

    def start(self, key: ExpertKey, slot: int, *, urgent: bool = True) -> bool:
        record = self._pack.record(key.layer, key.expert)
        if record.nbytes > self._pool.slot_bytes:
            raise ValueError(f"a record of {record.nbytes} bytes for a slot of {self._pool.slot_bytes}")
        if not self._reader.submit(slot, record.offset, record.nbytes, self._pool.address(slot), urgent):
            return False
        self._under_way[slot] = record
        return True

    def hurry(self, slot: int) -> None:
        self._reader.hurry(slot)

    def cancel(self, slot: int) -> None:
        self._reader.cancel(slot)

    def arrival(self, timeout_s: float) -> Arrival | None:
        found = self._reader.next(timeout_s)
        if found is None:
            return None
        slot, code = found
        record = self._under_way.pop(slot)
        if code == _cpu.CANCELLED:
            return Arrival(slot, is_cancelled=True)
        return Arrival(slot, self._problem(record, slot, code))

    def _problem(self, record: Record, slot: int, code: int) -> CheckpointError | None:
        what = f"layer {record.layer}, expert {record.expert} of {self._pack.path}"
        if code == _cpu.SHORT_READ:
            return CheckpointError(f"cannot read {what}: the file has become shorter; copy or pack the model again")
        if code:
            why = f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"
            return CheckpointError(f"cannot read {what}: {why}; check the disk, and copy the pack to another")
        if _FileState.of(self._reader.descriptor) != self._state:
            return CheckpointError(f"cannot trust {what}: the file was changed while it is in use; start again")
        if (record.layer, record.expert) in self._seen:
            return None
        try:
            self._pack.check(record, self._pool.view(slot)[: record.nbytes])
        except CheckpointError as error:
            return error
        self._seen.add((record.layer, record.expert))
        return None
