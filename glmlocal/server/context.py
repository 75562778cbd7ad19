"""What every endpoint shares: the state, the counters, and how streams are sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from starlette.requests import Request

from glmlocal.server import sse
from glmlocal.server.metrics import Metrics
from glmlocal.server.model import ServerState
from glmlocal.server.response_store import ResponseStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """Seconds. ``ping_s``: silence after which a ping is sent; ``write_s``: what a slow reader gets."""

    ping_s: float = 5.0
    write_s: float = 60.0


class Stoppable(Protocol):
    """Something that runs in the engine until it is stopped."""

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ServerContext:
    state: ServerState
    metrics: Metrics
    times: StreamTimes = field(default_factory=StreamTimes)
    responses: ResponseStore = field(default_factory=ResponseStore)

    def stream(
        self,
        events: AsyncIterator[bytes],
        generation: Stoppable,
        headers: Mapping[str, str],
        ping: bytes = sse.PING,
    ) -> sse.EventStream:
        """``events`` of a generation, which ends with the response."""
        return sse.EventStream(
            events,
            ping=ping,
            ping_s=self.times.ping_s,
            write_timeout_s=self.times.write_s,
            headers=dict(headers),
            on_close=generation.stop,
        )

    async def collected(self, work: Awaitable[T], generation: Stoppable, request: Request) -> T:
        """The result of a request that is not streamed; ends when its client goes away. Raises ClientGone then."""
        try:
            return await sse.until_gone(request.receive, work)
        finally:
            await generation.stop()
