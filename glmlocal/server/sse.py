"""Server-sent events: a response that ends with its reader, and keeps the line alive while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger("glmlocal.server")
T = TypeVar("T")
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One event without a name, as OpenAI's chat API sends them."""
    return b"data: " + _dumps(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """One named event, as Anthropic's and OpenAI's Responses APIs send them."""
    return b"event: " + name.encode() + b"\ndata: " + _dumps(value) + b"\n\n"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class ReaderTooSlow(Exception):
    """The client did not take what was written for a whole while."""


class EventStream(Response):
    """Sends ``events`` as they come. When the client goes away, or does not read, the iterator is closed.

    ``ping`` is sent whenever nothing else was for ``ping_s``. A write that the client does not take within
    ``write_timeout_s`` ends the stream: what waits for a slow reader is bounded by the socket's buffer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        ping: bytes = PING,
        ping_s: float = 5.0,
        write_timeout_s: float = 60.0,
        headers: dict[str, str] | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``on_close`` runs at the end even if ``events`` was never begun, whose own clean-up then does not run."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._ping, self._ping_s, self._write_timeout_s = events, ping, ping_s, write_timeout_s
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in with_pings(self._events, self._ping, self._ping_s):
                await self._write(send, chunk, more=True)
            await self._write(send, b"", more=False)

        try:
            await until_gone(receive, stream())
        except ClientGone:
            pass
        except ReaderTooSlow:
            log.warning("a client did not read for %g s; its stream was ended", self._write_timeout_s)
            raise
        finally:
            await aclose(self._events)
            if self._on_close is not None:
                await self._on_close()

    async def _write(self, send: Send, chunk: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError:
            raise ReaderTooSlow from None


async def with_pings(events: AsyncIterator[bytes], ping: bytes, ping_s: float) -> AsyncIterator[bytes]:
    """The events, with a ping wherever none comes for ``ping_s``."""
    while True:
        following = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait((following,), timeout=ping_s))[0]:
                yield ping
            chunk = following.result()
        finally:
            if not following.done():
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
        if chunk is None:
            return
        yield chunk


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled as soon as the client disconnects. Raises ClientGone then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def aclose(events: AsyncIterator[Any]) -> None:
    """Close an async generator; other iterators have nothing to close."""
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()
