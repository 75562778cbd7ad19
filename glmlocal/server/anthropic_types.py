"""Requests of Anthropic's messages API. Fields that mean nothing here (``metadata``, ``cache_control``) are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from glmlocal.server.errors import bad_request
from glmlocal.server.limits import MAX_MESSAGES, MAX_STOPS, MAX_TOKENS, MAX_TOOLS
from glmlocal.server.openai_types import Count, Loose, Strict


class AnthropicMessage(Loose):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Loose):
    name: str = Field(min_length=1, max_length=256)
    type: str | None = None  # None and "custom": a function; others are Anthropic's own tools
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(Loose):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Loose):
    type: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class OutputConfig(Loose):
    effort: str | None = None
    format: OutputFormat | None = None


class ContextEdit(Loose):
    type: str
    keep: Any = None


class ContextManagement(Loose):
    edits: list[ContextEdit] | None = None


class CountRequest(Strict):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)

    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams; None: not given. Raises ApiError for an empty stop sequence."""
        if self.stop_sequences and not all(self.stop_sequences):
            raise bad_request("stop_sequences holds an empty string", "stop_sequences")
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": tuple(self.stop_sequences) if self.stop_sequences else None,
        }
