"""Files from a hub into its cache: in parallel, in ranges, hashed on the way, resumed where they stopped.

A queue of ranges per file; as many threads as there are connections take from them, in the files' order (``ranges``).
Others hash behind them, a file each, and give it its name when its hash is right. The calling thread reports, and notes
in the journals what has come. One thread keeps the disk busy behind all of them, and nobody waits for it
(docs/design/006-pull-durability.md). Nothing that a journal vouches for is ever fetched again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import DownloadError
from glmlocal.hub import unsynced
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.partial import PartialFile
from glmlocal.hub.ranges import Fetch, Fetcher, Options, Stopped
from glmlocal.hub.recent import Recent
from glmlocal.units import MIB

__all__ = ["DEFAULTS", "OnProgress", "Options", "Progress", "download"]

DEFAULTS = Options()
_READ_BYTES = MIB // 4  # at a time, by the hasher: as much as stays in a core's cache
_HASHERS = 4  # files at the same time, where there are cores: 5 GB/s
_LOOK_EVERY_S = 0.02
_STOPPED_S = 0.5  # at most, until a thread that hashes sees that it is over
_GOODBYE_S = 2.0  # for threads that wait for the network; then they are left behind


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is, for whoever shows it."""

    path: str
    done_bytes: int
    size_bytes: int
    is_complete: bool  # verified and in its place


OnProgress = Callable[[Sequence[Progress]], object]


