"""Connections that keep nobody waiting: bounded in number, in the time for headers, and in the time to be closed.

uvicorn bounds none of the three: a client that connects and says nothing, or that never reads, would keep its socket
for ever, and beyond its limit uvicorn answers in plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from glmlocal.server.errors import ApiError, error_body, speaks_anthropic

_SPARE_FILES = 512  # descriptors for everything that is no connection
_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Of connections. Beyond ``most`` a request is answered 503; beyond twice as many nothing is."""

    most: int = 1024
    headers_s: float = 30.0  # from the connection, or from a request's first byte, to the end of its headers
    idle_s: int = 75  # between requests
    close_s: float = 10.0  # to take what was written before the end


DEFAULT_LIMITS = Limits()


def server_config(app: ASGIApp, limits: Limits, certificate: Path | None = None, key: Path | None = None) -> Any:
    """uvicorn's Config for ``app``."""
    return uvicorn.Config(
        app,
        http=_protocol(limits),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=limits.idle_s,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def allow_files(limits: Limits) -> None:
    """Raise this process's limit of open files, as far as it may, to what the connections can need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limits.most + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class _Transport:
    """A transport whose ``close`` does not wait for ever for a peer that takes nothing."""

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop, close_s: float) -> None:
        self._inner, self._loop, self._close_s = inner, loop, close_s
        self.closing: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def close(self) -> None:
        self._inner.close()
        if self.closing is None:
            self.closing = self._loop.call_later(self._close_s, self._inner.abort)


def _protocol(limits: Limits) -> type[H11Protocol]:
    class Connection(H11Protocol):
        _headers_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_Transport(transport, self.loop, limits.close_s))  # type: ignore[arg-type]
            if len(self.connections) > 2 * limits.most:
                transport.abort()
            elif len(self.connections) > limits.most:
                self.app = _too_many
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._headers_timer is None:
                self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)
            if (closing := getattr(self.transport, "closing", None)) is not None:
                closing.cancel()

        def _wait_for_headers(self) -> None:
            self._headers_timer = self.loop.call_later(limits.headers_s, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None

    return Connection


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(503, f"too many connections are open; close some, or try again in {_RETRY_S} s", code="busy")
    body = json.dumps(error_body(error, anthropic=speaks_anthropic(scope["path"]))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", str(_RETRY_S).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
