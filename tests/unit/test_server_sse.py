"""Streams that nobody reads, that are silent, that end early: pings, slow readers, clean-up."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import scripted
from glmlocal.server import sse
from glmlocal.server.connections import Limits
from glmlocal.server.context import StreamTimes
from serving import Running, running

REQUEST = '{"messages": [{"role": "user", "content": "x"}], "stream": true}'


def long_answer(prompt: str, request: object) -> str:
    return "</think>" + "word " * 200_000


def raw_request(server: Running, body: str) -> socket.socket:
    """A connection with a small receive buffer on which a request was sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
    return connection


def test_a_slow_reader_is_cut_off_and_frees_its_place_and_its_socket() -> None:
    limits = Limits(close_s=0.2)
    with running(long_answer, times=StreamTimes(write_s=0.3), context=1 << 20, limits=limits) as server:
        with raw_request(server, REQUEST):
            server.wait(lambda: server.client.num_running == 1)
            server.wait(lambda: server.client.num_running == 0)  # though nothing was read
            server.wait(lambda: server.num_connections == 0)
        assert len(server.client.aborted) == 1
        assert server.metric("glmlocal_aborted_answers_total") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_frees_its_place(stream: bool) -> None:
    with running(long_answer, delay_s=0.001, context=1 << 20) as server:
        connection = raw_request(server, REQUEST if stream else REQUEST.replace("true", "false"))
        server.wait(lambda: server.client.num_running == 1)
        connection.close()
        server.wait(lambda: server.client.num_running == 0)
        assert len(server.client.aborted) == 1


def test_a_client_that_closes_while_it_waits_leaves_the_queue() -> None:
    with running(long_answer, delay_s=0.001, context=1 << 20, max_batch=1) as server:
        with raw_request(server, REQUEST):
            server.wait(lambda: server.client.num_running == 1)
            waiting = raw_request(server, REQUEST)
            server.wait(lambda: server.client.num_waiting == 1)
            waiting.close()
            server.wait(lambda: server.client.num_waiting == 0)
            assert server.client.num_running == 1
        server.wait(lambda: server.client.num_running == 0)


def test_silence_is_broken_by_pings() -> None:
    with running(scripted.echo, delay_s=0.2, times=StreamTimes(ping_s=0.05)) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 3}
        assert server.post("/v1/chat/completions", body).text.count(": ping\n\n") >= 3
        anthropic = {"messages": body["messages"], "stream": True, "max_tokens": 3}
        assert server.post("/v1/messages", anthropic).text.count("event: ping\n") >= 4


def test_an_engine_that_fails_ends_the_stream_with_an_error() -> None:
    def broken(prompt: str, request: object) -> str:
        raise RuntimeError("secret of the inside")

    with running(broken) as server:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
            given = {**body, "input": "x"}
            for stream in (True, False):
                answer = server.post(path, {**given, "stream": stream})
                assert "secret" not in answer.text
                assert "internal error" in answer.text
        assert server.http.get("/health").status_code == 200


def test_events_are_neither_lost_nor_doubled_by_pings() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for number in range(5):
            await asyncio.sleep(0.03)
            yield str(number).encode()

    async def collect() -> list[bytes]:
        return [chunk async for chunk in sse.with_pings(slow(), b"p", 0.01)]

    found = asyncio.run(collect())
    assert b"".join(chunk for chunk in found if chunk != b"p") == b"01234"
    assert found.count(b"p") >= 5


def test_work_is_cancelled_when_its_client_goes() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    start = time.monotonic()
    with pytest.raises(sse.ClientGone):
        asyncio.run(sse.until_gone(receive, work()))
    assert (ended, time.monotonic() - start < 30) == (["cancelled"], True)
