"""Requests of OpenAI's chat and completions APIs, with the extras that vLLM and z.ai have.

Fields that mean nothing here (``user``, ``store``, ``metadata`` …) are let through and ignored, as clients send many;
those that mean much are refused (``refused``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glmlocal.server import refused
from glmlocal.server.errors import bad_request
from glmlocal.server.limits import (
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_N,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids"),
)
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Strict(BaseModel):
    """Numbers are numbers: "1" is not 1, and true is not either."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Loose(BaseModel):
    """The same, but fields that are not named here are kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class Sampling(Strict):
    """How tokens are chosen; what is not given comes from the model's generation_config."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    max_tokens: Count | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams; None: not given. Raises ApiError for a stop or a bias that is none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop and not all(stop):
            raise bad_request("stop holds an empty string, which would end every answer before it begins", "stop")
        return {
            **{name: getattr(self, name) for name in _SAMPLING},
            "stop": tuple(stop) if stop else None,
            "logit_bias": _biases(self.logit_bias),
        }


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 11):
            raise bad_request(f"logit_bias has the key {token[:40]!r}, wanted a token id", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request(f"logit_bias of token {token} is {bias}, wanted -100 … 100", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_progress: bool | None = None  # ours: chunks with prefill_progress while the prompt is processed


class Message(Loose):
    """A message; reasoning of past answers may come as ``reasoning_content`` or ``reasoning``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class Function(Loose):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    type: str = "function"
    function: Function | None = None


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(Loose):
    """z.ai's switch: ``{"type": "enabled", "clear_thinking": false}``."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    clear_thinking: bool | None = None


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, body: Any) -> Any:
        return refused.refuse(body, refused.CHAT)

    def sampling(self) -> dict[str, Any]:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        given = super().sampling()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        return {**given, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionRequest(Sampling):
    """``POST /v1/completions``: text or token ids as they stand, without the chat template."""

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    user: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)  # 0: to have the prompt echoed with its logprobs

    def sampling(self) -> dict[str, Any]:
        prompt_logprobs = self.logprobs if self.echo else None
        return {**super().sampling(), "logprobs": self.logprobs, "prompt_logprobs": prompt_logprobs}
