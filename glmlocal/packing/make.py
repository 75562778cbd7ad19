"""Makes packs: experts are read, quantized, laid out and written by one thread per core, one expert at a time each.

What a thread holds is one record and a few hundred KiB of its source; nothing waits in a queue. ``Maker`` takes
whatever part of the source is there (``local.pack_model`` all of it, ``streaming`` shard by shard).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import xxhash

from glmlocal import kernels
from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack import (
    DENSE_GGUF,
    DENSE_SAFETENSORS,
    PACK_FILE,
    VERSION,
    ExpertPack,
    checksum,
    expert_name,
    header_bytes,
)
from glmlocal.formats.expert_pack_layout import MATRICES
from glmlocal.formats.index import TensorIndex
from glmlocal.models.weights import Quant, WeightReader
from glmlocal.packing.dense import DenseFile
from glmlocal.packing.job import PackJob
from glmlocal.packing.partial import PartialPack, Piece

_COPY_BYTES = 8 << 20  # of a dense tensor at a time
COMMIT_EVERY_S = 1.0  # at most so much is made again after a kill

OnBytes = Callable[[int], None]  # is told the bytes of the source that are done so far


class Maker:
    """A pack on its way. Pieces are numbered: first the records, in the order of the file, then the dense tensors.

    Closing it before ``finish`` leaves what the next one with the same ``identity`` goes on from. Raises ConfigError
    where another process makes the same pack.
    """

    def __init__(
        self,
        job: PackJob,
        dense: DenseFile,
        target: Path,
        identity: str,
        *,
        threads: int,
        on_bytes: OnBytes = lambda num_bytes: None,
    ) -> None:
        self.job, self._dense = job, dense
        self._dense_name = DENSE_GGUF if job.kind == "gguf" else DENSE_SAFETENSORS
        self._records = job.records()
        empty = ExpertPack(target / PACK_FILE, VERSION, job.header, (0,) * job.header.num_checksums)
        pieces = [Piece(PACK_FILE, record.offset, record.nbytes) for record in empty.records()]
        pieces += [
            Piece(self._dense_name, offset, ref.nbytes) for ref, offset in zip(job.dense, dense.offsets, strict=True)
        ]
        sizes = {PACK_FILE: job.pack_bytes, self._dense_name: dense.nbytes}
        self._partial = PartialPack(target, identity, sizes, pieces)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
        self._on_bytes, self._done_bytes, self._lock = on_bytes, 0, threading.Lock()
        self._stopped = threading.Event()
        self._last_commit_s = time.monotonic()
        try:
            self._partial.check_claims(self._pool)
        except BaseException:
            self.close()
            raise
        self._done_bytes = sum(job.source_bytes[piece] for piece in self._partial.checksums)
        on_bytes(self._done_bytes)

    def __enter__(self) -> Maker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """Where text files go, before ``finish``."""
        return self._partial.directory

    @property
    def num_done(self) -> int:
        """Records and dense tensors that are written."""
        return len(self._partial.checksums)

    def is_done(self, piece: int) -> bool:
        return piece in self._partial.checksums

    def missing(self) -> list[int]:
        """Pieces that are to be made."""
        return [piece for piece in range(len(self._partial.pieces)) if not self.is_done(piece)]

    def missing_bytes(self) -> int:
        """What they will take on the disk."""
        return sum(self._partial.pieces[piece].nbytes for piece in self.missing())

    def record_of(self, piece: int) -> tuple[int, int] | None:
        """(layer, expert), or None for a dense tensor."""
        return self._records[piece] if piece < len(self._records) else None

    def dense_index(self, piece: int) -> int:
        return piece - len(self._records)

    def spread(self, pieces: Iterable[int]) -> list[int]:
        """The same pieces with dense tensors among records, both evenly. Threads that write to one file wait for one
        another, and copying leaves the arithmetic of a core unused."""
        kinds: tuple[list[int], list[int]] = [], []
        for piece in pieces:
            kinds[self.record_of(piece) is None].append(piece)
        turns: list[tuple[float, int]] = []
        for kind in kinds:
            before, total = 0, sum(self.job.source_bytes[piece] for piece in kind)
            for piece in kind:
                turns.append((before / max(total, 1), piece))
                before += self.job.source_bytes[piece]
        return [piece for _, piece in sorted(turns)]

    def make(self, pieces: Iterable[int], tensors: TensorIndex, quant: Quant) -> None:
        """Make these pieces of tensors that are all there, and journal them. Raises CheckpointError, OSError."""
        reader = WeightReader(tensors, lambda num_bytes: None, quant)
        spread = self.spread(pieces)
        futures: list[Future[None]] = [self._pool.submit(self._make, piece, tensors, reader) for piece in spread]
        try:
            pending: Iterable[Future[None]] = futures
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if time.monotonic() - self._last_commit_s > COMMIT_EVERY_S:
                    self._partial.commit()
                    self._last_commit_s = time.monotonic()
            self._partial.commit()
        except BaseException:
            self._stopped.set()
            for future in futures:
                future.cancel()
            wait(futures)
            with suppress(OSError):  # a full disk, again
                self._partial.commit()
            raise

    def finish(self) -> None:
        """Publish the pack. All pieces must be there."""
        checksums = [self._partial.checksums[piece] for piece in range(self.job.header.num_checksums)]
        pack_header = header_bytes(self.job.header, checksums)
        self._partial.publish({PACK_FILE: pack_header, self._dense_name: self._dense.header})
        self.close()

    def close(self) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._partial.close()

    def _make(self, piece: int, tensors: TensorIndex, reader: WeightReader) -> None:
        if self._stopped.is_set():
            return
        record = self.record_of(piece)
        if record is None:
            self._copy(piece, tensors)
        else:
            self._pack(piece, *record, reader)

    def _pack(self, piece: int, layer: int, expert: int, reader: WeightReader) -> None:
        if layer >= self.job.config.num_hidden_layers:
            reader = reader.at_least_8_bits()
        gate, up, down = (reader.rows(expert_name(layer, expert, matrix)) for matrix in MATRICES)
        try:
            data = kernels.pack_record((gate, up, down), self.job.header.layouts[layer])
        except ValueError as error:
            raise CheckpointError(f"expert {expert} of layer {layer} cannot be packed: {error}") from error
        self._partial.write(piece, data)
        self._partial.done(piece, checksum(data))
        self._report(piece)

    def _copy(self, piece: int, tensors: TensorIndex) -> None:
        ref, digest = self.job.dense[self.dense_index(piece)], xxhash.xxh3_64()
        for begin in range(0, ref.nbytes, _COPY_BYTES):
            data = tensors.copy(ref.name, begin, min(begin + _COPY_BYTES, ref.nbytes))
            digest.update(data.data)
            self._partial.write(piece, data, begin)
        self._partial.done(piece, digest.intdigest())
        self._report(piece)

    def _report(self, piece: int) -> None:
        with self._lock:
            self._done_bytes += self.job.source_bytes[piece]
            self._on_bytes(self._done_bytes)
