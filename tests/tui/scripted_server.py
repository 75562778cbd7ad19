"""A chat server that says what a test wrote down: real sockets and SSE, delays on demand, nothing of glmlocal in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

GATE = object()  # a step: wait until the test opens the gate
CLOSE = object()  # a step: cut the connection


@dataclass
class Refusal:
    """Instead of a stream: an HTTP status with OpenAI's error object."""

    status: int
    message: str
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    """Instead of anything that a chat server says: these bytes."""

    body: bytes
    kind: str = "application/json"
    status: int = 200


def text(content: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}]}


def think(reasoning: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"reasoning_content": reasoning, "reasoning": reasoning}}]}


def tool(index: int, name: str, arguments: str) -> dict[str, Any]:
    call = {"index": index, "id": f"call_{index}", "function": {"name": name, "arguments": arguments}}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}


def progress(done: int, total: int) -> dict[str, Any]:
    return {"choices": [], "prefill_progress": {"done_tokens": done, "total_tokens": total}}


def finish(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(
    prompt: int = 12, completion: int = 34, cached: int = 8, rate: float = 20.0, first: float = 0.5
) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "timings": {"time_to_first_token_s": first, "decode_tokens_per_s": rate},
    }


def says(*parts: str) -> list[Any]:
    """A whole answer in these pieces."""
    return [*(text(part) for part in parts), finish(), usage()]


def stats(state: str = "ready", **changes: Any) -> dict[str, Any]:
    """What glmlocal's server answers; ``changes`` replace whole sections."""
    gib = 1 << 30
    return {
        "state": state,
        "error": None,
        "model": {"name": "GLM-4.5-Air", "served_names": ["GLM-4.5-Air"], "context": 32768, "quant": "int4",
                  "kv_dtype": "fp8", "mtp_drafts": 1, "supports_thinking": True, "supports_tools": True},
        "loading": None,
        "plan": {"devices": [
            {"name": "NVIDIA RTX 4090", "kind": "gpu", "capacity_bytes": 24 * gib, "used_bytes": 21 * gib,
             "lines": [{"what": "hot experts", "bytes": 14 * gib, "basis": "exact"},
                       {"what": "attention", "bytes": 5 * gib, "basis": "exact"}]},
            {"name": "RAM", "kind": "ram", "capacity_bytes": 64 * gib, "used_bytes": 48 * gib,
             "lines": [{"what": "experts", "bytes": 47 * gib, "basis": "exact"}]},
            {"name": "NVMe", "kind": "nvme", "capacity_bytes": 1000 * gib, "used_bytes": 60 * gib, "lines": []},
        ]},
        "queue": {"running": 0, "waiting": 0, "max_batch": 8, "max_waiting": 64},
        "speed": {"decode_tokens_per_s": 0.0, "prefill_tokens_per_s": 0.0},
        "kv": {"used_tokens": 4096, "capacity_tokens": 65536},
        "prefix_cache": {"queried_tokens": 1000, "hit_tokens": 750},
        "tiers": [{"tier": "gpu", "lookups": 100, "hits": 71, "hit_rate": 0.71},
                  {"tier": "ram", "lookups": 29, "hits": 27, "hit_rate": 0.93}],
        "nvme": {"read_bytes": 10**9, "read_bytes_per_s": 512e6, "read_bytes_per_token": 3 * 2**20, "stall_s": 1.5},
        "mtp": {"drafted": 1200, "accepted": 900, "acceptance": 0.75},
        "memory": {"rss_bytes": 49 * gib},
        "uptime_s": 100.0,
        **changes,
    }  # fmt: skip


class ScriptedServer:
    """``script(*answers)`` queues answers; each request takes one, the last one stays. Runs in a thread of its own."""

    def __init__(
        self, *, stats: dict[str, Any] | None = None, key: str = "", models: Sequence[str] = ("GLM-4.5-Air",)
    ) -> None:
        self.stats, self.key, self.models = stats, key, list(models)
        self.pages: dict[str, Page] = {}  # by path: what stands there instead
        self.paths: list[str] = []  # of all requests
        self.refused: set[str] = set()  # fields of a request for an answer that are answered with 400
        self.requests: list[dict[str, Any]] = []
        self.aborted = threading.Event()  # the client went away in the middle of an answer
        self.asked_s: list[float] = []  # time.monotonic of each request for an answer
        self.sent_s: list[float] = []  # time.monotonic of each step that was sent
        self.step_s = 0.0  # pause before each step
        self._answers: list[Sequence[Any] | Refusal | Page] = [says("Hello.")]
        self._gate = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def script(self, *answers: Sequence[Any] | Refusal | Page) -> None:
        self._answers = list(answers)

    def open_gate(self) -> None:
        """Let one waiting (or the next) GATE step go on."""
        self._gate.set()

    def go_away(self) -> None:
        """Close the port and every connection."""
        self._call(self._close())

    def come_back(self) -> None:
        """Listen on the same port again."""
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n")[0].split(" ")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:])
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.paths.append(path)
            if path in self.pages:
                await self._page(writer, self.pages[path])
            elif self.key and headers.get("authorization") != f"Bearer {self.key}":
                await self._reply(writer, 401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
            elif (method, path) == ("GET", "/v1/stats") and self.stats is not None:
                await self._reply(writer, 200, self.stats)
            elif (method, path) == ("GET", "/v1/models"):
                await self._reply(writer, 200, {"data": [{"id": name} for name in self.models]})
            elif (method, path) == ("POST", "/v1/chat/completions"):
                self.asked_s.append(time.monotonic())
                self.requests.append(json.loads(body))
                odd = self.refused & set(self.requests[-1])
                if odd:
                    await self._reply(writer, 400, {"error": {"message": f"unknown field {min(odd)}"}})
                    continue
                await self._answer(reader, writer)
                return
            else:
                await self._reply(writer, 404, {"detail": "Not Found"})

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Refusal):
            error = {"error": {"message": answer.message, "code": answer.code}}
            await self._reply(writer, answer.status, error, answer.headers)
            return
        if isinstance(answer, Page):
            await self._page(writer, answer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: ping\n\n")
        gone = asyncio.ensure_future(reader.read(1))
        try:
            for step in answer:
                if step is GATE:
                    while not self._gate.is_set() and not gone.done():
                        await asyncio.sleep(0.005)
                    self._gate.clear()
                elif step is CLOSE:
                    writer.transport.abort()
                    return
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    if self.step_s:
                        await asyncio.sleep(self.step_s)
                    writer.write(b"data: " + json.dumps(step).encode() + b"\n\n")
                    await writer.drain()
                    self.sent_s.append(time.monotonic())
                if gone.done():
                    self.aborted.set()
                    return
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
        finally:
            gone.cancel()

    async def _page(self, writer: asyncio.StreamWriter, page: Page) -> None:
        head = f"HTTP/1.1 {page.status} X\r\nContent-Type: {page.kind}\r\nContent-Length: {len(page.body)}\r\n\r\n"
        writer.write(head.encode() + page.body)
        await writer.drain()

    async def _reply(
        self, writer: asyncio.StreamWriter, status: int, data: Any, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(data).encode()
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body)
        await writer.drain()


@contextlib.contextmanager
def scripted(**options: Any) -> Iterator[ScriptedServer]:
    server = ScriptedServer(**options)
    try:
        yield server
    finally:
        server.stop()
