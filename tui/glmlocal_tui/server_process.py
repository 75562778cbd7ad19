"""A server of our own: started as a child, found by the line it prints, ended with us.

The child's stdin is a pipe that we hold: when we are gone, whatever the reason, it reads the end of it and leaves too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Sequence
from typing import IO

from glmlocal_tui.cleaning import one_line

_PATIENCE_S = 5.0  # for a drain, then for SIGTERM, then SIGKILL


class StartError(Exception):
    """The child ended before it said where it listens; the text holds its last words."""


class ServerProcess:
    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._words: deque[str] = deque(maxlen=20)  # the last lines of its stderr
        self._reader: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self, log: IO[bytes] | None = None) -> str:
        """Start it; returns its URL once the port is open. Raises StartError."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl+C in our terminal is ours
            )
        except OSError as error:
            raise StartError(f"the server cannot be started: {error}") from None
        assert self._process.stdout is not None
        self._reader = asyncio.create_task(self._read_log(log))
        line = await self._process.stdout.readline()
        try:
            self.url = str(json.loads(line)["url"])
        except (ValueError, KeyError, TypeError):
            await self.stop(0.5)
            raise StartError(self.last_words() or "the server ended without a word") from None
        return self.url

    def again(self) -> ServerProcess:
        """The same command, not started yet."""
        return ServerProcess(self._command)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.returncode

    def last_words(self) -> str:
        """The last line that looks like an error, else the last line."""
        lines = [line for line in self._words if line]
        told = [line for line in lines if "error" in line.casefold()]
        return (told or lines or [""])[-1]

    async def stop(self, patience_s: float = _PATIENCE_S) -> None:
        """Close its stdin and wait; a child that stays is terminated, then killed."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        for push in (None, process.terminate, process.kill):
            if push is not None:
                with contextlib.suppress(ProcessLookupError):
                    push()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
                break
        if self._reader is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reader, 1.0)

    async def _read_log(self, log: IO[bytes] | None) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(4096):
            if log is not None:
                with contextlib.suppress(OSError, ValueError):
                    log.write(data)
                    log.flush()
            for line in data.decode("utf-8", "replace").splitlines():
                self._words.append(one_line(line, 1000))
