"""The threads that fetch: ranges of files from one queue, tried again where that may help, written as they come."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.errors import DownloadError
from glmlocal.hub.http import DEFAULT_PATIENCE, Patience, TryAgain, check_status, explain, wait_before
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.partial import PartialFile
from glmlocal.hub.recent import Recent
from glmlocal.hub.wire import Answer, Wire
from glmlocal.units import KIB, MIB

if TYPE_CHECKING:
    import httpx

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_CHUNK_BYTES = 512 * KIB  # received and written at a time: what stays in a core's cache on its way
_FAST_RANGE_BYTES = 16 * MIB  # of one request while few are enough
_FEW = 2  # requests at the same time to begin with
_FAR_S = 0.02  # for the first byte of an answer; less on this machine or its network
_SMALL_BYTES = 64 * KIB  # to be read at once: whoever reads so little waits for the network
_LOOK_AT_READS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """How to download; the defaults suit a hub with a CDN."""

    connections: int = 8  # at most; two while these bring bytes faster than they are stored
    range_bytes: int = 64 * MIB  # of one request
    sync_every_s: float = 2.0  # at most so much is fetched again after a power failure
    sync_bytes: int = 1024 * MIB  # not synced yet, of all files: the disk starts on them without waiting for the second
    report_every_s: float = 0.5  # and note in the journals: at most so much is fetched again after a kill
    limit_bytes_per_s: int | None = None
    patience: Patience = DEFAULT_PATIENCE


class Stopped(Exception):
    """Somebody else failed, or the user has had enough."""


class _RangeIgnored(Exception):
    """The server sent the whole file where a part was asked for."""


@dataclass(eq=False)
class Fetch:
    """One file on its way. Its fields are changed under the download's lock."""

    file: HubFile
    partial: PartialFile
    target: Path
    location: str | None = None  # where the hub redirected to last time
    ranges_ignored: bool = False
    rehashed: bool = False  # the hash was wrong once
    complete: bool = False  # verified and in its place


@dataclass(frozen=True, slots=True)
class Task:
    fetch: Fetch
    begin: int
    end: int
    is_whole: bool = False  # asked for without a range


@dataclass(eq=False)
class Pace:
    """Bytes per second over all connections, and the pause that a server asked for."""

    bytes_per_s: int | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_s: float = 0.0  # when the next byte may come
    resume_s: float = 0.0  # when the next request may go out

    def delay_s(self, num_bytes: int) -> float:
        """How long to wait after having received so much."""
        if self.bytes_per_s is None:
            return 0.0
        with self.lock:
            now = time.monotonic()
            self.next_s = max(self.next_s, now) + num_bytes / self.bytes_per_s
            return self.next_s - now


