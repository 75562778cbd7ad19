"""Files from a hub into its cache: in parallel, in ranges, hashed on the way, resumed where they stopped.

One queue of ranges over all files, in order; as many threads as there are connections take from it. One thread hashes
behind them, in order too, from the page cache. One thread keeps the disk busy behind both: it syncs what has arrived,
journals it, and puts a file in place when its hash is right. The calling thread reports. Nothing that the journal
vouches for is ever fetched again.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.errors import DownloadError
from glmlocal.hub.http import DEFAULT_PATIENCE, Patience, TryAgain, check_status, explain, new_client, wait_before
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.partial import PartialFile
from glmlocal.units import MIB

if TYPE_CHECKING:
    import httpx

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_READ_BYTES = 4 * MIB  # at a time, by the hasher
_LOOK_EVERY_S = 0.02
_GOODBYE_S = 2.0  # for threads that wait for the network; then they are left behind


@dataclass(frozen=True, slots=True)
class Options:
    """How to download; the defaults suit a hub with a CDN."""

    connections: int = 8
    range_bytes: int = 64 * MIB  # of one request
    commit_every_s: float = 1.0  # at most so much is fetched again after a kill
    commit_bytes: int = 64 * MIB  # not synced yet, of all files: the disk starts on them without waiting for the second
    report_every_s: float = 0.5
    limit_bytes_per_s: int | None = None
    patience: Patience = DEFAULT_PATIENCE


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is, for whoever shows it."""

    path: str
    done_bytes: int
    size_bytes: int
    is_complete: bool  # verified, on disk and in its place
    is_verified: bool = False  # every byte arrived and the hash is right; the disk may still be busy with it


OnProgress = Callable[[Sequence[Progress]], object]


class _Stopped(Exception):
    """Somebody else failed, or the user has had enough."""


class _RangeIgnored(Exception):
    """The server sent the whole file where a part was asked for."""


@dataclass(eq=False)
class _Fetch:
    """One file on its way. Its fields are changed under the download's lock."""

    file: HubFile
    partial: PartialFile
    target: Path
    location: str | None = None  # where the hub redirected to last time
    ranges_ignored: bool = False
    rehashed: bool = False  # the hash was wrong once
    verified: bool = False
    complete: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    fetch: _Fetch
    begin: int
    end: int
    is_whole: bool = False  # asked for without a range


@dataclass(eq=False)
class _Pace:
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