def download(
    fetches: Sequence[tuple[HubFile, PartialFile, Path]],
    listing: Listing,
    hub: Hub,
    options: Options = DEFAULTS,
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Bring every file to its target, verified. Raises DownloadError, or OSError when it cannot be stored.

    Whatever ends it, what has arrived is journalled, so that the next call goes on from there. The disk may not have
    the files yet: ``unsynced`` knows which.
    """
    run = _Download([Fetch(*fetch) for fetch in fetches], listing, hub, options)
    threads = [run.thread(run.fetch_ranges) for _ in range(options.connections)]
    threads += [run.thread(run.hash_files) for _ in range(run.num_hashed)]
    syncer = run.thread(run.sync_files)
    for thread in (*threads, syncer):
        thread.start()
    try:
        while run.wait(options.report_every_s):
            run.note()
            on_progress(run.progress())
    except BaseException:
        threads.append(syncer)  # an error, or a person who will wait that long
        run.stop(threads)
        with suppress(OSError):  # a full disk, again
            run.note()
        raise
    finally:
        if run.stop(threads):
            run.close()
    on_progress(run.progress())


class _Download:
    """What the threads of one download share."""

    def __init__(self, fetches: Sequence[Fetch], listing: Listing, hub: Hub, options: Options) -> None:
        self.fetches, self.listing, self.options = fetches, listing, options
        self.changed = threading.Condition()
        self.num_hashed = min(len(fetches), _HASHERS, os.cpu_count() or 1)
        self.fetcher = Fetcher(fetches, listing, hub, options, self.changed, self.num_hashed)
        self.unhashed = deque(fetches)
        self.error: BaseException | None = None
        self.placed: list[tuple[Fetch, int]] = []  # to be synced, and their descriptors
        try:
            digests = [fetch.file.digest for fetch in fetches]
            self.marks = {each.digest: each for each in unsynced.mark(fetches[0].partial.path.parent, digests)}
        except OSError:
            self.marks = {}  # then a file is synced before it gets its name

    # The calling thread

    def wait(self, timeout_s: float) -> bool:
        """Until something happens; False when all is done. Raises what went wrong in a thread."""
        with self.changed:
            self.changed.wait_for(self._is_over, timeout_s)
            if self.error is not None:
                raise self.error
            return not all(fetch.complete for fetch in self.fetches)

    def _is_over(self) -> bool:
        return self.error is not None or all(fetch.complete for fetch in self.fetches)

    def note(self) -> None:
        for fetch in self.fetches:
            if not fetch.complete:
                fetch.partial.note()

    def progress(self) -> list[Progress]:
        return [
            Progress(
                fetch.file.path,
                fetch.file.size_bytes if fetch.complete else sum(end - begin for begin, end in fetch.partial.written),
                fetch.file.size_bytes,
                fetch.complete,
            )
            for fetch in self.fetches
        ]

    def thread(self, work: Callable[[], object]) -> threading.Thread:
        """One that does the work until it ends, it fails, or the download is stopped."""

        def run() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:
                self._fail(error)

        return threading.Thread(target=run, name=f"pull-{work.__name__}", daemon=True)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
        self.fetcher.stop()

    def stop(self, threads: Sequence[threading.Thread]) -> bool:
        """Have them end; whether they did."""
        self.fetcher.stop()
        deadline = time.monotonic() + _GOODBYE_S
        for thread in threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def close(self) -> None:
        for fetch in self.fetches:
            fetch.partial.close()

    # The threads that fetch

    def fetch_ranges(self) -> None:
        self.fetcher.work(self._is_over)

    # The threads that hash

    def hash_files(self) -> None:
        recent, buffer = Recent(), memoryview(bytearray(_READ_BYTES))
        while fetch := self._next_to_hash(recent):
            while not self._hash(fetch, recent, buffer):
                self._start_over(fetch)
            self._place(fetch)

    def _next_to_hash(self, recent: Recent) -> Fetch | None:
        with self.changed:
            if not self.unhashed:
                return None
            fetch = self.unhashed.popleft()
            recent.take(0)
            fetch.recent = recent
            self.changed.notify_all()
            return fetch

    def _hash(self, fetch: Fetch, recent: Recent, buffer: memoryview) -> bool:
        """Follow the file's bytes as they arrive; whether all of them together are what the hub said."""
        hasher, position, size, available = fetch.file.hasher(), 0, fetch.file.size_bytes, 0
        while position < size:
            self._check_running()
            arrivals, data = recent.arrivals, recent.take(position)
            if isinstance(data, int):
                if position >= available:
                    available = _whole_until(fetch.partial)
                    if position >= available:
                        recent.wait(arrivals, _STOPPED_S)
                    continue  # they may have been kept
                data = buffer[: fetch.partial.read(position, buffer[: min(available, data) - position])]
                if not data:
                    return False  # somebody has cut the file
            hasher.update(data)  # without the GIL
            position += len(data)
        return hasher.hexdigest() == fetch.file.digest

    def _check_running(self) -> None:
        if self.fetcher.stopped.is_set():
            raise Stopped

    def _start_over(self, fetch: Fetch) -> None:
        """Fetch a file again whose hash is wrong: once, for what was damaged on the way or on this disk."""
        if fetch.rehashed:
            raise DownloadError(
                f"{fetch.file.path} of {self.listing.repo_id} arrived twice with another hash than the hub states "
                f"({fetch.file.digest[:16]}…): {self.listing.revision} has moved, or something on the way changes it; "
                "run the command again later, or use another hub (--hub)"
            )
        fetch.rehashed, fetch.location = True, None
        fetch.partial.start_over()
        self.fetcher.add(fetch)

    def _place(self, fetch: Fetch) -> None:
        """Give a verified file its name; where there is no mark of it, the disk comes first."""
        descriptor = fetch.partial.finish(fetch.target, synced=fetch.file.digest not in self.marks)
        with self.changed:
            self.placed.append((fetch, descriptor))
            fetch.complete = True
            self.changed.notify_all()

    # The thread that syncs

    def sync_files(self) -> None:
        """Bring to the disk what has come, as it comes, and take the marks away of the files that are there."""
        try:
            while self._wait_to_sync():
                for fetch in self.fetches:
                    if not fetch.complete:
                        fetch.partial.sync()
                self._sync_placed()
        finally:
            for _, descriptor in self.placed:
                os.close(descriptor)

    def _wait_to_sync(self) -> bool:
        """Until a sync is due; False when the download is over."""
        due_s = time.monotonic() + self.options.sync_every_s
        while not (self.fetcher.stopped.is_set() or self._is_over()):
            unsynced_bytes = sum(fetch.partial.unsynced_bytes for fetch in self.fetches if not fetch.complete)
            if unsynced_bytes >= self.options.sync_bytes or time.monotonic() >= due_s:
                return True
            self.fetcher.stopped.wait(_LOOK_EVERY_S)
        return False

    def _sync_placed(self) -> None:
        batch = list(self.placed)  # others are added meanwhile
        for _, descriptor in batch:
            os.fsync(descriptor)
        for directory in {fetch.target.parent for fetch, _ in batch}:
            unsynced.sync(directory)
        for fetch, descriptor in batch:
            if mark := self.marks.get(fetch.file.digest):
                mark.path.unlink(missing_ok=True)
            self.placed.remove((fetch, descriptor))
            os.close(descriptor)


def _whole_until(partial: PartialFile) -> int:
    """Where the bytes end that are there from the beginning without a hole."""
    written = partial.written
    return written[0][1] if written and written[0][0] == 0 else 0
