"""What a client is told when something does not work, in the shape of the API that it speaks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glmlocal.errors import CheckpointError, EngineError, GlmlocalError, QueueFull, RequestError

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


@dataclass(slots=True)
class ApiError(Exception):
    """An answer other than 200. ``param`` names the field of the request; ``code`` is for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def api_error(error: Exception) -> ApiError:
    """Any exception as an answer. What is not ours is a 500 that says nothing of the inside."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            retry_after = max(1, math.ceil(error.retry_after_s))
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(retry_after)})
        case RequestError():
            return bad_request(str(error), code="context_length_exceeded" if "context holds" in str(error) else None)
        case CheckpointError():  # of the chat template: these messages make it misbehave
            return bad_request(str(error))
        case EngineError():
            return ApiError(500, str(error), code="engine_error")
        case GlmlocalError():
            return bad_request(str(error))
        case _:
            return ApiError(500, "internal error; the server's log has more", code="internal_error")


def error_body(error: ApiError, *, anthropic: bool) -> dict[str, Any]:
    if anthropic:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = _OPENAI_TYPES.get(error.status, "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def speaks_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")
