"""Grammars for what an answer must be: a format for its content, calls that have to be made, or a choice of both.

Calls are written in GLM's own form, with its tags as tokens; llguidance's Lark dialect names those like the tags. The
arguments follow the tool's schema: required ones in its order, strings as free text, other types as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from glmlocal.engine.grammar import JSON_SPACE
from glmlocal.engine.request import MAX_GRAMMAR_CHARS, Grammar
from glmlocal.server.errors import bad_request
from glmlocal.server.generation import ToolUse
from glmlocal.text.tokenizer import Tokenizer
from glmlocal.text.tool_schema import ArgumentTypes

_TAGS: Final = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_COMMON: Final = r"""
NL: /[ \n]{1,4}/
TEXT: /(.|\n)+/
any_pair: <arg_key> /[^\n]+/ </arg_key> NL? <arg_value> TEXT? </arg_value> NL?
"""


def answer_grammar(content: Grammar | None, use: ToolUse, tokenizer: Tokenizer | None) -> Grammar | None:
    """The grammar of a whole answer after its reasoning; None: anything goes.

    Raises ApiError where calls are required of a model whose tokenizer has no tokens for them.
    """
    must_call = bool(use.tools) and use.choice == "required"
    may_call = bool(use.tools) and use.choice != "none"
    if not must_call and (content is None or not may_call):
        return content
    if tokenizer is None or any(tokenizer.token_to_id(tag) is None for tag in _TAGS):
        if not must_call:
            return content
        raise bad_request("tool_choice cannot require a call: this model has no tokens for tool calls", "tool_choice")
    source = _source(content if not must_call else None, use, with_types=True)
    if len(source) > MAX_GRAMMAR_CHARS:  # the names are what matters most
        source = _source(content if not must_call else None, use, with_types=False)
    return Grammar("lark", source)


def _source(content: Grammar | None, use: ToolUse, *, with_types: bool) -> str:
    functions = [tool["function"] for tool in use.tools if use.only in (None, tool["function"]["name"])]
    more = "(NL? call)*" if use.parallel and use.only is None else ""
    start = f"NL? call {more} NL?"
    if content is not None:
        schema = json.loads(content.source) if content.kind == "json_schema" else {"type": "object"}
        start = f"({start}) | NL? {_json(schema)}"
    names = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules = [f"start: {start}", f"call: <tool_call> ({names}) </tool_call>"]
    for number, function in enumerate(functions):
        rules += _call(number, function, with_types=with_types)
    return "\n".join(rules) + _COMMON


def _call(number: int, function: Mapping[str, Any], *, with_types: bool) -> Iterator[str]:
    """The rules of one function: its name and its arguments."""
    name, parameters = json.dumps(function["name"], ensure_ascii=False), function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    types = ArgumentTypes(parameters)
    if not with_types or not isinstance(properties, Mapping) or types.is_union:
        yield f"call_{number}: {name} NL? any_pair*"
        return
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    wanted = set(required) if isinstance(required, list) else set()
    pairs = []
    for index, key in enumerate(properties):
        rule = f"pair_{number}_{index}"
        pairs.append(rule if key in wanted else f"{rule}?")
        yield f"{rule}: {_pair(key, types, properties[key])}"
    yield f"call_{number}: {name} NL? {' '.join(pairs)}"


def _pair(key: str, types: ArgumentTypes, schema: object) -> str:
    name = json.dumps(key, ensure_ascii=False)
    return f"<arg_key> {name} </arg_key> NL? <arg_value> {_value(key, types, schema)} </arg_value> NL?"


def _value(key: str, types: ArgumentTypes, schema: object) -> str:
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
        return _one_of(choices)
    as_json = types.json_schema(key)
    return "TEXT?" if as_json is None else _json(as_json)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_SPACE})}"


def _one_of(choices: Sequence[str]) -> str:
    return "(" + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices) + ")"
