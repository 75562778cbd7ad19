"""The threads that fetch: ranges of files from one queue, tried again where that may help, written as they come."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.errors import DownloadError
from glmlocal.hub.http import DEFAULT_PATIENCE, Patience, TryAgain, check_status, explain, wait_before
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.partial import PartialFile
from glmlocal.hub.recent import BUFFER_BYTES, Recent
from glmlocal.hub.wire import Answer, Wire
from glmlocal.units import MIB

if TYPE_CHECKING:
    import httpx

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_WAITING = 0.5  # this part of the time, and more, for bytes: more requests may bring more
_LOOK_AT_S = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """How to download; the defaults suit a hub with a CDN."""

    connections: int = 8  # at most; as few as bring bytes as fast as they are stored and hashed
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
    recent: Recent | None = None  # once a thread hashes it
    num_running: int = 0  # requests


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

    def __init__(
        self,
        fetches: Sequence[Fetch],
        listing: Listing,
        hub: Hub,
        options: Options,
        changed: threading.Condition,
        num_hashed: int = 1,
    ) -> None:
        self.listing, self.hub, self.options, self.changed = listing, hub, options, changed
        self.pace = Pace(options.limit_bytes_per_s)
        self.stopped = threading.Event()
        self._tasks = {fetch: deque(self._tasks_of(fetch)) for fetch in fetches}
        self._num_hashed = num_hashed  # files at the same time
        self._allowed, self._running = 1, 0  # requests; one of each file that is being hashed is always allowed
        self._busy_s = self._network_s = 0.0  # of all threads, lately

    def add(self, fetch: Fetch) -> None:
        """Queue what is missing of a file."""
        with self.changed:
            self._tasks[fetch] = deque(self._tasks_of(fetch))
            self.changed.notify_all()

    def stop(self) -> None:
        """Have everybody end."""
        self.stopped.set()
        with self.changed:
            self.changed.notify_all()
        for fetch in self._tasks:
            if fetch.recent is not None:
                fetch.recent.tell()

    def work(self, is_over: Callable[[], bool]) -> None:
        """Fetch until it is over. Raises Stopped, DownloadError, OSError."""
        spare: memoryview | None = None
        with Wire(self.options.patience) as wire:
            while task := self._take(is_over):
                spare = spare or memoryview(bytearray(BUFFER_BYTES))  # many threads never have anything to do
                try:
                    self._fetch(task, wire, spare)
                except _RangeIgnored:
                    self._fetch_whole(task.fetch)
                finally:
                    with self.changed:
                        self._running -= 1
                        task.fetch.num_running -= 1
                        self.changed.notify_all()

    def _take(self, is_over: Callable[[], bool]) -> Task | None:
        with self.changed:
            # Stays while files are unfinished: a wrong hash brings their ranges back.
            self.changed.wait_for(lambda: self._next() or self.stopped.is_set() or is_over())
            fetch = self._next()
            if fetch is None or self.stopped.is_set():
                return None
            self._running += 1
            fetch.num_running += 1
            return self._tasks[fetch].popleft()

    def _next(self) -> Fetch | None:
        """The file that a request may be made for now."""
        # As long as one request is enough, what nobody hashes yet would only have to be read back later.
        waiting = [
            fetch for fetch, tasks in self._tasks.items() if tasks and (self._allowed > 1 or fetch.recent is not None)
        ]
        fetch = min(waiting[: self._num_hashed], key=lambda each: each.num_running, default=None)
        is_allowed = fetch is not None and (self._running < self._allowed or not fetch.num_running)
        return fetch if is_allowed else None

    def _count(self, busy_s: float, network_s: float) -> None:
        """Of the time that went into receiving, look at what the network was waited for: more requests may help."""
        with self.changed:
            self._busy_s += busy_s
            self._network_s += network_s
            if self._busy_s < _LOOK_AT_S:
                return
            if self._network_s > _WAITING * self._busy_s and self._allowed < self.options.connections:
                self._allowed = min(2 * self._allowed, self.options.connections)
                self.changed.notify_all()
            self._busy_s = self._network_s = 0.0

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
        self.add(fetch)

    def _fetch(self, task: Task, wire: Wire, spare: memoryview) -> None:
        position, failures = task.begin, 0
        while position < task.end:
            try:
                answer = self._ask(task, position, wire)
                while position < task.end:
                    num_bytes, is_new = self._receive(answer, task, position, spare)
                    failures = 0 if is_new else failures
                    position += num_bytes
                    self._sleep(self.pace.delay_s(num_bytes))
                if answer.read_into(spare[:1]):
                    raise self._has_changed(task.fetch, "more bytes")
            except TryAgain as error:
                failures += 1
                self._back_off(task, error, failures)
                if task.is_whole:
                    position = task.begin
        with self.changed:
            self.changed.notify_all()

    def _ask(self, task: Task, begin: int, wire: Wire) -> Answer:
        """The answer that has the bytes from ``begin`` to the task's end. Its body may end early."""
        fetch = task.fetch
        self._sleep(self.pace.resume_s - time.monotonic())
        location = fetch.location
        asked = {} if task.is_whole else {"Range": f"bytes={begin}-{task.end - 1}"}

        def headers_for(url: httpx.URL) -> Mapping[str, str]:
            return {**self.hub.headers, **asked} if self._is_hub(url) else asked

        start_s = time.monotonic()
        answer = wire.get(location or self.hub.url(self.listing, fetch.file.path), headers_for)
        asking_s = time.monotonic() - start_s
        self._count(asking_s, asking_s)
        is_elsewhere = not self._is_hub(answer.url)
        if is_elsewhere and answer.status_code in (401, 403, 404, 410):
            fetch.location = None  # a signed address that has expired
            raise TryAgain(f"{answer.url.host} no longer serves {fetch.file.path}")
        self._check(answer, task, begin)
        fetch.location = str(answer.url) if is_elsewhere else None
        return answer

    def _receive(self, answer: Answer, task: Task, position: int, spare: memoryview) -> tuple[int, bool]:
        """Store the next bytes of an answer; how many they are, and whether any of them was not there before."""
        self._check_running()
        fetch, recent = task.fetch, task.fetch.recent
        kept = None if recent is None or task.is_whole else recent.borrow(position)
        start_s, waited_s = time.monotonic(), answer.waited_s
        try:
            # Up to a multiple of the buffer's size: the page cache has larger pages for that.
            most = min(task.end - position, self._chunk_bytes, BUFFER_BYTES - position % BUFFER_BYTES)
            data = (spare if kept is None else kept)[:most]
            data = data[: answer.read_into(data)]
            if not data:
                raise TryAgain(f"{fetch.file.path} ended after {position:,} of {task.end:,} bytes")
            if task.is_whole:
                is_new = fetch.partial.write_missing(position, data)
            else:
                fetch.partial.store(position, data)
                is_new = True
        except BaseException:
            if recent is not None and kept is not None:
                recent.give_back(kept)
            raise
        if recent is not None and kept is not None:
            recent.keep(position, kept, len(data))  # before it counts: then it may be read back instead
        if not task.is_whole:
            fetch.partial.count(position, position + len(data))
        if kept is None and fetch.recent is not None:
            fetch.recent.tell()
        self._count(time.monotonic() - start_s, answer.waited_s - waited_s)
        return len(data), is_new

    @property
    def _chunk_bytes(self) -> int:
        limit = self.options.limit_bytes_per_s
        return BUFFER_BYTES if limit is None else max(min(BUFFER_BYTES, limit // 10), 1)

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
