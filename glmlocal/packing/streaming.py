"""A model on a hub → a pack, shard by shard: fetch one, make what is complete with it while the next comes, delete it.

Never more of the checkpoint is on the disk than the shards whose experts wait for a part in a later one, and the one
that is fetched ahead; in releases whose tensors are in order that is three, two where there is no room for more.
Whatever stops it, the next attempt goes on: the download's journal knows the shard that was on its way, the pack's the
records that are made, and a shard is deleted only when the pack's journal has all that was made of it. A file that a
snapshot in the cache refers to is used, and stays.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType

from glmlocal.errors import DownloadError
from glmlocal.formats.index import Checkpoint, TensorIndex, TensorRef
from glmlocal.hub.cache import snapshot_files
from glmlocal.hub.download import Options, Progress
from glmlocal.hub.headers import remote_checkpoint
from glmlocal.hub.listing import HubFile
from glmlocal.hub.pull import Pull, check_space, fetch_files, storing_in
from glmlocal.hub.select import TEXT_FILES
from glmlocal.models.weights import Quant
from glmlocal.packing.job import PackJob, parts_of
from glmlocal.packing.local import check_target, dense_file, identity_of, storing
from glmlocal.packing.make import Maker


@dataclass(frozen=True, slots=True)
class Stream:
    """What ``pull_packed`` will do: everything that can be known before the weights come."""

    pull: Pull
    checkpoint: Checkpoint  # of headers; its tensors' bytes are not there
    job: PackJob
    quant: Quant
    target: Path

    @property
    def shards(self) -> tuple[HubFile, ...]:
        """The files with weights, in the order of the checkpoint."""
        directory = self.pull.snapshot.name  # the commit: what comes after it is the path in the repository
        by_path = {file.path: file for file in self.pull.selection.files}
        paths = (file.as_posix().partition(f"/{directory}/")[2] for file in self.checkpoint.tensors.files)
        return tuple(by_path[path] for path in paths)


@contextmanager
def remote_headers(pull: Pull, options: Options) -> Iterator[Checkpoint]:
    """The headers of just the files that the pull is going to fetch. Raises DownloadError as ``remote_checkpoint``."""
    with remote_checkpoint(pull.source, pull.hub, options.patience) as checkpoint:
        if pull.listing.commit not in checkpoint.tensors.files[0].parts:
            raise DownloadError(f"{pull.source.repo_id} has just changed; run the same command again")
        yield checkpoint


def pull_packed(
    stream: Stream,
    options: Options,
    *,
    threads: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    on_wait: Callable[[], object] = lambda: None,
) -> Path:
    """Fetch and pack, and return the pack's directory. ``on_bytes`` is told the bytes fetched and packed so far.

    Raises DownloadError, CheckpointError, ConfigError.
    """
    check_target(stream.target)
    pull, job = stream.pull, stream.job
    dense = dense_file(job, stream.checkpoint)
    identity = identity_of(job, dense, "\n".join(f"{file.path} {file.digest}" for file in stream.shards))
    meter = _Meter(on_bytes)
    with storing(stream.target), storing_in(pull.cache), pull.cache.locked(on_wait):
        texts = [file for file in pull.selection.files if file.path in TEXT_FILES and job.kind == "safetensors"]
        fetch_files(pull, [file for file in texts if not pull.cache.has(file)], options)
        with Maker(job, dense, stream.target, identity, threads=threads, on_bytes=meter.packed) as maker:
            shards = _Shards(stream, maker)
            has_room = _has_room_ahead(shards, stream, maker)
            with _Fetching(pull, options, meter) as fetching:
                for shard in stream.shards:
                    if not shards.is_needed(shard):
                        meter.fetched(shard)
                        shards.drop_what_is_not_needed()
                needed = [shard for shard in stream.shards if shards.is_needed(shard)]
                for shard, following in zip_longest(needed, needed[1:]):
                    fetching.begin(shard)
                    fetching.wait()
                    if following is not None and has_room:
                        fetching.begin(following)
                    shards.here.append(shard)
                    maker.make(shards.complete(), shards.index(), stream.quant)
                    shards.drop_what_is_not_needed()
            for file in texts:
                shutil.copyfile(pull.cache.blob(file), maker.directory / file.path)
            maker.finish()
        _clean(pull)
    return stream.target


def _has_room_ahead(shards: _Shards, stream: Stream, maker: Maker) -> bool:
    """Raises DownloadError where there is no room even without a shard that is fetched ahead."""

    def check(ahead: int) -> None:
        check_space({stream.pull.cache.directory: shards.most_bytes(ahead), stream.target: maker.missing_bytes()})

    try:
        check(1)
    except DownloadError:
        check(0)
        return False
    return True


class _Fetching:
    """At most one shard on its way, by a thread of its own. Leaving it gives up what has not arrived."""

    def __init__(self, pull: Pull, options: Options, meter: _Meter) -> None:
        self._pull, self._options, self._meter = pull, options, meter
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._under_way: tuple[HubFile, Future[None]] | None = None
        self._is_over = False

    def __enter__(self) -> _Fetching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._thread.shutdown(cancel_futures=True)  # within options.report_every_s

    def begin(self, shard: HubFile) -> None:
        """Unless it is under way; nothing else may be."""
        if self._under_way is None:
            self._under_way = shard, self._thread.submit(self._fetch, shard)
        assert self._under_way[0] == shard

    def wait(self) -> None:
        """Until it is in the cache. Raises DownloadError, or OSError for ``storing_in``."""
        assert self._under_way is not None
        (_, future), self._under_way = self._under_way, None
        future.result()

    def _fetch(self, shard: HubFile) -> None:
        if not self._pull.cache.has(shard):
            fetch_files(self._pull, [shard], self._options, self._report)
        self._meter.fetched(shard)

    def _report(self, files: Iterable[Progress]) -> None:
        if self._is_over:
            raise DownloadError("packing has ended")  # what has arrived is kept; nobody hears of this
        self._meter.fetching(files)


class _Meter:
    """Bytes fetched plus bytes packed: half of the work each. Told by several threads."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes, self._fetched, self._packed = on_bytes, dict[str, int](), 0
        self._lock = threading.Lock()

    def fetching(self, files: Iterable[Progress]) -> None:
        with self._lock:
            self._fetched |= {file.path: file.done_bytes for file in files}
            self._tell()

    def fetched(self, file: HubFile) -> None:
        with self._lock:
            self._fetched[file.path] = file.size_bytes
            self._tell()

    def packed(self, num_bytes: int) -> None:
        with self._lock:
            self._packed = num_bytes
            self._tell()

    def _tell(self) -> None:
        self._on_bytes(sum(self._fetched.values()) + self._packed)


