from __future__ import annotations

import copy
from typing import Any

import pytest

from glmlocal.errors import RequestError
from glmlocal.text.messages import ROLES, normalize_messages, plain


def call(arguments: object, **extra: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}], **extra}


def arguments_of(message: dict[str, Any]) -> dict[str, Any]:
    result: Any = normalize_messages([message])[0]
    arguments: dict[str, Any] = result["tool_calls"][0]["function"]["arguments"]
    return arguments


def test_arguments_become_mappings_in_the_order_given() -> None:
    arguments = arguments_of(call('{"b": 1, "a": {"z": "\\u00fc", "y": [1.5, null, true]}, "": ""}'))
    assert arguments == {"b": 1, "a": {"z": "ü", "y": [1.5, None, True]}, "": ""}
    assert list(arguments) == ["b", "a", ""]
    assert list(arguments["a"]) == ["z", "y"]
    assert arguments_of(call({"b": 1, "a": 2})) == {"b": 1, "a": 2}


@pytest.mark.parametrize("nothing", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_mapping(nothing: object) -> None:
    assert arguments_of(call(nothing)) == {}


def test_calls_without_the_function_wrapper_are_understood() -> None:
    message: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    assert normalize_messages([message])[0]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(name: str) -> None:
    message = normalize_messages([{"role": "assistant", "content": "x", name: "hm"}])[0]
    assert message["reasoning_content"] == "hm"


def test_the_first_name_of_reasoning_wins() -> None:
    message = {"role": "assistant", "content": "x", "reasoning": "b", "reasoning_content": "a"}
    assert normalize_messages([message])[0]["reasoning_content"] == "a"


@pytest.mark.parametrize("message", [call("{}"), {"role": "assistant", "reasoning": "hm"}])
def test_an_assistant_may_say_nothing(message: dict[str, Any]) -> None:
    assert normalize_messages([message])[0]["content"] == ""


def test_parts_and_tool_results_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    results = [{"type": "tool_reference", "name": "f"}, {"output": "x"}]
    messages = [{"role": "user", "content": parts}, {"role": "tool", "content": results}]
    assert normalize_messages(messages) == messages


def test_the_callers_messages_are_never_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, call('{"a": [1]}', reasoning="hm")]
    before = copy.deepcopy(messages)
    result: Any = normalize_messages(messages)
    result[0]["content"][0]["text"] = "changed"
    result[1]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert messages == before


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list"),
        ({"role": "user"}, "messages must be a list"),
        (["hello"], "message 0 is a str"),
        ([{"content": "x"}], f"message 0 has role None; roles are {', '.join(ROLES)}"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": ["user"], "content": "x"}], "role "),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([{"role": "system", "content": None}], r"message 0 \(system\) has no content"),
        ([{"role": "user", "content": 3}], "a content of type int"),
        ([{"role": "user", "content": [3]}], "text part that is not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text part that is not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}], "'image_url'"),
        ([{"role": "tool", "content": [{"type": "image", "image": "x"}]}], "'image'; this model reads text only"),
        ([{"role": "user", "content": "ok"}, {"role": "user", "content": "a\0b"}], "message 1 holds a NUL"),
        ([{"role": "user", "content": "a\ud800"}], "half a surrogate pair"),
        ([{"role": "user", "content": "x", "k\udfff": 1}], "half a surrogate pair"),
        ([call('{"a": "\\ud800"}')], "half a surrogate pair"),
        ([call('{"a": "\\u0000"}')], "NUL"),
        ([call("{")], "message 0, tool call 0 has arguments that are not valid JSON"),
        ([call("[" * 100_000)], "not valid JSON"),
        ([call("9" * 5000)], "not valid JSON"),
        ([call("[1]")], "not a JSON object"),
        ([call(3)], "not a JSON object"),
        ([call('{"a": NaN}')], "holds nan"),
        ([call('{"a": 1e999}')], "holds inf"),
        ([{"role": "assistant", "content": "", "tool_calls": "x"}], "tool_calls that are not a list"),
        ([{"role": "assistant", "content": "", "tool_calls": ["x"]}], "tool call 0 is not an object"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}], "without|not an object"),
        ([{"role": "assistant", "content": "", "reasoning": ["x"]}], "reasoning that is not text"),
        ([{"role": "user", "content": "x", "n": object()}], "holds a object"),
        ([{"role": "user", "content": "x", "n": {1: 2}}], "key that is not a string"),
    ],
)
def test_malformed_messages_are_refused_by_index(messages: Any, wanted: str) -> None:
    with pytest.raises(RequestError, match=wanted) as caught:
        normalize_messages(messages)
    assert "\n" not in str(caught.value)


def test_depth_is_limited() -> None:
    deep: object = "x"
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        plain(deep, "tools")
