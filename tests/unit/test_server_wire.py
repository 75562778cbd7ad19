"""What goes over the wire is what the ``openai`` and ``anthropic`` packages say it is: their types, in strict mode."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import agent_script
import scripted
from serving import Running, events, running

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "get_weather", "parameters": PARAMETERS}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "two": {"n": 2},
    "tools": {"tools": [{"type": "function", "function": FUNCTION}]},
    "cut": {"tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 30},
    "no thinking": {"reasoning_effort": "none"},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {
        "tools": [{"type": "function", **FUNCTION, "strict": False}, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "get_weather"},
    },
    "format": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}},
    "sealed": {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}},
    "cut": {"tools": [{"type": "function", **FUNCTION, "strict": None}], "max_output_tokens": 30},
    "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "probe": {"input": []},
}
MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "tools": {
        "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
        "thinking": {"type": "adaptive"},
    },
    "stop": {"stop_sequences": ["You", "some"]},
    "cut": {"max_tokens": 3},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(agent_script.answer) as server:
        yield server


adapter = functools.cache(TypeAdapter)


def check(kind: Any, data: str | bytes) -> Any:
    return adapter(kind).validate_json(data, strict=True)


def streamed(server: Running, path: str, body: dict[str, Any]) -> list[tuple[str | None, Any]]:
    answer = server.post(path, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", CHATS)
def test_chat(server: Running, name: str) -> None:
    body = {"messages": user("hello"), **CHATS[name]}
    whole = check(ChatCompletion, server.post("/v1/chat/completions", body).content)
    found = streamed(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert found[-1] == (None, "[DONE]")
    chunks = [check(ChatCompletionChunk, json.dumps(data)) for _, data in found[:-1]]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(each.delta.role is None for each in mine[1:])
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason == choice.finish_reason
        assert "".join(each.delta.content or "" for each in mine) == (choice.message.content or "")
        if choice.logprobs is not None:
            entries = [entry for each in mine if each.logprobs for entry in each.logprobs.content]
            assert entries == choice.logprobs.content


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(server: Running, name: str) -> None:
    body = {"input": "hello", **RESPONSES[name]}
    whole = check(Response, server.post("/v1/responses", body).content)
    found = streamed(server, "/v1/responses", body)
    told = [check(ResponseStreamEvent, json.dumps(data)) for _, data in found]
    assert [kind for kind, _ in found] == [event.type for event in told]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert told[-1].type == f"response.{whole.status}"
    for response in (whole, told[0].response, told[-1].response):
        assert [tool.to_dict() for tool in response.tools] == body.get("tools", [])
        choice = response.tool_choice if isinstance(response.tool_choice, str) else response.tool_choice.to_dict()
        assert choice == body.get("tool_choice", "auto")
        assert response.text.format.to_dict() == body.get("text", {}).get("format", {"type": "text"})
    assert [item.type for item in whole.output] == [item.type for item in told[-1].response.output]


def test_responses_have_the_logprobs_of_their_text_and_of_nothing_else(server: Running) -> None:
    body = {"input": "say «größer ☃ als»", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = server.post("/v1/responses", body).json()["output"][-1]["content"][0]
    assert part["text"] == "größer ☃ als".replace("☃", part["text"][7])
    spelled = bytes(byte for entry in part["logprobs"] for byte in entry["bytes"])
    assert spelled.decode() == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    deltas = [data for kind, data in streamed(server, "/v1/responses", body) if kind == "response.output_text.delta"]
    assert all(bytes(b for e in data["logprobs"] for b in e["bytes"]).decode() == data["delta"] for data in deltas)
    assert server.post("/v1/responses", {"input": "x", "top_logprobs": 2}).json()["output"][-1]["content"][0] == {
        "type": "output_text",
        "text": "Hello! You said something of 1 characters.",
        "annotations": [],
        "logprobs": [],
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(server: Running, name: str) -> None:
    body = {"model": "claude-x", "max_tokens": 2000, "messages": user("weather, hello"), **MESSAGES[name]}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b-2026-01-01", "x-api-key": "k"}
    answer = server.post("/v1/messages?beta=true", body, headers=headers)
    whole = check(Message, answer.content)
    found = streamed(server, "/v1/messages", body)
    told = [check(RawMessageStreamEvent, json.dumps(data)) for kind, data in found if kind != "ping"]
    assert [kind for kind, _ in found if kind != "ping"] == [event.type for event in told]
    assert (told[0].type, told[-2].type, told[-1].type) == ("message_start", "message_delta", "message_stop")
    assert found[1] == ("ping", {"type": "ping"})
    opened = [event.index for event in told if event.type == "content_block_start"]
    assert opened == [event.index for event in told if event.type == "content_block_stop"] == [*range(len(opened))]
    assert len(opened) == len(whole.content)
    assert (told[-2].delta.stop_reason, told[-2].delta.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert told[-2].usage.output_tokens == whole.usage.output_tokens
    counted = server.post(
        "/v1/messages/count_tokens", {k: v for k, v in body.items() if k in ("messages", "tools", "thinking")}
    )
    usage = whole.usage
    assert check(MessageTokensCount, counted.content).input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_completions_and_models(server: Running) -> None:
    answer = server.post("/v1/completions", {"prompt": ["ab", "c"], "n": 2, "logprobs": 2, "seed": 1})
    assert len(check(Completion, answer.content).choices) == 4
    listed = server.http.get("/v1/models").json()
    for kind in (Model, ModelInfo):
        check(kind, json.dumps(listed["data"][0]))
        check(kind, server.http.get("/v1/models/glm").content)
    assert listed["data"][0]["max_input_tokens"] == 1 << 17


def test_methods_that_a_path_has_not(server: Running) -> None:
    for path, allowed in {
        "/v1/chat/completions": "POST",
        "/v1/models": "GET, HEAD",
        "/v1/responses": "POST",
        "/v1/responses/x": "DELETE, GET, HEAD",
    }.items():
        answer = server.http.request("PUT", path, json={})
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    for path in ("/", "/health", "/v1/models", "/metrics", "/openapi.json"):
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert server.http.head("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("chat/completions", "functions", [FUNCTION]),
        ("chat/completions", "guided_json", {"type": "object"}),
        ("chat/completions", "guided_choice", ["a", "b"]),
        ("chat/completions", "structured_outputs", {"regex": "a"}),
        ("chat/completions", "continue_final_message", True),
        ("chat/completions", "modalities", ["text", "audio"]),
        ("chat/completions", "audio", {"voice": "alloy"}),
        ("chat/completions", "web_search_options", {"search_context_size": "low"}),
        ("responses", "conversation", "conv_1"),
        ("responses", "prompt", {"id": "pmpt_1"}),
    ],
)
def test_what_would_be_ignored_at_a_cost_is_refused(server: Running, path: str, field: str, value: Any) -> None:
    body = {"input": "x"} if path == "responses" else {"messages": user("x")}
    answer = server.post(f"/v1/{path}", {**body, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert field in answer.json()["error"]["message"]
    for nothing in (None, ["text"] if field == "modalities" else []):
        assert server.post(f"/v1/{path}", {**body, field: nothing}).status_code == 200


def test_a_refusal_of_another_model_is_text(server: Running) -> None:
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "never ever"}]}
    body = {"messages": [*user("a"), refusal, *user("b")]}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert "never ever" in scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)


def test_every_answer_has_a_number_that_the_log_has_too(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "glmlocal.server"):
        answers = [server.http.get("/nothing"), server.post("/v1/messages/count_tokens", {"messages": user("x")})]
    numbers = [answer.headers["x-request-id"] for answer in answers]
    assert numbers == [answer.headers["request-id"] for answer in answers]
    assert len(set(numbers)) == 2
    assert all(number in caplog.text for number in numbers)
