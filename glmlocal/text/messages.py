"""What a chat template is given: a checked copy of the caller's messages, in plain JSON types."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from glmlocal.errors import RequestError
from glmlocal.text.files import quoted

ROLES = ("system", "user", "assistant", "tool")
_MAX_DEPTH = 64
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # the first is the one that templates read


def normalize_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """A copy with tool-call arguments as mappings, reasoning as ``reasoning_content`` and no None content.

    Raises RequestError naming the message: unknown role, no content, an image or other non-text part, arguments that
    are not a JSON object, text that is not valid Unicode or holds NUL, values that JSON does not have.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of objects with a role and a content")
    if not messages:
        raise RequestError("messages is empty; a conversation needs at least one message")
    return [_message(message, f"message {index}") for index, message in enumerate(messages)]


def plain(value: object, where: str, depth: int = 0) -> object:
    """A deep copy in JSON types; ``where`` names the value in the RequestError."""
    if isinstance(value, str):
        return _text(value, where)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(f"{where} holds {value}, which JSON does not have")
        return value
    if depth == _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; only JSON values can be rendered")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise RequestError(f"{where} has a key that is not a string: {quoted(key)}")
    return _text(key, where)


def _text(text: str, where: str) -> str:
    if "\0" in text:
        raise RequestError(f"{where} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half a surrogate pair and is not valid Unicode") from None
    return text


def _message(message: Mapping[str, object], where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}, not an object with a role and a content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where} has role {quoted(role)}; roles are {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    copy = {key: value for key, value in message.items() if key != "tool_calls"}
    if calls:
        copy["tool_calls"] = _tool_calls(calls, where)
    result = plain(copy, where)
    assert isinstance(result, dict)
    if role == "assistant":
        reasoning = next((result[key] for key in _REASONING_FIELDS if result.get(key) is not None), None)
        if reasoning is not None:
            if not isinstance(reasoning, str):
                raise RequestError(f"{where} has reasoning that is not text")
            result["reasoning_content"] = reasoning
        if result.get("content") is None:
            result["content"] = ""  # templates would print "None"
    _check_content(result.get("content"), str(role), where)
    return result


def _check_content(content: object, role: str, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        found = "no content" if content is None else f"a content of type {type(content).__name__}"
        raise RequestError(f"{where} ({role}) has {found}; it must be text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str)):
            continue
        if role == "tool" and isinstance(part, dict) and kind not in _MEDIA:
            continue  # results in a form of the template's own
        if kind is None or kind == "text":
            raise RequestError(f"{where} ({role}) has a text part that is not text")
        raise RequestError(f"{where} ({role}) has a content part of type {quoted(kind)}; this model reads text only")


_MEDIA = {
    *("audio", "audio_url", "file", "image", "image_url", "input_audio", "input_file", "input_image"),
    *("input_video", "video", "video_url"),
}


def _tool_calls(calls: object, where: str) -> list[dict[str, object]]:
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where} has tool_calls that are not a list")
    result = []
    for index, call in enumerate(calls):
        name = f"{where}, tool call {index}"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name} is not an object with a function name")
        function = {**function, "arguments": _arguments(function.get("arguments"), name)}
        result.append({**call, "function": function} if "function" in call else function)
    return result


def _arguments(arguments: object, where: str) -> Mapping[str, object]:
    """OpenAI clients send a JSON text; templates want the mapping. Key order is kept."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} has arguments that are not valid JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where} has arguments that are not a JSON object")
    return arguments
