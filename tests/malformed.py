"""Requests that are wrong in many ways: right ones, of which a piece was replaced, cut or repeated."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import httpx

_CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"}]
_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
RIGHT: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "messages": [*_CHAT, {"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "content": "1"}],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": "auto",
            "max_tokens": 8,
            "stop": ["x"],
            "logit_bias": {"5": 1.0},
            "n": 2,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
            "chat_template_kwargs": {"enable_thinking": False},
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "echo": True, "logprobs": 1, "seed": 1}),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "max_output_tokens": 8,
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
        },
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 8,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "thinking": {"type": "enabled", "budget_tokens": 100},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("/tokenize", {"messages": _CHAT, "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**30), "", "x", "x" * 1000, "\0", "\ud800", "<tool_call>", "{}"),
    *([], {}, [[]], [None], {"": None}, {"type": "image_url"}, {"$ref": "#"}, float("nan"), float("inf"), 1e308),
]


def mutated(value: Any, chaos: random.Random) -> Any:
    """A copy with one to three pieces replaced, removed or doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(chaos.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            keys = node.keys() if isinstance(node, dict) else range(len(node))
            for key in keys:
                places.append((node, key))
                if isinstance(node[key], dict | list):
                    stack.append(node[key])
        node, key = chaos.choice(places)
        match chaos.randrange(4):
            case 0 if node is not root:
                del node[key]
            case 1 if isinstance(node, list) and node is not root:
                node.insert(key, copy.deepcopy(node[key]))
            case _:
                node[key] = copy.deepcopy(chaos.choice(WRONG))
        if not root:
            root = [None]
    return root[0]


def send(http: httpx.Client, chaos: random.Random) -> int:
    """One malformed request; its status."""
    path, right = chaos.choice(RIGHT)
    body = json.dumps(mutated(right, chaos)).encode("utf-8", "surrogatepass")
    if chaos.random() < 0.1:
        cut = chaos.randrange(len(body))
        body = chaos.choice([body[:cut], body[:cut] + bytes([chaos.randrange(256)]) + body[cut:]])
    return http.post(path, content=body, headers={"content-type": "application/json"}).status_code