class Fetcher:
    """What the threads that fetch share. ``changed`` is told when bytes have come or work has."""

    def __init__(self, listing: Listing, hub: Hub, options: Options, changed: threading.Condition) -> None:
        self.listing, self.hub, self.options, self.changed = listing, hub, options, changed
        self.pace = Pace(options.limit_bytes_per_s)
        self.recent = Recent()
        self.stopped = threading.Event()
        self._tasks = deque[Task]()
        self._allowed, self._running = min(_FEW, options.connections), 0
        self._num_reads = self._num_small = 0  # since `_allowed` last grew

    def add(self, fetches: Sequence[Fetch], *, first: bool = False) -> None:
        """Queue what is missing of these files, behind or before everything else."""
        tasks = [task for fetch in fetches for task in self._tasks_of(fetch)]
        with self.changed:
            self._tasks = deque([*tasks, *self._tasks] if first else [*self._tasks, *tasks])
            self.changed.notify_all()

    def work(self, is_over: Callable[[], bool]) -> None:
        """Fetch until it is over. Raises Stopped, DownloadError, OSError."""
        with Wire(self.options.patience) as wire:
            while task := self._take(is_over):
                try:
                    self._fetch(task, wire)
                except _RangeIgnored:
                    self._fetch_whole(task.fetch)
                finally:
                    with self.changed:
                        self._running -= 1
                        self.changed.notify_all()

    def _take(self, is_over: Callable[[], bool]) -> Task | None:
        def may_go_on() -> bool:
            # Stays while files are unfinished: a wrong hash brings their ranges back.
            return bool(self._tasks and self._running < self._allowed) or self.stopped.is_set() or is_over()

        with self.changed:
            self.changed.wait_for(may_go_on)
            if not self._tasks or self.stopped.is_set():
                return None
            self._running += 1
            task = self._tasks.popleft()
            if self._allowed < self.options.connections and not task.is_whole:
                # Short ranges keep what arrives close to what is being hashed.
                middle = min(task.begin + _FAST_RANGE_BYTES, task.end)
                if middle < task.end:
                    self._tasks.appendleft(replace(task, begin=middle))
                    task = replace(task, end=middle)
            return task

    def _widen(self) -> None:
        """Allow more requests at the same time: we wait for the network."""
        with self.changed:
            self._allowed = min(2 * self._allowed, self.options.connections)
            self._num_reads = self._num_small = 0
            self.changed.notify_all()

    def _count(self, num_bytes: int, asked: int) -> None:
        """Look at how much was there to be read."""
        self._num_reads += 1
        self._num_small += num_bytes < min(asked, _SMALL_BYTES)
        if self._num_reads >= _LOOK_AT_READS:
            if 2 * self._num_small > self._num_reads:
                self._widen()
            self._num_reads = self._num_small = 0

    def _tasks_of(self, fetch: Fetch) -> Iterator[Task]:
        if fetch.ranges_ignored:
            yield Task(fetch, 0, fetch.file.size_bytes, is_whole=True)
            return
        step = self.options.range_bytes
        for begin, end in fetch.partial.missing():
            for start in range(begin, end, step):
                yield Task(fetch, start, min(start + step, end))

    def _fetch_whole(self, fetch: Fetch) -> None:
        """Once per file, by whoever notices first, in place of all of its ranges."""
        with self.changed:
            if fetch.ranges_ignored:
                return
            fetch.ranges_ignored = True
            self._tasks = deque(task for task in self._tasks if task.fetch is not fetch)
        self.add([fetch], first=True)

    def _fetch(self, task: Task, wire: Wire) -> None:
        fetch, position, failures = task.fetch, task.begin, 0
        while position < task.end:
            try:
                for chunk in self._receive(task, position, wire):
                    if not task.is_whole:
                        fetch.partial.store(position, chunk)
                        self.recent.add(fetch, position, chunk)  # before it counts: then it may be read back instead
                        fetch.partial.count(position, position + len(chunk))
                        failures = 0
                    elif fetch.partial.write_missing(position, chunk):
                        failures = 0  # one that starts over each time gets nowhere
                    position += len(chunk)
                    self._sleep(self.pace.delay_s(len(chunk)))
                if position < task.end:
                    raise TryAgain(f"{fetch.file.path} ended after {position:,} of {task.end:,} bytes")
            except TryAgain as error:
                failures += 1
                self._back_off(task, error, failures)
                if task.is_whole:
                    position = task.begin
        with self.changed:
            self.changed.notify_all()

    def _receive(self, task: Task, begin: int, wire: Wire) -> Iterator[bytes]:
        """The bytes of one request, from ``begin``; they may end early, never late."""
        fetch = task.fetch
        self._sleep(self.pace.resume_s - time.monotonic())
        location = fetch.location
        asked = {} if task.is_whole else {"Range": f"bytes={begin}-{task.end - 1}"}

        def headers_for(url: httpx.URL) -> Mapping[str, str]:
            return {**self.hub.headers, **asked} if self._is_hub(url) else asked

        start_s = time.monotonic()
        answer = wire.get(location or self.hub.url(self.listing, fetch.file.path), headers_for)
        if self._allowed < self.options.connections and time.monotonic() - start_s > _FAR_S:
            self._widen()
        is_elsewhere = not self._is_hub(answer.url)
        if is_elsewhere and answer.status_code in (401, 403, 404, 410):
            fetch.location = None  # a signed address that has expired
            raise TryAgain(f"{answer.url.host} no longer serves {fetch.file.path}")
        self._check(answer, task, begin)
        fetch.location = str(answer.url) if is_elsewhere else None
        wanted = task.end - begin
        while wanted:
            self._check_running()
            asked_bytes = min(wanted, self._chunk_bytes)
            chunk = answer.read(asked_bytes)
            if not chunk:
                return
            if self._allowed < self.options.connections:
                self._count(len(chunk), asked_bytes)
            wanted -= len(chunk)
            yield chunk
        if answer.read(1):
            raise self._has_changed(fetch, "more bytes")

    @property
    def _chunk_bytes(self) -> int:
        limit = self.options.limit_bytes_per_s
        return _CHUNK_BYTES if limit is None else max(min(_CHUNK_BYTES, limit // 10), 1)

    def _is_hub(self, url: httpx.URL) -> bool:
        """Whether it is the hub itself, which alone is shown the token."""
        import httpx

        hub = httpx.URL(self.hub.url(self.listing, ""))
        is_upgrade = (hub.scheme, hub.port, url.scheme, url.port) == ("http", None, "https", None)
        return url.host == hub.host and (is_upgrade or (url.scheme, url.port) == (hub.scheme, hub.port))

    def _check(self, answer: Answer, task: Task, begin: int) -> None:
        """Raise unless the answer is the part, or the whole, that was asked for."""
        fetch, size, status = task.fetch, task.fetch.file.size_bytes, answer.status_code
        if status == 416:
            raise self._has_changed(fetch, "fewer bytes")
        what = f"{self.listing.repo_id}/{fetch.file.path}"
        check_status(
            answer,
            what,
            has_token=bool(self.hub.headers),
            page=self.hub.page(self.listing.repo_id),
            token_variable=self.hub.token_variable,
        )
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise TryAgain(f"{answer.url.host} sends {what} compressed, which was not asked for")
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != begin:
                raise TryAgain(f"{answer.url.host} sends another part of {what} than was asked for")
            if int(found[3]) != size:
                raise self._has_changed(fetch, f"{int(found[3]):,} bytes")
            return
        length = answer.headers.get("Content-Length", str(size))
        if length != str(size):
            raise self._has_changed(fetch, f"{length[:20]} bytes")
        if not task.is_whole:
            raise _RangeIgnored

    def _has_changed(self, fetch: Fetch, found: str) -> DownloadError:
        return DownloadError(
            f"{fetch.file.path} of {self.listing.repo_id} was listed with {fetch.file.size_bytes:,} bytes and is "
            f"served with {found}: {self.listing.revision} has moved or the hub is damaged; run the command again"
        )

    def _back_off(self, task: Task, error: Exception, failures: int) -> None:
        """Wait after the ``failures``-th in a row, or give up."""
        if failures >= self.options.patience.attempts:
            raise DownloadError(
                f"{explain(error)} (tried {failures} times for {task.fetch.file.path}); what has arrived is kept: "
                "run the same command again to go on"
            ) from error
        wait_s = wait_before(failures - 1, error, self.options.patience)
        if isinstance(error, TryAgain) and error.wait_s:  # the server wants less from all of us
            self.pace.resume_s = max(self.pace.resume_s, time.monotonic() + wait_s)
        self._sleep(wait_s)

    def _sleep(self, wait_s: float) -> None:
        if wait_s > 0:
            self.stopped.wait(wait_s)
        self._check_running()

    def _check_running(self) -> None:
        if self.stopped.is_set():
            raise Stopped
