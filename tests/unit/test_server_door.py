"""Who is let in, and with how much: hosts, origins, keys, bodies, JSON, limits of every list."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from glmlocal.server.guard import Door, host_name, printable, read_keys
from serving import Running, running

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    door = Door(
        keys=("first-key", "second-key"),
        hosts=frozenset(("box.lan",)),
        origins=frozenset(("https://chat.example",)),
        max_body_bytes=1000,
        body_timeout_s=0.5,
    )
    with running(door=door) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("192.168.1.5:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("", 403),
        ("box.lan", 403),
    ],
)
def test_only_addresses_localhost_and_allowed_names_are_hosts(server: Running, host: str, status: int) -> None:
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == status


def test_an_allowed_name_is_a_host(locked: Running) -> None:
    headers = {"Host": "box.lan:8000", "Authorization": "Bearer first-key"}
    assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_pages_of_others_are_refused_and_cors_is_off(server: Running) -> None:
    refused = server.post(CHAT, HELLO, headers={"Origin": "https://evil.example"})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    own = server.post(CHAT, HELLO, headers={"Origin": server.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert server.http.options(CHAT, headers={"Origin": "null"}).status_code == 403


def test_an_allowed_page_gets_cors(locked: Running) -> None:
    origin = {"Origin": "https://chat.example"}
    preflight = locked.http.options(CHAT, headers=origin)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "https://chat.example")
    answer = locked.post(CHAT, HELLO, headers={**origin, "x-api-key": "first-key"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://chat.example")
    assert locked.post(CHAT, HELLO, headers=origin).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "bearer second-key"}, 200),
        ({"x-api-key": "second-key"}, 200),
        ({"Authorization": "Bearer first-ke"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"x-api-key": ""}, 401),
        ({"Authorization": b"Bearer \xff\xfe"}, 401),
    ],
)
def test_a_key_is_needed_for_everything_but_health(locked: Running, headers: Any, status: int) -> None:
    assert locked.post(CHAT, HELLO, headers=headers).status_code == status
    for path in ("/v1/models", "/v1/stats", "/metrics", "/openapi.json", "/"):
        assert locked.http.get(path, headers=headers).status_code == status
    assert locked.http.get("/health", headers=headers).status_code == 200


def test_two_keys_in_one_request_are_refused(locked: Running) -> None:
    headers = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer first-key")]
    assert locked.http.get("/v1/models", headers=headers).status_code == 400


def test_bodies_have_a_length_a_type_and_a_time(locked: Running) -> None:
    key = {"x-api-key": "first-key"}
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]})
    assert locked.http.post(CHAT, content=big, headers={**key, "content-type": "application/json"}).status_code == 413
    chunked = locked.http.post(
        CHAT, content=iter([b"{", b" " * 2000, b"}"]), headers={**key, "content-type": "application/json"}
    )
    assert chunked.status_code == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = locked.http.post(CHAT, content=json.dumps(HELLO), headers={**key, "content-type": kind})
        assert answer.status_code == 415
    for encoding, status in (("gzip", 415), ("identity", 200)):
        headers = {**key, "content-type": "application/json", "content-encoding": encoding}
        assert locked.http.post(CHAT, content=json.dumps(HELLO), headers=headers).status_code == status
    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=10)
    connection.putrequest("POST", CHAT)
    for name, value in {**key, "content-type": "application/json", "content-length": "500"}.items():
        connection.putheader(name, value)
    connection.endheaders(b'{"messages"')  # and then nothing more
    assert connection.getresponse().status == 408
    connection.close()


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "body"),
    (b"{", "JSON"),
    (b"[]", ""),
    (b"null", ""),
    (b'"text"', ""),
    (b"\xff\xfe{}", "UTF-8"),
    (b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}', "messages.0.content"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "messages.0.content"),
    (b'{"messages": [{"role": "user", "content": "a"}], "\\ud83d": 1}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "NaN"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', "Infinity"),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "deep"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
]


@pytest.mark.parametrize(("body", "word"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_what_is_not_json_is_a_400_that_says_so(server: Running, body: bytes, word: str) -> None:
    answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [HELLO["messages"][0]] * 10_001}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 1025}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_every_limit_is_a_400_that_names_its_field(server: Running, fields: dict[str, Any], param: str | None) -> None:
    before = len(server.client.requests)
    answer = server.post(CHAT, {**HELLO, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    found = error["param"]
    assert found == param or (found or "").startswith(f"{param}."), error
    assert len(server.client.requests) == before


def test_images_and_files_are_refused_in_words(server: Running) -> None:
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert "reads text only" in answer.json()["error"]["message"]


def test_a_prompt_that_is_too_long_says_by_how_much() -> None:
    with running(context=64) as small:
        answer = small.post(CHAT, {"messages": [{"role": "user", "content": "word " * 200}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "context holds 64" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 9_000}]}),
        ("/v1/completions", {"prompt": "a b " * 9_000}),
    ],
)
def test_a_prompt_that_is_many_times_too_long_is_not_tokenized(path: str, body: dict[str, Any]) -> None:
    with running(context=64) as small:
        error = small.post(path, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "characters is several times too long: the context holds 64" in error["message"]
        counted = small.post("/tokenize", body)
        assert counted.json()["count"] > 9_000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/embeddings", 501),
        ("GET", "/v1/files/abc", 501),
        ("POST", "/v1/audio/speech", 501),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
    ],
)
def test_what_is_not_here_is_json_too(server: Running, method: str, path: str, status: int) -> None:
    answer = server.http.request(method, path, json={} if method == "POST" else None)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_errors_of_the_anthropic_api_have_its_shape(server: Running) -> None:
    answer = server.post("/v1/messages", {"messages": []})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_no_http_closes_the_connection(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 not http at all\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_names_of_hosts_and_lines_of_logs() -> None:
    assert [host_name(host) for host in ("Box.Lan:80", "[::1]:80", "a.b.", "1.2.3.4")] == [
        "box.lan",
        "::1",
        "a.b",
        "1.2.3.4",
    ]
    for wrong in ("[::1", "[::1]x", "1.2.3.4:80:80", "localhost@evil", "localhost/", "a b", "localhost:80evil", "::1"):
        assert host_name(wrong) == ""
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    assert len(printable("x" * 500)) == 201
    assert read_keys(["# comment", "", " key ", "other"]) == ("key", "other")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"stop": ["x", 5]}, "stop.1"),
        ({"messages": None}, "messages"),
        ({"n": 0}, "n"),
    ],
)
def test_a_mistake_is_named_by_its_place_in_the_body(fields: dict[str, Any], param: str, server: Running) -> None:
    error = server.post(CHAT, {**HELLO, **fields}).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


def test_a_refusal_waits_for_the_body_so_that_the_answer_is_read(locked: Running) -> None:
    body = json.dumps(HELLO).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as connection:
        for key, status in (("wrong", b"401"), ("first-key", b"200")):  # the second on the same connection
            connection.sendall(f"{head}x-api-key: {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            time.sleep(0.1)  # an answer that came now would have closed the connection under the body
            connection.sendall(body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (str(answer.status).encode(), answer.headers["connection"]) == (status, None)
            answer.read()


@pytest.mark.parametrize("sent", [b"", b"x" * 3_000_000])
def test_a_body_that_is_long_or_does_not_come_is_not_waited_for(sent: bytes, locked: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as connection:
        connection.sendall(head)
        with contextlib.suppress(OSError):  # it stops reading
            connection.sendall(sent)
        try:
            answer = connection.recv(1000)
        except ConnectionResetError:
            assert sent
            return
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer
