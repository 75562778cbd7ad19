"""What the server serves: a loaded model as values, the engine behind its seam, and the state of loading it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from glmlocal.engine.request import Request, RequestOutput
from glmlocal.errors import CheckpointError
from glmlocal.server.errors import ApiError
from glmlocal.server.raw_calls import RawCalls
from glmlocal.text.chat_template import ChatTemplate
from glmlocal.text.model_text import ModelText
from glmlocal.text.tokenizer import Tokenizer


class EngineStats(Protocol):
    """The engine's half of ``/v1/stats``."""

    def as_dict(self) -> dict[str, Any]: ...


class EngineClient(Protocol):
    """The engine as the server sees it; ``submit`` raises RequestError or QueueFull before its first item."""

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What ``/v1/stats`` and ``/v1/models`` say of the model."""

    name: str
    context: int
    quant: str
    kv_dtype: str
    mtp_drafts: int
    plan: Mapping[str, Any] | None = None  # {"devices": [...]}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that answers."""

    facts: ModelFacts
    text: ModelText
    client: EngineClient
    raw_calls: RawCalls = field(default_factory=RawCalls)

    @property
    def tokenizer(self) -> Tokenizer:
        if self.text.tokenizer is None:
            raise CheckpointError(f"{self.facts.name} has no tokenizer; only prompts of token ids can be completed")
        return self.text.tokenizer

    @property
    def template(self) -> ChatTemplate:
        if self.text.chat_template is None:
            raise ApiError(
                400,
                f"{self.facts.name} is a base model: it has no chat template; use /v1/completions",
                code="base_model",
            )
        return self.text.chat_template

    @property
    def supports_thinking(self) -> bool:
        return self.text.chat_template is not None and self.text.chat_template.supports_thinking

    @property
    def supports_tools(self) -> bool:
        return self.text.chat_template is not None and "tool" in self.text.chat_template.source


@dataclass(slots=True)
class LoadProgress:
    """How far loading is; written by the loading thread, read by the event loop."""

    done_bytes: int = 0
    total_bytes: int = 0
    start_s: float = field(default_factory=time.monotonic)

    def report(self, done_bytes: int, total_bytes: int) -> None:
        self.done_bytes, self.total_bytes = done_bytes, total_bytes

    @property
    def fraction(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0

    def as_dict(self) -> dict[str, Any]:
        elapsed_s, fraction = time.monotonic() - self.start_s, self.fraction
        eta_s = elapsed_s * (1 - fraction) / fraction if fraction > 0 else None
        return {"done_bytes": self.done_bytes, "total_bytes": self.total_bytes, "eta_s": eta_s, "tier": "ram"}


@dataclass(slots=True)
class ServerState:
    """The one mutable value of the server: what there is to answer with."""

    model_name: str
    served_names: tuple[str, ...]
    progress: LoadProgress = field(default_factory=LoadProgress)
    model: ServedModel | None = None
    error: str | None = None
    start_s: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def phase(self) -> Literal["loading", "ready", "error"]:
        if self.error is not None:
            return "error"
        return "loading" if self.model is None else "ready"

    def ready(self) -> ServedModel:
        """The model. Raises ApiError (503) while there is none."""
        if self.error is not None:
            raise ApiError(503, f"the model could not be loaded: {self.error}", code="load_error")
        if self.model is None:
            left_s = self.progress.as_dict()["eta_s"]
            retry_after = 2 if left_s is None else max(1, min(60, round(left_s)))
            raise ApiError(
                503,
                f"the model is being loaded ({self.progress.fraction:.0%}); try again in {retry_after} s",
                code="loading",
                headers={"Retry-After": str(retry_after)},
            )
        return self.model

    def answering(self, wanted: str | None) -> dict[str, str]:
        """The header that says which model answers, where the client named another."""
        if wanted is None or wanted in self.served_names:
            return {}
        return {"x-glmlocal-model": self.served_names[0]}
