"""The ASGI application: routes, and errors in the shape of the API that was spoken. No model is needed to make one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from glmlocal import __version__
from glmlocal.errors import GlmlocalError
from glmlocal.server import info
from glmlocal.server.anthropic_types import CountRequest, MessagesRequest
from glmlocal.server.chat import chat_completions
from glmlocal.server.completions import completions
from glmlocal.server.context import ServerContext, StreamTimes
from glmlocal.server.document import document
from glmlocal.server.errors import ApiError, api_error, bad_request, error_body, speaks_anthropic
from glmlocal.server.guard import Door, Guard
from glmlocal.server.limits import parse_body
from glmlocal.server.messages import count_tokens, messages
from glmlocal.server.metrics import Metrics
from glmlocal.server.model import ServerState
from glmlocal.server.openai_types import ChatRequest, CompletionRequest
from glmlocal.server.responses import responses
from glmlocal.server.responses_types import ResponsesRequest
from glmlocal.server.sse import ClientGone
from glmlocal.server.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

_CLIENT_CLOSED_REQUEST = 499  # nginx's: nobody reads it


def create_app(state: ServerState, door: Door | None = None, times: StreamTimes | None = None) -> ASGIApp:
    """``state`` may become ready later: until then answers are 503."""
    app = FastAPI(
        title="glmlocal",
        version=__version__,
        description="OpenAI- and Anthropic-compatible API over one local model.",
        docs_url=None,  # would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    context = ServerContext(state, Metrics(state), times or StreamTimes())
    app.router.route_class = _Route
    _add_errors(app)
    _add_info(app, context)
    _add_openai(app, context)
    _add_anthropic(app, context)
    app.openapi = functools.cache(lambda: document(app))  # type: ignore[method-assign]
    return Guard(app, door or Door(), context.metrics.answered)


class _StrictRequest(Request):
    """A body that is JSON within our limits, or an ApiError."""

    async def json(self) -> Any:
        return parse_body(await self.body())


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            request.scope["glmlocal.route"] = self.path
            answer: Response = await handle(_StrictRequest(request.scope, request.receive))
            return answer

        return strict


def _add_errors(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        found = _validation(error) if isinstance(error, RequestValidationError) else api_error(error)
        body = error_body(found, anthropic=speaks_anthropic(request.url.path))
        return JSONResponse(body, found.status, headers=dict(found.headers))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiError):  # FastAPI wraps what reading the body raised
            return await on_error(request, cause)
        path = request.url.path
        if error.status_code == 404:
            return await on_error(request, info.unsupported(path))
        if error.status_code == 405:
            allowed = ", ".join(_allowed(app, request.scope))
            message = f"{request.method} is not for {path[:100]}; it takes {allowed}"
            return await on_error(request, ApiError(405, message, headers={"Allow": allowed}))
        return await on_error(request, ApiError(error.status_code, str(error.detail)))

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, GlmlocalError, RequestValidationError, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientGone, on_gone)


def _allowed(app: FastAPI, scope: Scope) -> list[str]:
    """The methods of all routes with that path; the guard makes a GET of a HEAD."""
    routes = [route for route in app.routes if isinstance(route, Route | APIRoute)]
    methods = {
        method for route in routes if route.matches(scope)[0] is not Match.NONE for method in route.methods or ()
    }
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _validation(error: RequestValidationError) -> ApiError:
    """The first mistake, with the field's name. Of a field that may be several things, the deepest try is the one."""
    mistakes = error.errors()
    first = max(mistakes, key=lambda mistake: len(mistake["loc"])) if len(mistakes) > 1 else mistakes[0]
    field = ".".join(_place(first, error.body))[:200]
    if first["type"] == "missing" and not field:
        return bad_request("the body is missing; send a JSON object")
    return bad_request(f"{field or 'the body'}: {first['msg']}", field or None)


def _place(mistake: Mapping[str, Any], body: Any) -> Iterator[str]:
    """Names and indices that lead to a mistake, without the types that pydantic tried of a field that may be several
    things: those are in no body. Only what is missing is not there either."""
    value, parts = body, [part for part in mistake["loc"] if part != "body"]
    for number, part in enumerate(parts, 1):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if not (mistake["type"] == "missing" and number == len(parts)):
                continue
        yield str(part)


def _add_info(app: FastAPI, context: ServerContext) -> None:
    state = context.state

    @app.get("/", include_in_schema=False)
    async def root() -> dict[str, Any]:
        return {"name": "glmlocal", "version": __version__, "models": list(state.served_names)}

    @app.get("/health")
    async def health() -> Response:
        return info.health(state)

    @app.get("/metrics")
    async def metrics() -> Response:
        return info.metrics(context)

    @app.get("/v1/stats")
    async def stats() -> dict[str, Any]:
        return info.stats(state)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return info.models(state)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return info.model(state, name)


def _add_openai(app: FastAPI, context: ServerContext) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await chat_completions(body, request, context)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await completions(body, request, context)

    @app.post("/tokenize")
    async def text_to_ids(body: TokenizeRequest) -> dict[str, Any]:
        return await tokenize(body, context)

    @app.post("/detokenize")
    async def ids_to_text(body: DetokenizeRequest) -> dict[str, str]:
        return await detokenize(body, context)

    @app.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        return await responses(body, request, context)

    @app.get("/v1/responses/{response_id}")
    async def stored_response(response_id: str) -> dict[str, Any]:
        return context.responses.get(response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> dict[str, Any]:
        context.responses.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


def _add_anthropic(app: FastAPI, context: ServerContext) -> None:
    @app.post("/v1/messages")
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        return await messages(body, request, context)

    @app.post("/v1/messages/count_tokens")
    async def count(body: CountRequest) -> dict[str, int]:
        return await count_tokens(body, context)
