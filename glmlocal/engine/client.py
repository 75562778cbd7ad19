"""EngineClient: the seam between asyncio and the one thread that runs the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from glmlocal.engine.engine import Engine
from glmlocal.engine.grammar import Constraint
from glmlocal.engine.kv_store import KVStore, KVStoreOptions
from glmlocal.engine.request import FinishReason, Request, RequestOutput
from glmlocal.engine.stats import EngineStats
from glmlocal.engine.stream import OutputStream
from glmlocal.errors import EngineError, GlmlocalError, QueueFull, RequestError

log = logging.getLogger(__name__)

POLL_S = 0.005  # how soon blocks that came from the disk are noticed when nothing else runs
RETRY_S = (1.0, 120.0)  # bounds of what a refused client is told
Delivery = tuple[str, RequestOutput | GlmlocalError]  # request id and what its reader sees next


class EngineClient(Protocol):
    """What the server, the commands and their tests hold: requests in, outputs out."""

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Queue a request. Raises RequestError (it can never run) or QueueFull here; what takes a while to find out,
        such as a grammar that does not compile, is raised by the first ``anext``. EngineError: a fault of ours."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request within a step; one that is unknown or over is left alone. Its stream ends with ABORT."""
        ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How many requests wait before others are refused (a client that gives an id may use half the places), and where
    conversations are kept on disk, if they are."""

    max_waiting: int = 64
    kv_store: KVStoreOptions | None = None


class LocalEngineClient:
    """An engine on a thread of its own. Methods are for the event loop that started it, ``stats`` for any thread.

    The client owns the engine from ``start`` to ``aclose``: nobody else may step it. It sleeps when nothing is to do.
    """

    def __init__(self, engine: Engine, options: ClientOptions = ClientOptions()) -> None:
        self.engine, self.options = engine, options
        self._wake = threading.Condition()  # guards the two below
        self._commands: deque[Callable[[], Iterable[Delivery]]] = deque()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._store: KVStore | None = None
        self._live: dict[str, _Live] = {}  # queued, compiling and running requests
        self._durations_s: deque[float] = deque(maxlen=32)  # of requests that ended, queueing included
        self._ended: Counter[FinishReason] = Counter()
        self._num_submitted = self._num_refused = 0

    async def start(self) -> None:
        """Start the engine's thread. Raises ConfigError for a KV directory that cannot be used."""
        if self._thread is not None:
            raise EngineError("the engine client was started already")
        if self.options.kv_store is not None:
            self._store = await asyncio.to_thread(KVStore, self.options.kv_store, self.engine.runner.kv_cache)
            scheduler = self.engine.scheduler
            scheduler.store, scheduler.min_stored_tokens = self._store, self.options.kv_store.min_tokens
            scheduler.block_pool.on_evict = self._store.save
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Abort what runs and end the thread; streams end with ABORT. Long conversations are
        written to disk where that was asked for, and what was learned of the routing. Closing twice is allowed."""
        for request_id in tuple(self._live):
            self.abort(request_id)
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        store, self._store = self._store, None
        if store is not None:
            await asyncio.to_thread(store.close, self.engine.scheduler.block_pool)
            self.engine.scheduler.store = self.engine.scheduler.block_pool.on_evict = None
        if self._thread is not None:
            await asyncio.to_thread(self.engine.offloads.close)

    def submit(self, request: Request) -> OutputStream:
        """See EngineClient. The engine starts on it at once, whether the stream is read or not."""
        if self._loop is None or self._is_closing:
            raise EngineError("the engine is not running; try again when the server is up")
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is already in use")
        self.engine.check(request)
        self._check_room(request.client_id)
        stream = OutputStream(request.request_id, self._loop, self.abort)
        live = _Live(weakref.ref(stream), request.client_id)
        self._live[request.request_id] = live
        self._num_submitted += 1
        if request.params.grammar is None:
            self._send(lambda: self._add(request, None))
        else:
            live.compiling = self._loop.create_task(self._compile(request))
        return stream

    def abort(self, request_id: str) -> None:
        """See EngineClient."""
        live = self._live.get(request_id)
        if live is None:
            return
        if live.compiling is not None:
            live.compiling.cancel()
        self.engine.interrupt(request_id)
        self._send(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        """One look at the engine; numbers of one step may be mixed with those of the next."""
        scheduler, rates = self.engine.scheduler, self.engine.rates
        pool, counters, speed = scheduler.block_pool, scheduler.counters, rates.rates()
        num_running = len(scheduler.running)
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, len(self._live) - num_running),
            max_batch=scheduler.max_batch,
            max_waiting=self.options.max_waiting,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            kv_used_tokens=(pool.num_blocks - pool.num_free_blocks) * pool.block_size,
            kv_cached_tokens=pool.num_cached_blocks * pool.block_size,
            kv_capacity_tokens=pool.num_blocks * pool.block_size,
            prefix_queried_tokens=counters.num_queried_tokens,
            prefix_hit_tokens=counters.num_hit_tokens,
            num_submitted=self._num_submitted,
            num_finished=self._ended[FinishReason.STOP] + self._ended[FinishReason.LENGTH],
            num_aborted=self._ended[FinishReason.ABORT],
            num_failed=self._ended[FinishReason.ERROR],
            num_refused=self._num_refused,
            num_preempted=counters.num_preempted,
            num_prefilled_tokens=rates.num_prefilled_tokens,
            num_decoded_tokens=rates.num_decoded_tokens,
            snapshots=None if (store := self._store) is None else store.stats(),
            offload=self.engine.offloads.stats(),
        )

    # --- on the event loop's thread

    def _check_room(self, client_id: str) -> None:
        """Raises QueueFull."""
        limit, max_batch = self.options.max_waiting, self.engine.scheduler.max_batch
        num_waiting = max(0, len(self._live) - max_batch)
        mine = sum(live.client_id == client_id for live in self._live.values()) if client_id else 0
        if num_waiting >= limit:
            reason = f"{num_waiting} requests wait already"
        elif mine >= max_batch + max(1, limit // 2):
            reason = f"{mine} requests of this client wait or run already"
        else:
            return
        self._num_refused += 1
        retry_after_s = self._retry_after_s()
        raise QueueFull(f"the queue is full: {reason}; try again in {retry_after_s:.0f} s", retry_after_s)

    def _retry_after_s(self) -> float:
        """When the next request should end, going by how long the last ones took."""
        if not self._durations_s:
            return 5.0
        mean_s = sum(self._durations_s) / len(self._durations_s)
        return min(max(mean_s / self.engine.scheduler.max_batch, RETRY_S[0]), RETRY_S[1])

    async def _compile(self, request: Request) -> None:
        """A grammar may take a while; neither the loop nor the engine waits for it."""
        try:
            constraint = await asyncio.to_thread(self.engine.constraint_for, request)
        except GlmlocalError as error:
            self._arrive([(request.request_id, error)])
        except Exception as error:
            log.exception("compiling a grammar failed")
            self._arrive([(request.request_id, EngineError(f"compiling the grammar failed: {error}"))])
        else:
            self._send(lambda: self._add(request, constraint))
        finally:
            if (live := self._live.get(request.request_id)) is not None:
                live.compiling = None

    def _send(self, command: Callable[[], Iterable[Delivery]]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _arrive(self, deliveries: Iterable[Delivery]) -> None:
        for request_id, item in deliveries:
            live = self._live.get(request_id)
            if live is None:
                continue  # it has ended already
            reason = FinishReason.ERROR if isinstance(item, GlmlocalError) else item.finish_reason
            if reason is not None:
                del self._live[request_id]
                self._ended[reason] += 1
                self._durations_s.append(time.perf_counter() - live.start_s)
            if (stream := live.stream()) is not None:
                stream.push(item)

    # --- on the engine's thread

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            with self._wake:
                while not (self._commands or self._is_closing or self.engine.has_work):
                    self._wake.wait()
                commands = tuple(self._commands)
                self._commands.clear()
                is_closing = self._is_closing
            deliveries = [item for command in commands for item in self._guarded(command)]
            if not is_closing:
                deliveries += self._guarded(self._step)
            if deliveries:
                self._deliver(deliveries)
            elif not is_closing:  # interrupted, or blocks are on their way from the disk
                with self._wake:
                    if not self._commands:
                        self._wake.wait(POLL_S)

    def _guarded(self, command: Callable[[], Iterable[Delivery]]) -> list[Delivery]:
        """A bug must not end the thread: it fails every request, and the next ones find an empty engine."""
        try:
            return list(command())
        except Exception as error:
            log.exception("the engine failed")
            outputs = self.engine.fail_all(f"the engine failed: {error or type(error).__name__}")
            return [_delivery(output) for output in outputs]

    def _add(self, request: Request, constraint: Constraint | None) -> Iterable[Delivery]:
        try:
            self.engine.add(request, constraint)
        except GlmlocalError as error:
            return [(request.request_id, error)]
        return ()

    def _abort(self, request_id: str) -> Iterable[Delivery]:
        output = self.engine.abort(request_id)
        # Not there: it was compiling, or it has ended and this comes too late to be heard.
        return [(request_id, output or RequestOutput(request_id, (), 0, 0, FinishReason.ABORT))]

    def _step(self) -> Iterable[Delivery]:
        return [_delivery(output) for output in self.engine.step()]

    def _deliver(self, deliveries: list[Delivery]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._arrive, deliveries)


@dataclass(slots=True)
class _Live:
    """A request that has not ended. A stream that its reader dropped must go, so it is not kept alive from here."""

    stream: weakref.ref[OutputStream]
    client_id: str
    start_s: float = field(default_factory=time.perf_counter)
    compiling: asyncio.Task[None] | None = None


def _delivery(output: RequestOutput) -> Delivery:
    if output.finish_reason is FinishReason.ERROR:
        return output.request_id, EngineError(output.error or "computing the answer failed")
    return output.request_id, output