def download(
    fetches: Sequence[tuple[HubFile, PartialFile, Path]],
    listing: Listing,
    hub: Hub,
    options: Options = DEFAULTS,
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Bring every file to its target, verified. Raises DownloadError, or OSError when it cannot be stored.

    Whatever ends it, what has arrived is journalled, so that the next call goes on from there.
    """
    with new_client(options.patience, options.connections) as client:
        run = _Download(fetches, listing, hub, options, client)
        threads = [threading.Thread(target=run.work, daemon=True) for _ in range(options.connections)]
        threads += [threading.Thread(target=work, daemon=True) for work in (run.hash_files, run.sync_files)]
        for thread in threads:
            thread.start()
        try:
            while run.wait(options.report_every_s):
                on_progress(run.progress())
        except BaseException:
            run.stop(threads)
            with suppress(OSError):  # a full disk, again
                run.commit()
            raise
        finally:
            if run.stop(threads):
                run.close()
        on_progress(run.progress())


class _Download:
    """What the threads of one download share."""

    def __init__(
        self,
        fetches: Sequence[tuple[HubFile, PartialFile, Path]],
        listing: Listing,
        hub: Hub,
        options: Options,
        client: httpx.Client,
    ) -> None:
        self.listing, self.hub, self.options, self.client = listing, hub, options, client
        self.fetches = [_Fetch(*fetch) for fetch in fetches]
        self.changed = threading.Condition()
        self.tasks = deque(task for fetch in self.fetches for task in self._tasks(fetch))
        self.pace = _Pace(options.limit_bytes_per_s)
        self.error: BaseException | None = None
        self.stopped = threading.Event()

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

    def commit(self) -> None:
        for fetch in self.fetches:
            if not fetch.complete:
                fetch.partial.commit()

    def progress(self) -> list[Progress]:
        return [
            Progress(
                fetch.file.path,
                fetch.file.size_bytes if fetch.complete else sum(end - begin for begin, end in fetch.partial.written),
                fetch.file.size_bytes,
                fetch.complete,
                fetch.verified,
            )
            for fetch in self.fetches
        ]

    def stop(self, threads: Sequence[threading.Thread]) -> bool:
        """Have them end; whether they did."""
        self.stopped.set()
        with self.changed:
            self.changed.notify_all()
        deadline = time.monotonic() + _GOODBYE_S
        for thread in threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def close(self) -> None:
        for fetch in self.fetches:
            fetch.partial.close()

    # The threads that fetch

    def work(self) -> None:
        try:
            while task := self._take():
                try:
                    self._fetch(task)
                except _RangeIgnored:
                    self._fetch_whole(task.fetch)
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)

    def _take(self) -> _Task | None:
        with self.changed:
            # Stays while files are unfinished: a wrong hash brings their ranges back.
            self.changed.wait_for(lambda: self.tasks or self.stopped.is_set() or self._is_over())
            return self.tasks.popleft() if self.tasks and not self.stopped.is_set() else None

    def _tasks(self, fetch: _Fetch) -> Iterator[_Task]:
        if fetch.ranges_ignored:
            yield _Task(fetch, 0, fetch.file.size_bytes, is_whole=True)
            return
        step = self.options.range_bytes
        for begin, end in fetch.partial.missing():
            for start in range(begin, end, step):
                yield _Task(fetch, start, min(start + step, end))

    def _fetch_whole(self, fetch: _Fetch) -> None:
        """Once per file, by whoever notices first, in place of all of its ranges."""
        with self.changed:
            if fetch.ranges_ignored:
                return
            fetch.ranges_ignored = True
            self.tasks = deque(task for task in self.tasks if task.fetch is not fetch)
            self.tasks.extendleft(self._tasks(fetch))
            self.changed.notify_all()

    def _fetch(self, task: _Task) -> None:
        import httpx

        position, failures = task.begin, 0
        while position < task.end:
            try:
                for chunk in self._receive(task, position):
                    task.fetch.partial.write(position, chunk)
                    position += len(chunk)
                    failures = failures if task.is_whole else 0  # one that starts over each time gets nowhere
                    self._sleep(self.pace.delay_s(len(chunk)))
                if position < task.end:
                    raise TryAgain(f"{task.fetch.file.path} ended after {position:,} of {task.end:,} bytes")
            except (TryAgain, httpx.TransportError) as error:
                failures += 1
                self._back_off(task, error, failures)
                if task.is_whole:
                    position = task.begin
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise DownloadError(explain(error)) from error
        with self.changed:
            self.changed.notify_all()

    def _receive(self, task: _Task, begin: int) -> Iterator[bytes]:
        """The bytes of one request, from ``begin``; they may end early, never late."""
        fetch = task.fetch
        self._sleep(self.pace.resume_s - time.monotonic())
        location = fetch.location
        url = location or self.hub.url(self.listing, fetch.file.path)
        headers = {} if location else dict(self.hub.headers)  # nobody but the hub itself is shown the token
        if not task.is_whole:
            headers["Range"] = f"bytes={begin}-{task.end - 1}"
        with self.client.stream("GET", url, headers=headers) as response:
            is_elsewhere = bool(location) or (response.history and response.url.host != response.history[0].url.host)
            if is_elsewhere and response.status_code in (401, 403, 404, 410):
                fetch.location = None  # a signed address that has expired
                raise TryAgain(f"{response.url.host} no longer serves {fetch.file.path}")
            self._check(response, task, begin)
            fetch.location = str(response.url) if is_elsewhere else None
            wanted = task.end - begin
            for chunk in response.iter_raw():
                self._check_running()
                if len(chunk) > wanted:
                    raise self._has_changed(fetch, "more bytes")
                wanted -= len(chunk)
                yield chunk

    def _check(self, response: httpx.Response, task: _Task, begin: int) -> None:
        """Raise unless the answer is the part, or the whole, that was asked for."""
        fetch, size, status = task.fetch, task.fetch.file.size_bytes, response.status_code
        if status == 416:
            raise self._has_changed(fetch, "fewer bytes")
        what = f"{self.listing.repo_id}/{fetch.file.path}"
        check_status(
            response,
            what,
            has_token=bool(self.hub.headers),
            page=self.hub.page(self.listing.repo_id),
            token_variable=self.hub.token_variable,
        )
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != begin:
                raise TryAgain(f"{response.url.host} sends another part of {what} than was asked for")
            if int(found[3]) != size:
                raise self._has_changed(fetch, f"{int(found[3]):,} bytes")
            return
        length = response.headers.get("Content-Length", str(size))
        if length != str(size):
            raise self._has_changed(fetch, f"{length[:20]} bytes")
        if not task.is_whole:
            raise _RangeIgnored

    def _has_changed(self, fetch: _Fetch, found: str) -> DownloadError:
        return DownloadError(
            f"{fetch.file.path} of {self.listing.repo_id} was listed with {fetch.file.size_bytes:,} bytes and is "
            f"served with {found}: {self.listing.revision} has moved or the hub is damaged; run the command again"
        )

    def _back_off(self, task: _Task, error: Exception, failures: int) -> None:
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
            raise _Stopped

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
        self.stopped.set()

    # The thread that hashes

    def hash_files(self) -> None:
        try:
            buffer = bytearray(_READ_BYTES)
            for fetch in self.fetches:
                while not self._hash(fetch, buffer):
                    self._start_over(fetch)
                fetch.verified = True
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)

    def _hash(self, fetch: _Fetch, buffer: bytearray) -> bool:
        """Follow the file's bytes as they arrive; whether all of them together are what the hub said."""
        hasher, position, size = fetch.file.hasher(), 0, fetch.file.size_bytes
        while position < size:
            available = self._wait_for_bytes(fetch, position)
            while position < available:
                num_bytes = min(fetch.partial.read(position, buffer), available - position)
                hasher.update(memoryview(buffer)[:num_bytes])  # without the GIL
                position += num_bytes
                self._check_running()
        return hasher.hexdigest() == fetch.file.digest

    def _wait_for_bytes(self, fetch: _Fetch, position: int) -> int:
        """Where the bytes that are there without a hole end: a buffer full beyond ``position`` at least, or the end."""
        wanted = min(position + _READ_BYTES, fetch.file.size_bytes)
        while True:
            written = fetch.partial.written
            end = written[0][1] if written and written[0][0] == 0 else 0
            if end >= wanted:
                return end
            with self.changed:  # told of ranges, not of every chunk: that would cost more than looking now and then
                self.changed.wait(_LOOK_EVERY_S)
            self._check_running()

    def _start_over(self, fetch: _Fetch) -> None:
        """Fetch a file again whose hash is wrong: once, for what was damaged on the way or on this disk."""
        if fetch.rehashed:
            raise DownloadError(
                f"{fetch.file.path} of {self.listing.repo_id} arrived twice with another hash than the hub states "
                f"({fetch.file.digest[:16]}…): {self.listing.revision} has moved, or something on the way changes it; "
                "run the command again later, or use another hub (--hub)"
            )
        fetch.rehashed = True
        fetch.partial.start_over()
        with self.changed:
            fetch.location = None
            self.tasks.extendleft(reversed(list(self._tasks(fetch))))
            self.changed.notify_all()

    # The thread that syncs

    def sync_files(self) -> None:
        """Nobody else waits for the disk. A file gets its name when it is verified and its last byte is on disk."""
        try:
            while self._wait_to_sync():
                self.commit()
                for fetch in self.fetches:
                    if fetch.verified and not fetch.complete:
                        fetch.partial.finish(fetch.target)
                        with self.changed:
                            fetch.complete = True
                            self.changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _wait_to_sync(self) -> bool:
        """Until a commit is due or a file is verified; False when there is nothing left to do."""
        due_s = time.monotonic() + self.options.commit_every_s
        while not (self.stopped.is_set() or self._is_over()):
            unsynced = sum(fetch.partial.unsynced_bytes for fetch in self.fetches if not fetch.complete)
            is_verified = any(fetch.verified and not fetch.complete for fetch in self.fetches)
            if is_verified or unsynced >= self.options.commit_bytes or time.monotonic() >= due_s:
                return True
            self.stopped.wait(_LOOK_EVERY_S)
        return False
