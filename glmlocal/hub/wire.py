"""GET over HTTP/1.1 for the bytes of large files: ``http.client`` with redirects, proxies and connections kept alive.

httpx, which asks the hubs everything else, copies a body three times on its way: 0.45 s of CPU per GiB, as much as the
kernel needs to receive it (docs/experiments.md). Addresses and certificates are httpx's here too.
"""

from __future__ import annotations

import base64
import io
import math
import select
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import unquote

from glmlocal.errors import DownloadError
from glmlocal.hub.http import USER_AGENT, Patience, TryAgain, certificates, refuse_downgrade
from glmlocal.text.files import one_line
from glmlocal.units import KIB

if TYPE_CHECKING:
    import httpx

_MAX_REDIRECTS = 8
_SKIPPED_BYTES = 64 * KIB  # of the body of a redirect; above, a new connection is cheaper
_COPIED_BYTES = 16 * KIB  # more than http.client's buffer has
_MOMENT_S = 0.05  # that bytes wait for others before they are written
_REDIRECTS = (301, 302, 303, 307, 308)


class Answer:
    """The head of a response, and its body as it comes: past http.client into the caller's memory where it can."""

    def __init__(self, url: httpx.URL, response: HTTPResponse, connection: socket.socket | None, read_s: float) -> None:
        self.url = url  # after redirects
        self.status_code = response.status
        self.headers = response.headers  # whatever the case of the name
        self.waited_s = 0.0  # for the body, so far
        self._response, self._read_s = response, read_s
        has_length = response.length is not None and not response.chunked
        self._socket = connection if has_length else None  # without, http.client alone knows where the body ends
        self._ready: select.poll | None = None  # once nothing of the body is in http.client's buffer

    def read_into(self, out: memoryview) -> int:
        """Fill ``out``, or as much of it as comes in a moment; how much. 0 at the end of the body. Raises TryAgain."""
        try:
            num_bytes = self._read_buffered(out) if self._ready is None else 0
            if self._socket is not None and self._ready is not None:
                num_bytes = self._read_socket(self._socket, self._ready, out, num_bytes)
            if self._response.length == 0:
                self._response.read(0)  # lets the connection be used again; read1 forgets to, up to Python 3.12
        except (OSError, HTTPException, ValueError) as error:
            raise _broken(self.url, error) from error
        return num_bytes

    def _read_buffered(self, out: memoryview) -> int:
        """What came with the head, or the next that comes."""
        asked = min(len(out), _COPIED_BYTES)
        data = self._response.read1(asked)
        out[: len(data)] = data
        if self._socket is not None and asked >= io.DEFAULT_BUFFER_SIZE:  # then read1 left nothing behind
            self._socket.settimeout(0)
            self._ready = select.poll()
            self._ready.register(self._socket, select.POLLIN)
        return len(data)

    def _read_socket(self, connection: socket.socket, ready: select.poll, out: memoryview, num_bytes: int) -> int:
        end_s = time.monotonic() + _MOMENT_S
        while num_bytes < len(out) and self._response.length:
            try:
                received = connection.recv_into(out[num_bytes:], min(len(out) - num_bytes, self._response.length))
            except (BlockingIOError, ssl.SSLWantReadError):
                if self._wait(ready, end_s if num_bytes else math.inf):
                    continue
                break
            except OSError:
                if num_bytes:
                    break  # the next call finds the end
                raise
            if not received:
                break
            num_bytes += received
            self._response.length -= received
        return num_bytes

    def _wait(self, ready: select.poll, end_s: float) -> bool:
        """Until there is more, or until ``end_s``; whether there is."""
        start_s = time.monotonic()
        is_ready = bool(ready.poll(1000 * min(max(end_s - start_s, 0.0), self._read_s)))
        self.waited_s += time.monotonic() - start_s
        if not is_ready and end_s == math.inf:
            raise TimeoutError
        return is_ready


