"""Anthropic's messages, tools and switches → OpenAI's, which the chat template knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from glmlocal.engine.request import Grammar
from glmlocal.server.anthropic_types import CountRequest
from glmlocal.server.errors import bad_request
from glmlocal.server.generation import ToolUse
from glmlocal.server.openai_types import NamedFunction, NamedTool
from glmlocal.server.prompts import Conversation
from glmlocal.server.switches import tool_use

# Claude Code puts a line with a hash of each request first; it would end every prefix that the cache could find.
BILLING_HEADER: Final = "x-anthropic-billing-header:"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation(body: CountRequest) -> Conversation:
    """Raises ApiError for blocks that are not text, naming them."""
    messages: list[dict[str, Any]] = []
    system = _system(body.system)
    if system:
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        where = f"messages.{index}.content"
        if message.role == "system":
            text = _system(message.content)
            messages += [{"role": "system", "content": text}] if text else []
        elif message.role == "assistant":
            messages.append(_assistant(message.content, where))
        else:
            messages += _user(message.content, where)
    thinking = body.thinking is not None and body.thinking.type != "disabled"
    switches: dict[str, Any] = {"enable_thinking": thinking}
    if body.output_config is not None and body.output_config.effort is not None:
        switches["reasoning_effort"] = body.output_config.effort
    if _keeps_thinking(body):
        switches["clear_thinking"] = False
    return Conversation(messages, _tools(body), switches)


def _keeps_thinking(body: CountRequest) -> bool:
    """Claude Code asks for all earlier thinking to stay: ``{"type": "clear_thinking_20251015", "keep": "all"}``."""
    edits = body.context_management.edits if body.context_management is not None else None
    return any(edit.type.startswith("clear_thinking") and edit.keep == "all" for edit in edits or ())


def use_of_tools(body: CountRequest, tools: Sequence[Mapping[str, Any]]) -> ToolUse:
    """Raises ApiError for a choice that cannot be."""
    choice = body.tool_choice
    if choice is None:
        return tool_use(tools, None, None)
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if choice.name is None:
            raise bad_request("tool_choice of type tool has no name", "tool_choice.name")
        return tool_use(tools, NamedTool(type="function", function=NamedFunction(name=choice.name)), parallel)
    return tool_use(tools, _CHOICES[choice.type], parallel)


def output_grammar(body: CountRequest) -> Grammar | None:
    """Structured outputs: ``output_format``, or ``output_config.format``. Raises ApiError or RequestError."""
    wanted = body.output_format or (body.output_config.format if body.output_config is not None else None)
    if wanted is None or wanted.type is None:
        return None
    if wanted.type != "json_schema" or wanted.schema_ is None:
        raise bad_request("output_format must be of type json_schema and have a schema", "output_format")
    return Grammar("json_schema", json.dumps(wanted.schema_))


def _system(system: str | list[dict[str, Any]] | None) -> str:
    if system is None:
        return ""
    texts = [system] if isinstance(system, str) else [_text(block, "system") for block in system]
    return "\n\n".join(kept for text in texts if (kept := _without_billing(text)))


def _without_billing(text: str) -> str:
    if not text.startswith(BILLING_HEADER):
        return text
    return text.partition("\n")[2].lstrip("\n")


def _text(block: Mapping[str, Any], where: str) -> str:
    kind, text = block.get("type"), block.get("text")
    if kind != "text":
        raise bad_request(f"{where} has a block of type {str(kind)[:40]!r}; this model reads text only", where)
    if not isinstance(text, str):
        raise bad_request(f"{where} has a text block without text", where)
    return text


def _assistant(content: str | list[dict[str, Any]], where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        match block.get("type"):
            case "thinking":
                reasoning.append(str(block.get("thinking") or ""))
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_call(block, where))
            case _:
                texts.append(_text(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise bad_request(f"{where} has a tool_use without a name or with an input that is no object", where)
    return {"id": block.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _user(content: str | list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools first, each a message of its own, then what the user says."""
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    for block in content:
        if block.get("type") == "tool_result":
            result = _result(block.get("content"), where)
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
    said = [_text(block, where) for block in content if block.get("type") != "tool_result"]
    if said:
        yield {"role": "user", "content": "\n\n".join(said)}


def _result(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise bad_request(f"{where} has a tool_result that is neither text nor a list of blocks", where)
    texts = []
    for block in content:
        if block.get("type") == "tool_reference":  # of a tool search: the tool is in the list already
            texts.append(str(block.get("tool_name", "")))
        else:
            texts.append(_text(block, where))
    return "\n".join(texts)


def _tools(body: CountRequest) -> list[dict[str, Any]]:
    """Functions; Anthropic's own tools (web search, bash …) run at Anthropic and are left out."""
    functions = [tool for tool in body.tools or () if tool.type in (None, "custom")]
    result = []
    for tool in functions:
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
        result.append({"type": "function", "function": function})
    return result
