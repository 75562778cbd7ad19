"""The door: who may ask, from where, and how much. Plain ASGI, before anything of the request is believed.

``Host`` must be an address, ``localhost`` or a name that was allowed: a web page whose name was rebound to 127.0.0.1
still sends its own. ``Origin``, where a browser sends it, must be ours or one that was allowed; CORS is off otherwise.
Keys are compared in constant time. Bodies are read here, within limits, and handed on whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmlocal.server.errors import ApiError, api_error, bad_request, error_body, speaks_anthropic
from glmlocal.server.limits import MAX_BODY_BYTES

log = logging.getLogger("glmlocal.server")
_OPEN_PATHS = ("/health",)  # for load balancers and containers; says nothing but the state
_QUIET_PATHS = ("/health", "/metrics", "/v1/stats")  # asked for all the time
_DRAIN_BYTES, _DRAIN_S = 1 << 20, 1.0  # of a request that is refused
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/\s]+))(?::\d{1,5})?")
_CORS_HEADERS = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"


@dataclass(frozen=True, slots=True)
class Door:
    """Who is let in. Without ``keys`` everybody who reaches the port is."""

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()  # names beside addresses and localhost
    origins: frozenset[str] = frozenset()  # "https://chat.example": these pages may read answers
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout_s: float = 60.0

    def knows_host(self, host: str) -> bool:
        name = host_name(host)
        return _is_address(name) or name == "localhost" or name in self.hosts

    def allows_origin(self, origin: str, host: str) -> bool:
        own = origin.partition("://")[2] == host and host != ""
        return own or origin in self.origins

    def knows_key(self, given: str) -> bool:
        """Every key is compared, whichever is right, in a time that depends on neither bytes nor length of a key."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = False
        for key in self.keys:
            found |= hmac.compare_digest(hashlib.sha256(key.encode()).digest(), digest)
        return found


def host_name(host: str) -> str:
    """``[::1]:8000`` → ``::1``; ``Box.lan:80`` → ``box.lan``; "" for what is no host and port."""
    found = _HOST.fullmatch(host)
    return "" if found is None else (found[1] or found[2].lower().rstrip("."))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Headers:
    """The request's headers that matter here; a repeated one counts as wrong rather than as either."""

    values: dict[str, str] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, scope: Scope) -> _Headers:
        headers = cls()
        for raw_name, raw_value in scope["headers"]:
            name = raw_name.decode("latin-1").lower()
            if name in headers.values:
                headers.repeated.add(name)
            headers.values[name] = raw_value.decode("latin-1")
        return headers

    def get(self, name: str) -> str:
        if name in self.repeated:
            raise bad_request(f"the header {name} comes twice")
        return self.values.get(name, "").strip()


class Guard:
    """ASGI middleware around the app."""

    def __init__(self, app: ASGIApp, door: Door, answered: Callable[[str, int], None]) -> None:
        """``answered`` is told the route and the status of every request."""
        self._app, self._door, self._answered = app, door, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        start_s, answer, asked = time.perf_counter(), _Answer(send), scope["method"]
        if asked == "HEAD":  # what GET answers; uvicorn, which has the scope as it was, sends no body
            scope = {**scope, "method": "GET"}
        body = None
        try:
            headers = _Headers.of(scope)
            origin = self._check_origin(headers)
            if origin and origin in self._door.origins:
                answer.headers += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
                if scope["method"] == "OPTIONS":
                    await answer.preflight()
                    return
            self._check_key(scope["path"], headers)
            body = await self._read_in_time(scope, headers, receive)
            await self._app(scope, _replay(body, receive), answer.send)
        except ApiError as error:
            is_read = body is not None or not _has_body(scope) or await _drained(receive)
            await answer.error(error, scope["path"], close=not is_read)
        except Exception as error:  # the app has answered if it could
            log.error("%s: %s", printable(scope["path"]), printable(repr(error), 500), exc_info=error)
            await answer.error(api_error(error), scope["path"], close=True)
        finally:
            self._answered(scope.get("glmlocal.route", "other"), answer.status)
            _log(asked, scope["path"], answer, time.perf_counter() - start_s)

    def _check_origin(self, headers: _Headers) -> str:
        host, origin = headers.get("host"), headers.get("origin")
        if not self._door.knows_host(host):
            raise ApiError(
                403, f"the host {host[:100]!r} is not served here; use an address, or start with --allow-host NAME"
            )
        if origin and not self._door.allows_origin(origin, host):
            raise ApiError(
                403, f"pages of {origin[:100]!r} may not use this server; start it with --allow-origin to let them"
            )
        return origin

    def _check_key(self, path: str, headers: _Headers) -> None:
        if not self._door.keys or path in _OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        if not self._door.knows_key(given):
            raise ApiError(
                401,
                "a key is required: send Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_in_time(self, scope: Scope, headers: _Headers, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._door.body_timeout_s):
                return await self._read(scope, headers, receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._door.body_timeout_s:g} s") from None

    async def _read(self, scope: Scope, headers: _Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError for one that is too long, or of another type than JSON."""
        media_type = headers.get("content-type").partition(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT", "PATCH") and media_type != "application/json":
            raise ApiError(415, f"the content type is {media_type[:100]!r}; send application/json")
        if (encoding := headers.get("content-encoding").strip().lower()) not in ("", "identity"):
            raise ApiError(415, f"the content encoding is {encoding[:100]!r}; send the JSON as it is")
        limit = self._door.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit >> 20} MiB; send less", code="request_too_large")
        length = headers.get("content-length")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_long
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client went away")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise too_long
            if not message.get("more_body", False):
                break
        return b"".join(chunks)


def _has_body(scope: Scope) -> bool:
    return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _drained(receive: Receive) -> bool:
    """Read the body of a request that is refused, if it is short; whether all of it came.

    A socket that is closed with bytes unread is reset, and a reset can overtake the answer that was written before.
    """
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while size <= _DRAIN_BYTES:
                message = await receive()
                if not message.get("more_body", False):
                    return bool(message["type"] == "http.request")
                size += len(message.get("body", b""))
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what else happens (the disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


class _Answer:
    """Adds headers to what the app sends, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0  # nothing was sent
        self.request_id = f"req_{secrets.token_hex(12)}"
        request_id = self.request_id.encode()  # x-request-id as OpenAI names it, request-id as Anthropic does
        self.headers: list[tuple[bytes, bytes]] = [(b"x-content-type-options", b"nosniff")]
        self.headers += [(b"x-request-id", request_id), (b"request-id", request_id)]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        await self._send(message)

    async def error(self, error: ApiError, path: str, *, close: bool) -> None:
        """``close``: the rest of the body is not read, however slowly it comes."""
        if self.status:
            return
        body = json.dumps(error_body(error, anthropic=speaks_anthropic(path))).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        if close:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", _CORS_HEADERS.encode()),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


def _log(method: str, path: str, answer: _Answer, seconds: float) -> None:
    level = logging.DEBUG if path in _QUIET_PATHS and answer.status in (200, 503) else logging.INFO
    what = f"{printable(method)} {printable(path)} {answer.status or 'cut off'}"
    log.log(level, "%s in %.3f s (%s)", what, seconds, answer.request_id)


def printable(text: str, limit: int = 200) -> str:
    """Somebody else's text for a log: control characters escaped, one line, short."""
    safe = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return safe + ("…" if len(text) > limit else "")


def read_keys(lines: Sequence[str]) -> tuple[str, ...]:
    """Keys of a key file: one per line; blank lines and comments (#) are left out."""
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
