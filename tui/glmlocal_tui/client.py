"""The HTTP side of the app: one chat server, OpenAI's paths, and glmlocal's ``/v1/stats`` where there is one.

httpx is imported at the first request, after the first paint.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glmlocal_tui import sse, stats
from glmlocal_tui.cleaning import one_line

if TYPE_CHECKING:
    import httpx

GONE, REFUSED, CONTEXT, BUSY, LOADING, ODD = "gone", "refused", "context", "busy", "loading", "odd"
_WAIT_S = 15.0  # to connect, or for a small answer; a stream may be silent for as long as the prompt takes


class ServerError(Exception):
    """The server cannot be asked, or said no. ``kind`` is one of the words above; the text says what to do."""

    def __init__(self, kind: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the user asked for. None: the model's or the server's own."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    thinking: bool | None = None
    extra: tuple[tuple[str, Any], ...] = ()  # fields that only the command line sets


@dataclass(slots=True)
class Client:
    """``url`` is the server's root, with or without ``/v1``. ``ours``: it has ``/v1/stats``; None: not known yet."""

    url: str
    key: str = field(default="", repr=False)
    ours: bool | None = None
    _bare: bool = False  # the server refuses stream_options
    _http: httpx.AsyncClient | None = None

    async def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            made = await asyncio.to_thread(self._make)  # imports and certificates: 0.2 s that keys must not wait for
            self._http = self._http or made
        return self._http

    def _make(self) -> httpx.AsyncClient:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        root = self.url.rstrip("/").removesuffix("/v1")
        # trust_env: a proxy for the world must not be asked for the loopback server
        local = any(name in root for name in ("//127.", "//localhost", "//[::1]"))
        try:
            return httpx.AsyncClient(base_url=root, headers=headers, timeout=_WAIT_S, trust_env=not local)
        except httpx.InvalidURL as error:
            raise _unreachable(self.url, error) from error

    async def aclose(self) -> None:
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    async def stats(self) -> stats.Stats | None:
        """None: a server of another kind, which is not asked again. Raises ServerError."""
        if self.ours is False:
            return None
        response = await self._get("/v1/stats")
        if response.status_code == 200:
            found = stats.parse(_json(response))
            if found is not None:
                self.ours = True
                return found
        elif self.ours or response.status_code in (401, 403, 429, 503):  # anything else is no answer of ours
            raise refusal(response.status_code, response.content, response.headers)
        self.ours = False
        return None

    async def models(self) -> list[str]:
        """The names the server serves. Raises ServerError."""
        response = await self._get("/v1/models")
        if response.status_code != 200:
            raise refusal(response.status_code, response.content, response.headers)
        data = _json(response)
        items = data.get("data") if isinstance(data, dict) else None
        return [
            one_line(item["id"])
            for item in (items if isinstance(items, list) else [])
            if isinstance(item, dict) and isinstance(item.get("id"), str)
        ]

    async def chat(self, model: str, messages: list[dict[str, Any]], sampling: Sampling) -> AsyncIterator[sse.Event]:
        """The events of one answer. Leaving the loop early closes the connection, which stops the server's work.

        Raises ServerError before the first event, or in the middle when the server goes away.
        """
        http = await self._client()
        import httpx

        timeout = httpx.Timeout(_WAIT_S, read=None)
        try:
            while True:
                body = self._body(model, messages, sampling)
                async with http.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as response:
                    if response.status_code == 200:
                        async for event in self._events(response):
                            yield event
                        return
                    error = refusal(response.status_code, await response.aread(), response.headers)
                odd = response.status_code in (400, 422) and error.kind == ODD and not self.ours
                self._bare = odd and not self._bare  # once more without what an old server does not know
                if not self._bare:
                    raise error
        except (httpx.HTTPError, OSError) as error:
            raise _unreachable(self.url, error) from error
        except sse.ProtocolError as error:
            raise ServerError(ODD, f"{one_line(self.url)} does not speak OpenAI's protocol: {error}") from error

    async def _events(self, response: httpx.Response) -> AsyncIterator[sse.Event]:
        lines, ended = sse.Lines(), False
        async for data in response.aiter_bytes():
            for payload in lines.feed(data):
                for event in sse.events(payload):
                    ended = ended or isinstance(event, (sse.Finish, sse.Failure))
                    yield event
            if lines.done:
                return
        if lines.instead:
            for event in self._whole(lines.instead):
                yield event
        elif not ended:
            when = "in the middle of the answer" if lines.began else "before the answer began"
            raise ServerError(GONE, f"the server closed the connection {when}")

    def _whole(self, text: str) -> list[sse.Event]:
        """The events of an answer that is no stream. Raises ServerError for one that is no answer either."""
        try:
            found = list(sse.events(text))
        except sse.ProtocolError:
            found = []
        if found:
            return found
        page = "a web page: " if text.startswith("<") else ""
        said = f"the server sent no chat completion but {page}{one_line(text, 80)!r}"
        raise ServerError(ODD, said + ("; is --url the root of an OpenAI-compatible server?" if page else ""))

    def _body(self, model: str, messages: list[dict[str, Any]], sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model} if model else {}  # a server that lists none may need none
        body |= {"messages": messages, "stream": True}
        if self.ours:  # others refuse fields they do not know
            body["stream_options"] = {"include_usage": True, "include_progress": True}
        elif not self._bare:
            body["stream_options"] = {"include_usage": True}
        for name in ("temperature", "top_p", "max_tokens"):
            value = getattr(sampling, name)
            if value is not None:
                body[name] = value
        body.update(sampling.extra)
        if sampling.thinking is not None and (self.ours or not sampling.thinking):
            body["chat_template_kwargs"] = {"enable_thinking": sampling.thinking}
        return body

    async def _get(self, path: str) -> httpx.Response:
        http = await self._client()  # before the import, which it makes in a thread
        import httpx

        try:
            return await http.get(path)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _unreachable(self.url, error) from error


def refusal(status: int, body: bytes, headers: Any) -> ServerError:
    """What an HTTP status that is not 200 means to the person at the screen."""
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    error = data.get("error", data.get("message")) if isinstance(data, dict) else None
    failure = sse.failure(error) if error else sse.Failure("", "")
    said = one_line(failure.message, 1000)
    if status in (401, 403):
        return ServerError(
            REFUSED, f"the server refused the key ({said or status}); give the right one with --api-key-file"
        )
    if status == 503:
        return ServerError(LOADING, said or "the model is still loading", _retry_after(headers))
    if status == 429:
        return ServerError(BUSY, said or "the server has no room for another request; try again", _retry_after(headers))
    if is_context(failure):
        return ServerError(CONTEXT, context_full(said))
    if status == 404:
        return ServerError(ODD, said or "the server has no chat completions here (404); is --url its root?")
    return ServerError(ODD, f"the server said no ({status}): {said or 'no reason given'}")


def is_context(failure: sse.Failure) -> bool:
    return "context_length" in failure.code or "context length" in failure.message.casefold()


def context_full(said: str) -> str:
    return f"the conversation no longer fits the context: {said}. /new starts a fresh one; or edit an earlier message"


def _retry_after(headers: Any) -> float | None:
    try:
        wait_s = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return wait_s if wait_s > 0 else None  # neither nan nor a wish to be asked without a pause


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _unreachable(url: str, error: Exception) -> ServerError:
    reason = one_line(str(error)) or type(error).__name__
    return ServerError(GONE, f"no answer from {one_line(url)}: {reason}")
