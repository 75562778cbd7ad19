"""The server as a process: the port opens at once, the model loads behind it, signals drain it.

A first SIGTERM or SIGINT lets running answers end and takes no new requests; a second one ends at once. With
``follow_stdin`` the end of stdin counts as a SIGTERM: the parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

from glmlocal.errors import ConfigError, GlmlocalError
from glmlocal.server.connections import DEFAULT_LIMITS, Limits, allow_files, server_config
from glmlocal.server.guard import printable
from glmlocal.server.loading import Loader
from glmlocal.server.model import ServerState

T = TypeVar("T")
log = logging.getLogger("glmlocal.server")
EXIT_LOAD_ERROR, EXIT_INTERRUPTED = 1, 130
_CLOSE_S = 120.0  # what the engine gets to end its step and write conversations to disk


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the server listens and how it behaves as a process."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    certificate_key: Path | None = None
    announce: bool = False  # one JSON line on stdout; ends with stdin; stays up when loading fails
    limits: Limits = DEFAULT_LIMITS

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def serve(app: ASGIApp, state: ServerState, loader: Loader, listen: Listen) -> int:
    """Run until a signal, or an error while loading; returns the exit code. Raises ConfigError for a port in use."""
    allow_files(listen.limits)
    process = _Process(app, state, loader, listen)
    sock = _bind(listen)
    host, port = sock.getsockname()[:2]
    url = f"{listen.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    if listen.announce:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
    log.info("listening on %s; loading %s", url, printable(state.model_name))
    with contextlib.closing(sock):
        return asyncio.run(process.run(sock))


def _bind(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((listen.host, listen.port))
        sock.listen(listen.limits.most)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {listen.host} port {listen.port}: {reason}; give another --port (0: any free one)"
        ) from error
    return sock


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals, which would raise them again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    def __init__(self, app: ASGIApp, state: ServerState, loader: Loader, listen: Listen) -> None:
        self._state, self._loader, self._listen = state, loader, listen
        config = server_config(app, listen.limits, listen.certificate, listen.certificate_key)
        try:
            config.load()
        except OSError as error:  # TLS files: missing, or no certificate
            raise ConfigError(f"the TLS files cannot be used: {error}") from error
        self._server = _Server(config)
        self._exit_code = 0
        self._is_closing = False  # no connection is left; the engine ends

    async def run(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._listen.announce:
            threading.Thread(target=_wait_for_end_of_stdin, args=(loop, self._stop), daemon=True).start()
        loading = asyncio.create_task(self._load())
        try:
            await self._server.serve(sockets=[sock])
        finally:
            if self._server.force_exit:
                _exit_now(self._exit_code)
            self._is_closing = True
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await self._close_engine()
        return self._exit_code

    async def _load(self) -> None:
        try:
            start = await _on_daemon_thread(lambda: self._loader(self._state.progress))
            self._state.model = await start()
            log.info("%s answers", printable(self._state.model_name))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._state.error = _load_error(error)
            log.error("%s", printable(self._state.error, 1000), exc_info=not isinstance(error, GlmlocalError))
            if not self._listen.announce:
                self._exit_code = EXIT_LOAD_ERROR
                self._stop()

    def _on_signal(self, number: int) -> None:
        if self._is_closing:
            _exit_now(self._exit_code)
        if self._server.should_exit:
            self._server.force_exit = True
            return
        log.info("stopping: running answers end first; a second signal stops at once")
        if number == signal.SIGINT:
            self._exit_code = EXIT_INTERRUPTED
        self._stop()

    def _stop(self) -> None:
        self._server.should_exit = True

    async def _close_engine(self) -> None:
        if self._state.model is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._state.model.client.aclose()


def _load_error(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory while loading; give a smaller --context, or take a smaller model"
    if isinstance(error, GlmlocalError | OSError):
        return " ".join(str(error).split())
    return f"internal error while loading: {type(error).__name__}: {error}"


async def _on_daemon_thread(work: Callable[[], T]) -> T:
    """Like ``asyncio.to_thread``, but a process that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await future


def _wait_for_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(stop)


def _exit_now(code: int) -> None:
    """Without waiting for threads: a step of the engine may take long, and nobody waits for its result."""
    sys.stderr.flush()
    os._exit(code or 143)
