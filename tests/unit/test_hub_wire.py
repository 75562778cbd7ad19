"""Bytes over http.client: kept connections, redirects, proxies, TLS; and hubs whose HTTP is unusual."""

from __future__ import annotations

import base64
import gzip
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glmlocal.errors import DownloadError
from glmlocal.hub import http as hub_http
from glmlocal.hub.http import TryAgain
from glmlocal.hub.huggingface import HuggingFace
from glmlocal.hub.wire import Wire, _proxy_of
from hub import server as hub_server
from hub.pulling import PATIENCE, QUICK, REPO, fetch, huggingface, modelscope, visible_files
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {"config.json": b'{"model_type": "glm4_moe"}', BIG: random.Random(1).randbytes(700_001)}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
ONCE = replace(QUICK, patience=replace(PATIENCE, attempts=1))  # nothing may fail


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(token="right") as server:
        server.add(REPO, FILES)
        yield server


def connections_of(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ports that requests for the large file came from."""
    ports: list[int] = []

    def on_request(handler: Any) -> None:
        if "/cdn/" in handler.path:
            ports.append(handler.client_address[1])

    server.on_request = on_request
    return ports


def test_a_thread_keeps_its_connection(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = connections_of(server, monkeypatch)
    fetch(huggingface(server, tmp_path), options=replace(ONCE, connections=1))
    assert len(ports) > 10
    assert len(set(ports)) == 1


def test_a_kept_connection_that_the_server_closed_is_no_failure(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Connection header, as servers do whose idle connections time out."""
    ports = connections_of(server, monkeypatch)
    send = hub_server._Handler._send

    def send_and_close(handler: Any, *args: Any) -> None:
        send(handler, *args)
        handler.close_connection = True

    monkeypatch.setattr(hub_server._Handler, "_send", send_and_close)
    fetch(huggingface(server, tmp_path), options=replace(ONCE, connections=1))
    assert visible_files(tmp_path) == FILES
    assert len(set(ports)) == len(ports) > 10


@pytest.mark.parametrize("connect", [huggingface, modelscope])
def test_http_1_0(connect: Any, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server._Handler, "protocol_version", "HTTP/1.0")
    fetch(connect(server, tmp_path), options=ONCE)
    assert visible_files(tmp_path) == FILES


def test_answers_in_chunks_without_a_length(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(handler: Any, path: str, content: bytes, headers: dict[str, str]) -> None:
        handler._head(200, {**headers, "Transfer-Encoding": "chunked"})
        for start in range(0, len(content), 50_000):
            part = content[start : start + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    monkeypatch.setattr(hub_server._Handler, "_send", send)
    fetch(huggingface(server, tmp_path), options=ONCE)
    assert visible_files(tmp_path) == FILES


@pytest.mark.parametrize("connect", [huggingface, modelscope])
def test_a_listing_that_is_compressed_unasked(
    connect: Any, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def head(handler: Any, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        if headers.get("Content-Type") == "application/json":
            handler.wfile = _Gzipped(handler.wfile, handler)
            headers = {name: value for name, value in headers.items() if name != "Content-Length"}
            headers |= {"Content-Encoding": "gzip", "Connection": "close"}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()

    class _Gzipped:
        def __init__(self, out: Any, handler: Any) -> None:
            self.out, self.handler, self.head = out, handler, True

        def write(self, data: bytes) -> None:
            if self.head:
                self.head = False
                self.out.write(data)
                return
            self.out.write(gzip.compress(data))
            self.handler.wfile, self.handler.close_connection = self.out, True

        def flush(self) -> None:
            self.out.flush()

    monkeypatch.setattr(hub_server._Handler, "_head", head)
    fetch(connect(server, tmp_path), options=ONCE)
    assert visible_files(tmp_path) == FILES


def test_a_file_that_is_compressed_unasked_is_said_so(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = hub_server._Handler._send
    monkeypatch.setattr(
        hub_server._Handler,
        "_send",
        lambda handler, path, content, headers: send(
            handler, path, gzip.compress(content), {**headers, "Content-Encoding": "gzip"}
        ),
    )
    with pytest.raises(DownloadError, match="compressed"):
        fetch(huggingface(server, tmp_path))
    assert visible_files(tmp_path) == {}


def test_an_endpoint_with_a_path(server: HubServer, tmp_path: Path) -> None:
    def below_mirror(handler: Any) -> None:
        if not handler.path.startswith("/cdn/"):
            assert handler.path.startswith("/mirror/hf/")
            handler.path = handler.path.removeprefix("/mirror/hf")

    server.on_request = below_mirror
    fetch(HuggingFace(f"{server.url}/mirror/hf", tmp_path, "right", offline=False, patience=PATIENCE), options=ONCE)
    assert visible_files(tmp_path) == FILES


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/moved/{path}", "/moved/model.safetensors"),  # a repository that was renamed: the token goes along
        ("/moved/模型 {path}?a=b c", "/moved/%E6%A8%A1%E5%9E%8B%20model.safetensors?a=b%20c"),
        ("//127.0.0.1:{port}/moved/{path}#part", "/moved/model.safetensors"),
    ],
)
def test_redirects_within_the_hub(location: str, target: str, server: HubServer, tmp_path: Path) -> None:
    seen = []

    def on_request(handler: Any) -> None:
        if handler.path.startswith("/moved/"):
            seen.append((handler.path, handler.headers.get("Authorization")))
            handler.path = f"/{REPO}/resolve/main/config.json"

    server.on_request = on_request
    resolve = hub_server._Handler._resolve
    redirect = location.format(path=BIG, port=server.port)

    def moved(handler: Any, repo_id: str, revision: str, path: str) -> None:
        if path == BIG:
            return handler._redirect(redirect.encode("utf-8").decode("latin-1"), {})
        return resolve(handler, repo_id, revision, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server._Handler, "_resolve", moved)
        with Wire(PATIENCE) as wire:
            answer = wire.get(f"{server.url}/{REPO}/resolve/main/{BIG}", lambda url: {"Authorization": "Bearer right"})
            assert answer.status_code == 200
            out = bytearray(100)
            assert out[: answer.read_into(memoryview(out))] == FILES["config.json"]
            assert answer.read_into(memoryview(out)) == 0
    assert seen == [(target, "Bearer right")]


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[", "http://a b/", "data:,x"])
def test_redirects_to_where_nothing_can_be_fetched(
    location: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_server._Handler, "_resolve", lambda handler, *args: handler._redirect(location, {}))
    with pytest.raises((TryAgain, DownloadError)) as error, Wire(PATIENCE) as wire:
        wire.get(f"{server.url}/{REPO}/resolve/main/{BIG}", lambda url: {})
    assert "\n" not in str(error.value)


def test_an_upgrade_to_https_of_the_same_host_keeps_the_token_and_nothing_else_does(
    server: HubServer, tmp_path: Path
) -> None:
    import httpx

    from glmlocal.hub.listing import Listing
    from glmlocal.hub.ranges import Fetcher

    hub = HuggingFace("http://hub.example", tmp_path, "t", offline=False)
    fetcher = Fetcher((), Listing(REPO, "main", "0" * 40, ()), hub, QUICK, threading.Condition())
    assert fetcher._is_hub(httpx.URL("http://hub.example/x"))
    assert fetcher._is_hub(httpx.URL("https://hub.example/x"))
    for other in (
        "http://hub.example:81/x",
        "https://hub.example:8443/",
        "http://cdn.hub.example/",
        "http://hub.example.evil/",
    ):
        assert not fetcher._is_hub(httpx.URL(other))
    secure = Fetcher((), fetcher.listing, replace(hub, endpoint="https://hub.example"), QUICK, threading.Condition())
    assert not secure._is_hub(httpx.URL("http://hub.example/x"))


# Proxies


def test_http_through_a_proxy(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub of the tests is a proxy too: it looks at the path of an address and nothing else."""
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{server.port}")
    hub = HuggingFace("http://hub.invalid", tmp_path, None, offline=False, patience=PATIENCE)
    fetch(hub, options=ONCE)
    assert visible_files(tmp_path) == FILES
    login = "Basic " + base64.b64encode(b"me:p@ss").decode()
    for _, target, headers in server.requests:
        assert target.startswith(("http://hub.invalid/", f"{server.cdn}/cdn/"))
        assert headers["proxy-authorization"] == login


def test_no_proxy_is_honoured(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    fetch(huggingface(server, tmp_path), options=ONCE)
    assert visible_files(tmp_path) == FILES


def test_no_proxy_with_a_port_is_honoured_for_lists_and_bytes(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", f"127.0.0.1:{server.port}, localhost:{server.port}")
    fetch(huggingface(server, tmp_path), options=ONCE)
    assert visible_files(tmp_path) == FILES


@pytest.mark.parametrize(
    ("no_proxy", "is_direct"),
    [
        ("", False),
        ("*", True),
        ("hub.example", True),
        ("HUB.EXAMPLE", True),
        (" other , hub.example ", True),
        (".example", True),
        ("example", True),
        ("hub.example:8443", True),
        ("hub.example:443", False),
        ("ub.example", False),
        ("hub.example.evil", False),
        ("*.example", False),
        ("10.0.0.0/8", False),
    ],
)
@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_what_goes_through_the_proxy(
    variable: str, no_proxy: str, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As httpx, which asks for the list, would have it."""
    import httpx

    url = httpx.URL("https://hub.example:8443/x")
    assert _proxy_of(url) is None
    monkeypatch.setenv(variable, "http://me:pw@proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    proxy = _proxy_of(url)
    assert (None if proxy is None else str(proxy.copy_with(userinfo=b""))) == (
        None if is_direct else "http://proxy.example:3128"
    )
    with hub_http.new_client(PATIENCE) as client:
        assert (client._transport_for_url(url) is client._transport) == is_direct


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1", "http://127.0.0.1:9", "nonsense:x"])
def test_a_proxy_that_cannot_be_used_is_one_line(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises((TryAgain, DownloadError)) as error, Wire(PATIENCE) as wire:
        wire.get("http://hub.invalid/x", lambda url: {})
    assert "\n" not in str(error.value)


# TLS


@pytest.fixture
def secure(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub over TLS, with a certificate of its own that SSL_CERT_FILE trusts."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,DNS:hub.invalid"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost", "-addext", names]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    monkeypatch.setattr(HubServer, "cdn", property(lambda self: f"https://localhost:{self.port}"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    hub_http.certificates.cache_clear()
    return server


@pytest.fixture(autouse=True)
def forget_certificates() -> Iterator[None]:
    yield
    hub_http.certificates.cache_clear()


def over_tls(server: HubServer, cache: Path, host: str = "127.0.0.1") -> HuggingFace:
    return HuggingFace(f"https://{host}:{server.port}", cache, None, offline=False, patience=PATIENCE)


def test_over_tls(secure: HubServer, tmp_path: Path) -> None:
    fetch(over_tls(secure, tmp_path / "hub"), options=ONCE)
    assert visible_files(tmp_path / "hub") == FILES


def test_from_https_no_bytes_come_over_http(secure: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubServer, "cdn", property(lambda self: f"http://localhost:{self.port}"))
    with pytest.raises(DownloadError, match=r"http://localhost:.*not https"):
        fetch(over_tls(secure, tmp_path / "hub"), options=ONCE)
    assert visible_files(tmp_path / "hub") == {}


def test_a_certificate_that_nobody_trusts(secure: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(TryAgain, match=r"cannot reach localhost: .*certificate"):
        Wire(PATIENCE).get(f"{secure.cdn}/x", lambda url: {})
    assert secure.requests == []


def test_over_tls_through_a_proxy(secure: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_serve_connect, args=(listening, secure.port, asked), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://me:pw@127.0.0.1:{listening.getsockname()[1]}")
        fetch(over_tls(secure, tmp_path / "hub", "hub.invalid"), options=ONCE)
    assert visible_files(tmp_path / "hub") == FILES
    assert {head.split()[1] for head in asked} == {
        f"{host}:{secure.port}".encode() for host in ("hub.invalid", "localhost")
    }
    login = b"Basic " + base64.b64encode(b"me:pw")
    assert all(login in head for head in asked)


def _serve_connect(listening: socket.socket, port: int, asked: list[bytes]) -> None:
    """A proxy that connects everybody to one port of this machine."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            return
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        asked.append(head)
        upstream = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        pumps = [threading.Thread(target=pump, args=ends) for ends in ((client, upstream), (upstream, client))]
        threading.Thread(target=_close_after, args=(pumps, (client, upstream)), daemon=True).start()


def _close_after(pumps: list[threading.Thread], ends: tuple[socket.socket, ...]) -> None:
    for pump in pumps:
        pump.start()
    for pump in pumps:
        pump.join()
    for end in ends:
        end.close()


def test_name_and_password_of_an_endpoint(server: HubServer, tmp_path: Path) -> None:
    seen = []

    def on_request(handler: Any) -> None:
        if "/resolve/" in handler.path:
            seen.append(handler.headers.get("Authorization"))
        del handler.headers["Authorization"]

    server.on_request = on_request
    hub = HuggingFace(f"http://me:p%40ss@127.0.0.1:{server.port}", tmp_path, None, offline=False, patience=PATIENCE)
    fetch(hub, options=ONCE)
    assert set(seen) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


def test_retry_after_in_either_form() -> None:
    def head(value: str) -> Any:
        return type("Head", (), {"headers": {"Retry-After": value}})()

    import email.utils
    import time

    assert hub_http._retry_after(head("7")) == 7
    assert 28 < (hub_http._retry_after(head(email.utils.formatdate(time.time() + 30, usegmt=True))) or 0) <= 30
    assert hub_http._retry_after(head(email.utils.formatdate(0, usegmt=True))) == 0
    for nonsense in ("", "soon", "-5", "1e9", "٣", "Mon, 99 Foo 9999 99:99:99 GMT"):
        assert hub_http._retry_after(head(nonsense)) in (None, 0)


# Bodies


def get(server: HubServer, wire: Wire) -> Any:
    return wire.get(f"{server.url}/{REPO}/resolve/main/{BIG}", lambda url: {})


@pytest.mark.parametrize("step", [1, 100, 8191, 8192, 50_000, 1 << 20])
def test_a_body_arrives_whole_in_pieces_of_any_size(step: int, server: HubServer) -> None:
    """What came together with the head included."""
    out, received = memoryview(bytearray(step)), bytearray()
    most = 700_001 if step > 100 else 3_000 * step
    with Wire(PATIENCE) as wire:
        answer = get(server, wire)
        while len(received) < most and (num_bytes := answer.read_into(out)):
            received += out[:num_bytes]
        assert received == FILES[BIG][: len(received)]
        assert len(received) >= most
        if step > 100:
            assert answer.read_into(out) == 0


def test_what_came_before_a_connection_broke_is_not_lost(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    out = memoryview(bytearray(1 << 20))

    class Breaking:
        """A socket that is reset after 100,000 bytes."""

        def __init__(self, connection: socket.socket) -> None:
            self.connection, self.left = connection, 100_000

        def recv_into(self, buffer: memoryview, num_bytes: int) -> int:
            if not self.left:
                raise ConnectionResetError(104, "Connection reset by peer")
            received = self.connection.recv_into(buffer, min(num_bytes, self.left))
            self.left -= received
            return received

    with Wire(PATIENCE) as wire:
        answer = get(server, wire)
        first = answer.read_into(out[:8192])
        answer._socket = Breaking(answer._socket)
        assert answer.read_into(out[first:]) == 100_000
        assert out[: first + 100_000] == FILES[BIG][: first + 100_000]
        with pytest.raises(TryAgain, match=r"broke: .*reset"):
            answer.read_into(out)


def test_a_body_that_stops_coming_is_given_up(server: HubServer) -> None:
    """Early bytes are handed over at once, and the silence after them has an end."""
    server.fail(BIG, bytes_per_s=1000)
    out = memoryview(bytearray(1 << 20))
    with Wire(replace(PATIENCE, read_s=0.2)) as wire:
        answer = get(server, wire)
        assert 0 < answer.read_into(out) <= 1000
        answer._read_s = 0.001
        with pytest.raises(TryAgain, match="sends nothing more"):
            list(iter(lambda: answer.read_into(out), 0))
        assert answer.waited_s > 0


# Patience


def test_a_hub_that_nobody_reaches_is_asked_twice_only() -> None:
    import httpx

    asked: list[int] = []

    def attempt() -> None:
        asked.append(1)
        raise httpx.ConnectError("refused")

    with pytest.raises(DownloadError, match="tried 2 times"):
        hub_http.retry(attempt, replace(PATIENCE, attempts=6))
    assert len(asked) == 2


@pytest.mark.parametrize(("number", "asked_s", "waited_s"), [(0, None, 1), (3, None, 8), (2, 5, 5), (0, 1e6, 60)])
def test_how_long_is_waited(number: int, asked_s: float | None, waited_s: float) -> None:
    patience = replace(PATIENCE, backoff_s=1, max_wait_s=60)
    assert hub_http.wait_before(number, TryAgain("busy", asked_s), patience) == waited_s


def test_an_answer_that_does_not_end_is_left(server: HubServer) -> None:
    url = f"{server.url}/{REPO}/resolve/main/{BIG}"
    with hub_http.new_client(PATIENCE) as client:
        assert len(hub_http.get_bytes(client, url, {}, lambda response: None, 700_001)[0]) == 700_001
        with pytest.raises(DownloadError, match="sends more than the 700,000 bytes expected"):
            hub_http.get_bytes(client, url, {}, lambda response: None, 700_000)
