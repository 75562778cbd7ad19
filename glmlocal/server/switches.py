"""How the APIs ask for thinking, tools and formats → what the template, the parser and the engine are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmlocal.engine.request import Grammar
from glmlocal.server.errors import bad_request
from glmlocal.server.generation import ToolUse
from glmlocal.server.model import ServedModel
from glmlocal.server.openai_types import Message, NamedTool, ResponseFormat, Thinking, Tool

_NO_THINKING = ("none", "minimal")


def template_switches(
    *, effort: str | None = None, thinking: Thinking | None = None, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Variables of the template. The template's own names (``kwargs``) win over ``thinking``, and that over ``effort``.

    ``clear_thinking`` False keeps the reasoning of earlier turns in the prompt ("preserved thinking").
    """
    switches: dict[str, Any] = {}
    if effort is not None:
        switches["enable_thinking"] = effort not in _NO_THINKING
        if effort not in _NO_THINKING:
            switches["reasoning_effort"] = effort
    if thinking is not None:
        switches["enable_thinking"] = thinking.type != "disabled"
        if thinking.clear_thinking is not None:
            switches["clear_thinking"] = thinking.clear_thinking
    switches |= kwargs or {}
    if "thinking" in switches and "enable_thinking" not in (kwargs or {}):  # vLLM's other name for it
        switches["enable_thinking"] = bool(switches["thinking"])
    return switches


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as ``text.messages`` takes them; OpenAI's "developer" is the system."""
    result = []
    for message in messages:
        fields = message.model_dump(exclude_none=True, mode="json")
        if message.role == "assistant" and isinstance(message.content, list):
            fields["content"] = [_said(part) for part in fields["content"]]
        result.append(fields | {"role": "system"} if message.role == "developer" else fields)
    return result


def _said(part: Any) -> Any:
    """A part of an earlier answer; what another model refused in words was text, too."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def tool_dicts(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """The tools as the template gets them. Raises ApiError for one that is no function."""
    result = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function" or tool.function is None:
            raise bad_request(f"tools.{index} is of type {tool.type[:40]!r}; only functions can be called", "tools")
        result.append(tool.model_dump(exclude_unset=True, mode="json") | {"type": "function"})
    return result


def tool_use(tools: Sequence[Mapping[str, Any]], choice: str | NamedTool | None, parallel: bool | None) -> ToolUse:
    """Raises ApiError for a choice that cannot be."""
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if not tools:
        if only is not None or choice == "required":
            raise bad_request("tool_choice asks for a call, but there are no tools", "tool_choice")
        return ToolUse()
    names = [tool["function"]["name"] for tool in tools]
    if only is not None and only not in names:
        raise bad_request(f"tool_choice names {only[:100]!r}, which is not among the tools", "tool_choice")
    kind = "required" if only is not None else choice or "auto"
    assert kind in ("auto", "none", "required")
    return ToolUse(tools, kind, only, parallel is not False)  # type: ignore[arg-type]


def response_grammar(response_format: ResponseFormat | None) -> Grammar | None:
    """What the content must be. Raises ApiError or RequestError."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Grammar("json_object")
    schema = response_format.json_schema
    if schema is None or schema.schema_ is None:
        raise bad_request("response_format json_schema has no json_schema.schema", "response_format")
    return Grammar("json_schema", json.dumps(schema.schema_))


def after_thinking(model: ServedModel, in_reasoning: bool | None) -> int | None:
    """The token from which on a grammar holds: the end of the reasoning, where there is any."""
    return model.tokenizer.token_to_id("</think>") if in_reasoning else None
