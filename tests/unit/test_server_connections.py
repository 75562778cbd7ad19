"""Clients that say nothing, say it slowly, or are too many; each on a bare socket."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time

import pytest

from glmlocal.server import connections
from glmlocal.server.connections import Limits
from glmlocal.server.guard import Door
from serving import Running, running

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def is_cut_off(raw: socket.socket) -> bool:
    """The server ended the connection and said nothing."""
    try:
        return raw.recv(4096) == b""
    except ConnectionResetError:
        return True


def trickles(raw: socket.socket) -> bool:
    """One more byte of headers was sent after a while."""
    time.sleep(0.05)
    try:
        raw.sendall(b"x")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("sent", [b"", GET, b"GET /heal"])
def test_headers_have_a_time(sent: bytes) -> None:
    with running(limits=Limits(headers_s=0.2)) as server, connect(server) as raw:
        raw.sendall(sent)
        assert is_cut_off(raw)
        server.wait(lambda: server.num_connections == 0)


def test_headers_have_a_time_that_trickling_does_not_extend_and_answers_do() -> None:
    with running(limits=Limits(headers_s=0.4)) as server, connect(server) as raw:
        for _ in range(2):
            raw.sendall(GET + b"\r\n")
            answer = b""
            while b"}" not in answer:
                answer += raw.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)  # an idle connection stays
        start_s = time.monotonic()
        while trickles(raw):
            assert time.monotonic() < start_s + 9


def test_a_body_that_trickles_is_refused_and_its_connection_ends() -> None:
    with running(door=Door(body_timeout_s=0.3)) as server, connect(server) as raw:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(head + b"Content-Length: 99999\r\n\r\n{")
        assert raw.recv(65536).startswith(b"HTTP/1.1 408")
        server.wait(lambda: server.num_connections == 0)


def test_too_many_connections_are_told_so_in_json_and_many_more_are_cut_off() -> None:
    with running(limits=Limits(most=2)) as server, contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(connect(server))
        server.wait(lambda: server.num_connections == 2)
        with connect(server) as third:
            server.wait(lambda: server.num_connections == 3)
            third.sendall(GET + b"\r\n")
            head, _, body = b"".join(iter(lambda: third.recv(65536), b"")).partition(b"\r\n\r\n")
            assert (head[:12], b"retry-after: 5" in head) == (b"HTTP/1.1 503", True)
            assert "too many connections" in json.loads(body)["error"]["message"]
            server.wait(lambda: server.num_connections == 2)
        for _ in range(2):
            held.enter_context(connect(server))
        server.wait(lambda: server.num_connections == 4)
        with connect(server) as fifth:
            assert is_cut_off(fifth)
        held.close()
        server.wait(lambda: server.num_connections == 0)
        assert server.http.get("/health").status_code == 200


def test_the_limit_of_open_files_is_raised_to_what_connections_need(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: given.append(limit))
    for found in ((1024, 4096), (1024, 2000), (8192, 8192)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, found=found: found)
        connections.allow_files(Limits(most=1024))
    assert given == [(2560, 4096), (2000, 2000)]
