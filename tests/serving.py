"""The real app behind a real socket, in a thread of the test, over the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

import scripted
from glmlocal.server.app import create_app
from glmlocal.server.connections import DEFAULT_LIMITS, Limits, server_config
from glmlocal.server.context import StreamTimes
from glmlocal.server.guard import Door
from glmlocal.server.model import ServerState


@dataclass
class Running:
    """A server that answers. ``client`` is looked at, not touched: it belongs to the server's thread."""

    url: str
    client: scripted.ScriptedClient
    state: ServerState
    http: httpx.Client
    server: uvicorn.Server

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, text: str, **fields: Any) -> Any:
        answer = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def wait(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    script: scripted.Script = scripted.echo,
    form: str = "b",
    *,
    door: Door | None = None,
    times: StreamTimes | None = None,
    limits: Limits = DEFAULT_LIMITS,
    names: Sequence[str] = ("glm",),
    context: int = 1 << 17,
    **options: Any,
) -> Iterator[Running]:
    state = ServerState("scripted", tuple(names))
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    config = server_config(create_app(state, door, times), limits)
    server = uvicorn.Server(config)
    clients: list[scripted.ScriptedClient] = []

    async def serve() -> None:
        clients.append(scripted.ScriptedClient(script, context=context, **options))
        state.model = scripted.served_model(form, clients[0], context)
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            yield Running(url, clients[0], state, http, server)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def events(text: str) -> list[tuple[str | None, Any]]:
    """Server-sent events: (name or None, JSON or the text after data:). Comments are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        fields = dict(line.split(": ", 1) for line in lines)
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found