class Wire:
    """The connections of one thread, one per server. What goes wrong is TryAgain, or DownloadError if it will stay."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._connections: dict[tuple[str, str, int | None], tuple[HTTPConnection, HTTPResponse]] = {}

    def close(self) -> None:
        for connection, response in self._connections.values():
            with suppress(OSError):
                response.close()
                connection.close()
        self._connections.clear()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, url: str, headers_for: Callable[[httpx.URL], Mapping[str, str]]) -> Answer:
        """The answer of ``url`` or of where it redirects to; ``headers_for`` is asked at each step."""
        import httpx

        at = httpx.URL(url)
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self._ask(at, headers_for(at))
            location = answer.headers.get("Location")
            if answer.status_code not in _REDIRECTS or location is None:
                return answer
            with suppress(TryAgain):  # the connection is of use again only when the body is gone
                answer.read_into(memoryview(bytearray(_SKIPPED_BYTES)))
            with suppress(UnicodeError):
                location = location.encode("latin-1").decode("utf-8")  # http.client takes every byte for a letter
            try:
                target = at.join(location)
            except httpx.InvalidURL as error:
                raise TryAgain(f"{at.host} redirects to no address: {one_line(error)}") from error
            refuse_downgrade(at.scheme, target)
            at = target
        raise DownloadError(f"{at.host} redirects in a circle ({at}); try again later or another hub (--hub)")

    def _ask(self, url: httpx.URL, headers: Mapping[str, str]) -> Answer:
        key = (url.scheme, url.host, url.port)
        connection, before = self._connections.get(key, (None, None))
        if connection is not None and before is not None and not before.isclosed():  # some of it is still to come
            before.close()
            connection.close()
        if connection is not None and connection.sock is not None:
            # The server may have had enough of it meanwhile, which is no failure.
            try:
                return self._send(connection, url, headers)
            except (OSError, HTTPException) as error:
                connection.close()
                if isinstance(error, TimeoutError):
                    raise _broken(url, error) from error
        try:
            connection = self._connect(url)
        except OSError as error:
            reason = one_line(error) or type(error).__name__
            raise TryAgain(
                f"cannot reach {url.host}: {reason}; check the network, HTTPS_PROXY, or the hub's address (HF_ENDPOINT)"
            ) from error
        try:
            return self._send(connection, url, headers)
        except (OSError, HTTPException, ValueError) as error:
            connection.close()
            raise _broken(url, error) from error

    def _send(self, connection: HTTPConnection, url: httpx.URL, headers: Mapping[str, str]) -> Answer:
        assert isinstance(connection.sock, socket.socket)
        connection.sock.settimeout(self._patience.read_s)
        through = _proxy_of(url)
        target = url.raw_path.decode("ascii")
        fixed = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
        if through is not None and url.scheme == "http":
            target = str(url.copy_with(userinfo=b"", fragment=None))
            fixed |= _login("Proxy-Authorization", through)
        connection.request("GET", target, headers=fixed | _login("Authorization", url) | dict(headers))
        response = connection.getresponse()
        self._connections[url.scheme, url.host, url.port] = connection, response
        return Answer(url, response, connection.sock, self._patience.read_s)

    def _connect(self, url: httpx.URL) -> HTTPConnection:
        through = _proxy_of(url)
        host, port, patience = url.host, url.port, self._patience
        server = through or url
        if server.scheme not in ("http", "https"):
            raise DownloadError(f"cannot use {server}: only http and https addresses and proxies can be used here")
        if through is not None and through.scheme == url.scheme == "https":
            raise DownloadError(f"cannot reach {url.host} through {through}; give a proxy with http:// in HTTPS_PROXY")
        connection = (
            HTTPSConnection(server.host, server.port, timeout=patience.connect_s, context=certificates())
            if "https" in (url.scheme, server.scheme)
            else HTTPConnection(server.host, server.port or 80, timeout=patience.connect_s)
        )
        if through is not None and url.scheme == "https":
            connection.port = through.port or 80
            connection.set_tunnel(host, port or 443, _login("Proxy-Authorization", through))
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


def _broken(url: httpx.URL, error: Exception) -> TryAgain:
    if isinstance(error, TimeoutError):
        return TryAgain(f"{url.host} sends nothing more")
    return TryAgain(f"the connection to {url.host} broke: {one_line(error) or type(error).__name__}")


def _proxy_of(url: httpx.URL) -> httpx.URL | None:
    import httpx

    if any(map(urllib.request.proxy_bypass, (url.host, f"{url.host}:{url.port}"))):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    try:
        return httpx.URL(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
    except httpx.InvalidURL as error:
        raise DownloadError(f"cannot use the proxy {proxy!r} of the environment: {one_line(error)}") from error


def _login(header: str, url: httpx.URL) -> dict[str, str]:
    """Name and password of an address, if it has them."""
    if not url.userinfo:
        return {}
    name, _, password = url.userinfo.decode("ascii").partition(":")
    pair = f"{unquote(name)}:{unquote(password)}".encode()
    return {header: f"Basic {base64.b64encode(pair).decode('ascii')}"}
