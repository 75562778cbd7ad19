"""The OpenAPI document: what FastAPI knows of our requests, and what it does not of our answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from glmlocal.server.errors import speaks_anthropic

_STREAMED: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_OPEN: Final = ("/health",)
_REFUSALS: Final = {
    "400": "A field is missing, wrong or beyond its limit; the message names it",
    "401": "No key that is known",
    "403": "The Host or the Origin is not served",
    "404": "There is nothing of that name",
    "408": "The body did not come in time",
    "413": "The body is too long",
    "415": "The body is not JSON, or compressed",
    "429": "The queue is full; Retry-After says when to come again",
    "500": "A fault of the server; its log has more",
    "503": "The model is being loaded, or there are too many connections; Retry-After says when to come again",
}
_WITH_BODY: Final = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503")
_WITHOUT: Final = ("400", "401", "403", "404", "503")
_ERRORS: Final[Mapping[str, Any]] = {
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def document(app: FastAPI) -> dict[str, Any]:
    """What ``/openapi.json`` answers."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = {"200": _right(path, operation), **_refusals(path, method)}
            if path in _OPEN:
                operation["security"] = []
    components = found["components"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which is a 400 here
        components["schemas"].pop(name, None)
    components["schemas"] |= _ERRORS
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    found["security"] = [{"bearer": []}, {"x-api-key": []}, {}]  # none is needed where no key file was given
    return found


def _right(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    right: dict[str, Any] = operation["responses"]["200"]
    if path == "/metrics":
        right["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in _STREAMED:
        right["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return right


def _refusals(path: str, method: str) -> dict[str, Any]:
    if path == "/health":
        return {"503": {"description": "Loading, or it failed", "content": {"application/json": {"schema": {}}}}}
    schema = {"$ref": f"#/components/schemas/{'AnthropicError' if speaks_anthropic(path) else 'OpenAIError'}"}
    content = {"application/json": {"schema": schema}}
    statuses = _WITH_BODY if method == "post" else _WITHOUT
    return {status: {"description": _REFUSALS[status], "content": content} for status in statuses}
