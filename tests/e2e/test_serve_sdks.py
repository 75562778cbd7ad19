"""The real ``openai`` and ``anthropic`` clients against the scripted engine, and both against a tiny real model."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

import agent_script
import scripted
import tiny
from served import REAL, Process, served
from serving import Running, running

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def script() -> Iterator[Running]:
    with running(agent_script.answer) as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A random model of 512 tokens of context, with room for four answers and twenty waiting ones."""
    directory = tmp_path_factory.mktemp("served")
    checkpoint = tiny.save(tiny.build_model(), tmp_path_factory.mktemp("tiny"))
    arguments = (str(checkpoint), "--batch", "4", "--max-waiting", "20", "--threads", "1", "--served-model-name", "glm")
    with served(directory, *arguments, program=REAL) as server:
        yield server


_clients: list[openai.OpenAI | anthropic.Anthropic] = []


@pytest.fixture(autouse=True)
def _closed_clients() -> Iterator[None]:
    """Connections that a client leaves open would be warnings of the next test."""
    yield
    while _clients:
        _clients.pop().close()


def openai_client(url: str) -> openai.OpenAI:
    _clients.append(client := openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0))
    return client


def anthropic_client(url: str) -> anthropic.Anthropic:
    _clients.append(client := anthropic.Anthropic(base_url=url, api_key="x", max_retries=0))
    return client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_openai_chat_with_tools(script: Running) -> None:
    client = openai_client(script.url)
    talk = user("what is the weather?")
    first = client.chat.completions.create(model="glm", messages=talk, tools=[WEATHER])
    message = first.choices[0].message
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Zürich", "days": 3}  # type: ignore[union-attr]
    talk += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    with client.chat.completions.stream(
        model="glm", messages=talk, tools=[WEATHER], stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == agent_script.FINAL
    assert final.usage is not None
    assert final.usage.prompt_tokens_details is not None
    assert (final.usage.prompt_tokens_details.cached_tokens or 0) > 100


def test_openai_responses_with_tools(script: Running) -> None:
    client = openai_client(script.url)
    tool: Any = {"type": "function", "strict": False, **WEATHER["function"]}
    with client.responses.stream(model="glm", input="what is the weather?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    call = first.output[-1]
    assert call.type == "function_call"
    given: Any = [*user("what is the weather?"), *[item.model_dump() for item in first.output]]
    given.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = client.responses.create(model="glm", input=given, tools=[tool])
    assert second.output_text == agent_script.FINAL


def test_openai_responses_are_kept_and_gone_on_from(script: Running) -> None:
    client = openai_client(script.url)
    tool: Any = {"type": "function", "strict": False, **WEATHER["function"]}
    first = client.responses.create(model="glm", input="what is the weather?", tools=[tool])
    call = first.output[-1]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    options: Any = {"model": "glm", "tools": [tool], "previous_response_id": first.id}
    with client.responses.stream(input=[result], **options) as stream:
        for _ in stream:
            pass
        second = stream.get_final_response()
    assert second.output_text == agent_script.FINAL
    assert client.responses.retrieve(second.id).output_text == agent_script.FINAL
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    forgotten = client.responses.create(model="glm", input="say «x»", store=False)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
        client.responses.create(model="glm", input="y", previous_response_id=forgotten.id)


def test_anthropic_messages_with_tools_and_thinking(script: Running) -> None:
    client = anthropic_client(script.url)
    tools: Any = [{"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}]
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    options: Any = {"model": "glm", "max_tokens": 2000, "tools": tools, "thinking": thinking}
    with client.messages.stream(messages=user("weather?"), **options) as stream:
        first = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    call = first.content[2]
    assert call.type == "tool_use"
    assert call.input == {"city": "Zürich", "days": 3}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    talk: Any = [
        *user("weather?"),
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(messages=talk, **options)
    assert second.content[-1].type == "text"
    assert second.content[-1].text == agent_script.FINAL
    assert client.messages.count_tokens(model="glm", messages=talk, tools=tools, thinking=thinking).input_tokens == (
        second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0)
    )


def test_errors_are_the_sdks_own_exceptions(script: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        openai_client(script.url).chat.completions.create(model="glm", messages=user("x"), temperature=-1)
    with pytest.raises(openai.NotFoundError):
        openai_client(script.url).models.retrieve("other")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        anthropic_client(script.url).messages.create(model="glm", messages=user("x"), max_tokens=0)
    assert [entry.id for entry in openai_client(script.url).models.list()] == ["glm"]
    assert [entry.id for entry in anthropic_client(script.url).models.list()] == ["glm"]


def test_a_real_model_streams_what_it_answers(model: Process) -> None:
    client = openai_client(model.url)
    options: Any = {
        "model": "glm",
        "messages": user("the quick brown"),
        "max_tokens": 24,
        "seed": 3,
        "temperature": 1.0,
    }
    whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **options)
    again = client.chat.completions.create(**options)
    pieces = list(client.chat.completions.create(stream=True, **options))
    message: Any = whole.choices[0].message
    text = message.reasoning_content + (message.content or "")
    deltas: list[Any] = [chunk.choices[0].delta for chunk in pieces]
    assert "".join((getattr(d, "reasoning_content", None) or "") + (d.content or "") for d in deltas) == text
    repeated: Any = again.choices[0].message
    assert repeated.reasoning_content == message.reasoning_content
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    assert len(entries) == whole.usage.completion_tokens == 24  # type: ignore[union-attr]
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


def test_a_real_model_keeps_to_a_schema_and_stops(model: Process) -> None:
    client = openai_client(model.url)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="glm", messages=user("json"), response_format=schema, seed=seed, max_tokens=400, extra_body=off
        )
        if found.choices[0].finish_reason == "stop":  # a random model may write blanks until it is cut off
            value = json.loads(found.choices[0].message.content or "")
            assert set(value) == {"a", "b"}
            break
    else:
        pytest.fail("no seed came to an end")
    three = client.chat.completions.create(model="glm", messages=user("x"), n=3, seed=1, max_tokens=12, extra_body=off)
    assert len({choice.message.content for choice in three.choices}) == 3
    plain = three.choices[0].message.content or ""
    cut = client.chat.completions.create(
        model="glm", messages=user("x"), seed=1, max_tokens=12, stop=[plain[2:4]], extra_body=off
    )
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (plain[: plain.index(plain[2:4])], "stop")


def test_sixteen_streams_at_once_are_as_when_alone(model: Process) -> None:
    def ask(number: int) -> str:
        client = openai_client(model.url)
        options: Any = {"model": "glm", "prompt": f"fox {number}", "temperature": 0, "max_tokens": 16}
        return "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **options))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(number) for number in range(16)]
    assert len(set(together)) > 8


def test_a_client_that_goes_away_frees_its_place(model: Process) -> None:
    request = {"prompt": "the quick", "max_tokens": 480, "ignore_eos": True}
    for stream in (True, False):
        before = model.metric("glmlocal_aborted_answers_total")
        with httpx.Client(base_url=model.url, timeout=0.5 if not stream else 60, trust_env=False) as http:
            if stream:
                with http.stream("POST", "/v1/completions", json={**request, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json={**request, "n": 16, "max_tokens": 500})
        end = time.monotonic() + 20
        while model.metric("glmlocal_queue_running") or model.metric("glmlocal_queue_waiting"):
            assert time.monotonic() < end, "the place is still taken"
        assert model.metric("glmlocal_aborted_answers_total") > before


def test_too_many_requests_are_told_when_to_come_back(model: Process) -> None:
    def ask(_: int) -> httpx.Response:
        with httpx.Client(base_url=model.url, timeout=120, trust_env=False) as http:
            return http.post("/v1/completions", json={"prompt": "x", "max_tokens": 200, "ignore_eos": True})

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)


def test_a_restarted_server_remembers_long_prompts(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build_model(), tmp_path / "tiny")
    prompt = [7 + number * 31 % 250 for number in range(400)]
    answers = []
    for _ in range(2):
        arguments = (str(checkpoint), "--kv-dir", str(tmp_path / "kv"), "--kv-limit", "1GiB", "--threads", "1")
        with served(tmp_path, *arguments, program=REAL) as server:
            request = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answers.append(server.http.post("/v1/completions", json=request).json())
            server.signal(signal.SIGTERM)
            assert server.exit_code() == 0
    first, second = answers
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256


def test_the_scripted_tokenizer_has_glms_tokens() -> None:
    for token in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_value>", "<|user|>"):
        assert len(scripted.tokenizer().encode(token)) == 1
