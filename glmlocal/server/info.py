"""What the server says of itself: models, health, stats, metrics; and what it says no to."""

from __future__ import annotations

import datetime
import time
from typing import Any

import psutil
from starlette.responses import JSONResponse, Response

from glmlocal.server.context import ServerContext
from glmlocal.server.errors import ApiError
from glmlocal.server.model import ServerState

# Known APIs that are not here: 501 says so, where 404 would look like a wrong address.
UNSUPPORTED = (
    *("/v1/embeddings", "/v1/moderations", "/v1/images", "/v1/audio", "/v1/files", "/v1/batches", "/v1/fine_tuning"),
    *("/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/realtime", "/v1/uploads", "/v1/rerank", "/v1/score"),
    *("/v1/messages/batches", "/v1/conversations", "/v1/complete", "/v1/videos", "/v1/containers", "/v1/evals"),
)


def unsupported(path: str) -> ApiError:
    """The error for a path that no route has."""
    if any(path == known or path.startswith(f"{known}/") for known in UNSUPPORTED):
        return ApiError(501, f"{path[:100]} is not part of glmlocal; docs/serve.md lists what is", code="not_supported")
    return ApiError(404, f"there is no {path[:100]} here; /openapi.json lists what there is", code="not_found")


def models(state: ServerState) -> dict[str, Any]:
    """``GET /v1/models`` in OpenAI's and Anthropic's shape at once."""
    entries = [model(state, name) for name in state.served_names]
    return {
        "object": "list",
        "data": entries,
        "first_id": state.served_names[0],
        "last_id": state.served_names[-1],
        "has_more": False,
    }


def model(state: ServerState, name: str) -> dict[str, Any]:
    """One entry. Raises ApiError for a name that is not served."""
    if name not in state.served_names:
        raise ApiError(
            404, f"no model {name[:100]!r} is served, only {', '.join(state.served_names)}", "model", "model_not_found"
        )
    created = datetime.datetime.fromtimestamp(state.created, datetime.UTC)
    context = None if state.model is None else state.model.facts.context
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "glmlocal",
        "root": state.model_name,
        "max_model_len": context,
        "type": "model",
        "display_name": name,
        "lifecycle": "active",
        "max_input_tokens": context,
        "created_at": created.isoformat(timespec="seconds").replace("+00:00", "Z"),
    }


def health(state: ServerState) -> Response:
    match state.phase:
        case "ready":
            return JSONResponse({"status": "ok"})
        case "loading":
            return JSONResponse({"status": "loading", "progress": round(state.progress.fraction, 4)}, 503)
        case _:
            return JSONResponse({"status": "error", "error": state.error}, 503)


_IDLE: dict[str, Any] = {  # the engine's half before there is an engine
    "queue": {"running": 0, "waiting": 0, "max_batch": 0, "max_waiting": 0},
    "speed": {"decode_tokens_per_s": 0.0, "prefill_tokens_per_s": 0.0},
    "kv": {"used_tokens": 0, "capacity_tokens": 0},
    "prefix_cache": {"queried_tokens": 0, "hit_tokens": 0},
    "tiers": None,
    "nvme": None,
    "mtp": None,
}


def stats(state: ServerState) -> dict[str, Any]:
    """``GET /v1/stats``; docs/serve.md says what each key means."""
    served, engine = state.model, _IDLE
    if served is not None:
        engine = {**_IDLE, **served.client.stats().as_dict()}
    facts = None if served is None else served.facts
    return {
        "state": state.phase,
        "error": state.error,
        "model": {
            "name": state.model_name,
            "served_names": list(state.served_names),
            "context": facts.context if facts else 0,
            "quant": facts.quant if facts else "",
            "kv_dtype": facts.kv_dtype if facts else "",
            "mtp_drafts": facts.mtp_drafts if facts else 0,
            "supports_thinking": served is not None and served.supports_thinking,
            "supports_tools": served is not None and served.supports_tools,
        },
        "loading": state.progress.as_dict() if state.phase == "loading" else None,
        "plan": facts.plan if facts else None,
        **engine,
        "memory": {"rss_bytes": psutil.Process().memory_info().rss},
        "uptime_s": time.monotonic() - state.start_s,
    }


def metrics(context: ServerContext) -> Response:
    return Response(context.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