class _Shards:
    """Which pieces need which shards, and which of these are here."""

    def __init__(self, stream: Stream, maker: Maker) -> None:
        self._pull, self._maker, self._remote = stream.pull, maker, stream.checkpoint.tensors
        by_file = dict(zip(self._remote.files, stream.shards, strict=True))
        self._order = stream.shards
        self._kept = kept_digests(stream.pull)
        blobs = {file: self._pull.cache.blob(shard) for file, shard in by_file.items()}
        self._refs = [ref.moved(blobs) for ref in self._remote.values()]
        self._needs = {
            piece: frozenset(by_file[file] for file in _files_of(piece, stream, maker)) for piece in maker.missing()
        }
        self.here: list[HubFile] = []

    def is_needed(self, shard: HubFile) -> bool:
        return any(shard in shards and not self._maker.is_done(piece) for piece, shards in self._needs.items())

    def complete(self) -> list[int]:
        """The pieces that can be made now."""
        here = set(self.here)
        return [piece for piece, shards in self._needs.items() if shards <= here and not self._maker.is_done(piece)]

    def index(self) -> TensorIndex:
        """The tensors of the shards that are here."""
        blobs = {self._pull.cache.blob(shard) for shard in self.here}
        refs: dict[str, TensorRef] = {}
        for ref in self._refs:  # a matrix of several tensors, or those of them that are here
            found = [part for part in ref.stored if part.file in blobs]
            refs |= {part.name: part for part in ([ref] if len(found) == len(ref.stored) else found)}
        return TensorIndex(self._remote.kind, self._pull.cache.directory, refs, tuple(blobs))

    def drop_what_is_not_needed(self) -> None:
        for shard in self._order:
            blob = self._pull.cache.blob(shard)
            if shard.digest not in self._kept and blob.exists() and not self.is_needed(shard):
                blob.unlink()
        self.here = [shard for shard in self.here if self._pull.cache.has(shard)]

    def most_bytes(self, ahead: int) -> int:
        """Of the shards that will be here at once, beside those that are and stay; ``ahead`` are fetched early."""
        needs = {piece: shards for piece, shards in self._needs.items() if not self._maker.is_done(piece)}
        last: dict[HubFile, int] = {}  # shard → the place of the last one that it is needed with
        for shards in needs.values():
            end = max(self._order.index(shard) for shard in shards)
            last |= {shard: max(last.get(shard, 0), end) for shard in shards}
        most = 0
        for step in range(len(self._order)):
            held = (s for i, s in enumerate(self._order) if s in last and i - ahead <= step <= last[s])
            most = max(most, sum(shard.size_bytes for shard in held if not self._pull.cache.has(shard)))
        return most


def _files_of(piece: int, stream: Stream, maker: Maker) -> set[Path]:
    record = maker.record_of(piece)
    if record is None:
        return {stream.job.dense[maker.dense_index(piece)].file}
    return {ref.file for ref in parts_of(stream.checkpoint.tensors, *record)}


def kept_digests(pull: Pull) -> frozenset[str]:
    """Of the files that a snapshot of the cache refers to: somebody else's."""
    return frozenset(file.digest for snapshot in pull.cache.snapshots() for file in snapshot_files(snapshot))


def _clean(pull: Pull) -> None:
    """Remove what was fetched and is now in the pack, and the directories that are empty then."""
    kept = kept_digests(pull)
    for file in pull.selection.files:
        if file.digest not in kept:
            pull.cache.blob(file).unlink(missing_ok=True)
    pull.cache.sweep()
    for directory in (pull.cache.directory / "blobs", pull.cache.directory):
        with suppress(OSError):
            directory.rmdir()
