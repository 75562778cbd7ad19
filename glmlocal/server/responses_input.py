"""Items of the responses API → messages, and back to items for what is remembered of a reasoning.

Clients get reasoning as ``reasoning_text`` and, where they ask for ``reasoning.encrypted_content``, once more in that
field: not encrypted, only encoded. Codex sends back nothing else, and without it the reasoning of a tool loop is lost.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Final

from glmlocal.engine.request import Grammar
from glmlocal.server.errors import bad_request
from glmlocal.server.generation import ToolUse
from glmlocal.server.limits import MAX_MESSAGES
from glmlocal.server.openai_types import JsonSchema, NamedFunction, NamedTool, ResponseFormat
from glmlocal.server.prompts import Conversation
from glmlocal.server.responses_types import ResponsesRequest
from glmlocal.server.switches import response_grammar, template_switches, tool_use

_SEALED: Final = "glmlocal1:"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")


def conversation(body: ResponsesRequest, history: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """``history``: the items before the input. Raises ApiError for items that are not text, naming them.

    Unknown kinds of items and tools are skipped.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for index, item in enumerate((*history, *body.items), -len(history)):
        _add(messages, item, f"input.{index}")
    if len(messages) > MAX_MESSAGES:
        raise bad_request(f"the conversation has {len(messages):,} messages, at most {MAX_MESSAGES:,}", "input")
    effort = body.reasoning.effort if body.reasoning is not None else None
    return Conversation(messages, _tools(body), template_switches(effort=effort, kwargs=body.chat_template_kwargs))


def is_probe(body: ResponsesRequest) -> bool:
    """Is there nothing to answer?"""
    return body.generate is False or not body.input


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    match item.get("type", "message"):
        case "message":
            role = _ROLES.get(str(item.get("role")))
            if role is None:
                raise bad_request(f"{where} has role {str(item.get('role'))[:40]!r}", where)
            text = _text(item.get("content"), where)
            if role == "assistant":
                turn = _assistant(messages)
                turn["content"] += text
            else:
                messages.append({"role": role, "content": text})
        case "reasoning":
            text = _reasoning(item, where)
            if text:
                turn = _assistant(messages)
                turn["reasoning_content"] = turn.get("reasoning_content", "") + text
        case "function_call" if item.get("status") == "incomplete":
            pass  # cut off by max_output_tokens: half a JSON, which nobody has run
        case "function_call":
            name, arguments = item.get("name"), item.get("arguments")
            if not isinstance(name, str) or not isinstance(arguments, str):
                raise bad_request(f"{where} is a function_call without a name or arguments", where)
            function = {"name": name, "arguments": arguments}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            content = _text(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        case _:
            pass  # of OpenAI's own tools: nothing that this model could have said or seen


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The turn that the items of one answer belong to: reasoning, text and calls come one by one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} has a content that is neither text nor a list of parts", where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise bad_request(f"{where} has a part of type {str(kind)[:40]!r}; this model reads text only", where)
        texts.append(text)
    return "".join(texts)


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    """What the model thought; a summary of another model's thoughts is better than nothing."""
    sealed = item.get("encrypted_content")
    if isinstance(sealed, str) and sealed.startswith(_SEALED):
        try:
            return base64.b64decode(sealed[len(_SEALED) :], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise bad_request(f"{where} has an encrypted_content that was not made here", where) from None
    return _text(item.get("content") or item.get("summary"), where)


def seal(reasoning: str) -> str:
    """What goes out as ``encrypted_content``."""
    return _SEALED + base64.b64encode(reasoning.encode()).decode()


def _tools(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Functions only; what runs at OpenAI or in a client's own grammar is skipped."""
    result = []
    for tool in body.tools or ():
        if tool.type != "function" or not tool.name:
            continue
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
        result.append({"type": "function", "function": function})
    return result


def use_of_tools(body: ResponsesRequest, conversation: Conversation) -> ToolUse:
    """Raises ApiError for a choice that cannot be."""
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return tool_use(conversation.tools, choice, body.parallel_tool_calls)
    if choice.type != "function" or choice.name is None:
        return tool_use(conversation.tools, "auto", body.parallel_tool_calls)
    named = NamedTool(type="function", function=NamedFunction(name=choice.name))
    return tool_use(conversation.tools, named, body.parallel_tool_calls)


def text_grammar(body: ResponsesRequest) -> Grammar | None:
    """Of ``text.format``. Raises ApiError or RequestError."""
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return None
    schema = JsonSchema.model_validate({"schema": wanted.schema_}) if wanted.schema_ is not None else None
    return response_grammar(ResponseFormat(type=wanted.type, json_schema=schema))
