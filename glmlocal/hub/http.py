"""Requests that are tried again when it may help, and what to tell a person when it does not."""

from __future__ import annotations

import email.utils
import functools
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from glmlocal import __version__
from glmlocal.errors import DownloadError
from glmlocal.text.files import one_line
from glmlocal.units import MIB

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
USER_AGENT = f"glmlocal/{__version__}"
MAX_API_BYTES = 64 * MIB  # of one answer in JSON
_MAX_ANSWER_S = 300.0  # for one such answer, however it drips in
_MAX_REDIRECTS = 8


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what."""

    connect_s: float = 15.0
    read_s: float = 30.0  # for the next bytes
    attempts: int = 6  # in a row that bring no new byte
    backoff_s: float = 1.0  # doubles with every attempt
    max_wait_s: float = 600.0  # that a server's Retry-After may ask for


DEFAULT_PATIENCE = Patience()


class NotThere(DownloadError):
    """A repository that the hub does not have, or does not show to us."""


class TryAgain(Exception):
    """An attempt failed in a way that may pass. ``wait_s``: what the server asked for."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def new_client(patience: Patience, connections: int = 4) -> httpx.Client:
    """A client without credentials: they go with each request, so that a redirect or a CDN never sees them."""
    import httpx

    try:
        return httpx.Client(
            verify=certificates(),
            timeout=httpx.Timeout(patience.read_s, connect=patience.connect_s, pool=None),
            limits=httpx.Limits(max_connections=connections + 4, max_keepalive_connections=connections + 4),
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            event_hooks={"response": [_check_redirect]},
            headers={"Accept-Encoding": "identity", "User-Agent": USER_AGENT},
        )
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:  # a proxy or certificate setting
        raise DownloadError(f"cannot use the network settings of the environment: {one_line(error)}") from error


def _check_redirect(response: httpx.Response) -> None:
    if response.has_redirect_location:
        refuse_downgrade(response.url.scheme, response.url.join(response.headers["Location"]))


def refuse_downgrade(scheme: str, target: httpx.URL) -> None:
    """Raise DownloadError for a redirect from https to what anybody on the way can read and change."""
    if scheme == "https" and target.scheme != "https":
        raise DownloadError(
            f"{one_line(target)[:100]} is where an https address redirects to, and it is not https; "
            "use another hub (--hub, HF_ENDPOINT)"
        )


@functools.cache
def certificates() -> ssl.SSLContext:
    """Whom to trust: reading the list takes 30 ms, and nobody's changes meanwhile."""
    import httpx

    return httpx.create_ssl_context()


def retry(attempt: Callable[[], T], patience: Patience) -> T:
    """The result of ``attempt``, which is called again while what goes wrong may pass. Raises DownloadError."""
    import httpx

    number = 0
    while True:
        try:
            return attempt()
        except httpx.UnsupportedProtocol as error:
            raise DownloadError(
                f"{one_line(error).rstrip('.')}; check the hub's address (HF_ENDPOINT), or use another hub"
            ) from error
        except (TryAgain, httpx.TransportError) as error:
            number += 1
            # Nobody has answered yet: half a minute of silence would not change that.
            most = min(patience.attempts, 2) if isinstance(error, httpx.ConnectError) else patience.attempts
            if number >= most:
                raise DownloadError(f"{explain(error)} (tried {number} times)") from error
            time.sleep(wait_before(number - 1, error, patience))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadError(explain(error)) from error


def wait_before(number: int, error: Exception, patience: Patience) -> float:
    """Seconds to wait after the ``number``-th failure in a row, the first being 0."""
    asked = error.wait_s if isinstance(error, TryAgain) else None
    return min(patience.backoff_s * 2**number if asked is None else asked, patience.max_wait_s)


def explain(error: Exception) -> str:
    """A failed request in one line for a person."""
    import httpx

    if not isinstance(error, httpx.RequestError):
        return one_line(error) or type(error).__name__
    try:
        host = error.request.url.host
    except RuntimeError:  # no request was made
        host = "the hub"
    reason = one_line(error) or type(error).__name__
    match error:
        case httpx.TooManyRedirects():
            return f"{host} redirects in a circle ({error.request.url}); try again later or another hub (--hub)"
        case httpx.ProxyError():
            return f"the proxy refuses the way to {host}: {reason}; check HTTPS_PROXY"
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return f"cannot reach {host}: {reason}; check the network, HTTPS_PROXY, or the hub's address (HF_ENDPOINT)"
        case httpx.TimeoutException():
            return f"{host} sends nothing more"
        case _:
            return f"the connection to {host} broke: {reason}"


class Head(Protocol):
    """As much of an answer as says what became of a request: httpx's, or ``wire.Answer``."""

    @property
    def url(self) -> httpx.URL: ...

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str] | Message: ...


def check_status(response: Head, what: str, *, has_token: bool, page: str, token_variable: str) -> None:
    """Raise TryAgain or DownloadError unless the answer is a success. ``what`` was wanted; ``page`` is its page."""
    status = response.status_code
    if status < 300:
        return
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(f"{response.url.host} answers {status} to {what}", _retry_after(response))
    code = response.headers.get("X-Error-Code", "")
    detail = one_line(response.headers.get("X-Error-Message", ""))
    is_there = code in ("GatedRepo", "RevisionNotFound", "EntryNotFound")
    is_unknown = not is_there and (status == 404 or (status == 401 and not has_token))
    kind = NotThere if is_unknown else DownloadError
    raise kind(_refusal(status, code, detail, what, has_token, page, token_variable))


def _refusal(status: int, code: str, detail: str, what: str, has_token: bool, page: str, token_variable: str) -> str:
    if code == "GatedRepo":
        token = (
            "with the account of your token" if has_token else f"and set {token_variable} to a token of that account"
        )
        return f"{what} is gated: ask for access at {page} {token}, then run this again"
    if status == 401 and has_token:
        return f"the hub refuses your token for {what} (expired or revoked?); set {token_variable} to a new one"
    if status == 401:
        return f"{what} does not exist or needs a login: check the name at {page}, or set {token_variable}"
    if status == 403:
        return f"your account may not read {what}{': ' + detail if detail else ''}; ask for access at {page}"
    if code == "RevisionNotFound":
        return f"{what} does not exist at that revision; see {page} for its branches and tags"
    if status in (404, 410):
        return f"there is no {what}; check the name at {page}"
    return f"the hub answers {status} to {what}{': ' + detail if detail else ''}"


def _retry_after(response: Head) -> float | None:
    """Seconds, from either form of the header."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    parsed = email.utils.parsedate_tz(value) if value else None
    try:
        return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else None
    except (ValueError, OverflowError):
        return None


def get_bytes(
    client: httpx.Client, url: str, headers: Mapping[str, str], check: Callable[[httpx.Response], Any], max_bytes: int
) -> tuple[bytes, httpx.Response]:
    """One attempt at a body of at most ``max_bytes``, and the answer that it came with."""
    end_s = time.monotonic() + _MAX_ANSWER_S
    with client.stream("GET", url, headers=dict(headers)) as response:
        check(response)
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > max_bytes:
                raise DownloadError(f"{response.url.host} sends more than the {max_bytes:,} bytes expected")
            if time.monotonic() > end_s:
                raise DownloadError(f"{response.url.host} has not ended its answer after {_MAX_ANSWER_S:.0f} s")
    return bytes(body), response
