"""Requests of OpenAI's responses API. Input items are read by ``responses_input``, as there are dozens of kinds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glmlocal.server import refused
from glmlocal.server.limits import MAX_MESSAGES, MAX_TOKENS, MAX_TOOLS, MAX_TOP_LOGPROBS
from glmlocal.server.openai_types import Count, Effort, Loose, Strict


def given(value: str | Loose) -> Any:
    """A setting of the request, as the response repeats it."""
    return value if isinstance(value, str) else value.model_dump(by_alias=True, exclude_unset=True, mode="json")


class ResponsesTool(Loose):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesChoice(Loose):
    type: str
    name: str | None = None


class Reasoning(Loose):
    effort: Effort | None = None


class TextFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Loose):
    format: TextFormat | None = None


class ResponsesRequest(Strict):
    """``POST /v1/responses``."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    generate: bool | None = None  # False: a probe that warms things up and wants no answer
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None  # as with OpenAI, true unless it is false

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, body: Any) -> Any:
        return refused.refuse(body, refused.RESPONSES)

    @property
    def items(self) -> list[dict[str, Any]]:
        """The input, always as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}] if self.input else []
        return self.input

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams; None: not given."""
        return {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "logprobs": (self.top_logprobs or 0) if "message.output_text.logprobs" in (self.include or ()) else None,
        }
