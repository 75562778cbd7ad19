from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import agent_script
import scripted
from serving import Running, events, running

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module", params=["a", "b"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(agent_script.answer, request.param) as server:
        yield server


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def streamed(server: Running, body: dict[str, Any]) -> list[Any]:
    answer = server.post("/v1/chat/completions", {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert found[-1] == (None, "[DONE]")
    return [data for _, data in found[:-1]]


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """What a client puts together from the chunks of one choice."""
    result: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish_reason": None, "logprobs": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            result["content"] += delta.get("content") or ""
            result["reasoning"] += delta.get("reasoning_content") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                entry = result["calls"].setdefault(call["index"], {"name": "", "arguments": "", "id": ""})
                entry["id"] += call.get("id", "")
                entry["name"] += call["function"].get("name", "")
                entry["arguments"] += call["function"]["arguments"]
            result["finish_reason"] = choice["finish_reason"] or result["finish_reason"]
            result["logprobs"] += (choice["logprobs"] or {}).get("content", ())
    return result


def test_an_answer_has_reasoning_content_usage_and_timings(server: Running) -> None:
    found = server.chat("say «Grüße 🌦»")
    [choice] = found["choices"]
    assert choice["message"]["content"] == "Grüße 🌦"
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] == "Let me see."
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(server.client.requests[-1].prompt_token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert set(found["timings"]) == {
        "time_to_first_token_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "total_s",
    }


def test_a_stream_is_the_same_answer(server: Running) -> None:
    for body in (
        {"messages": messages("say «one\n two»")},
        {"messages": messages('call get_weather {"city": "Zü\\"rich", "days": 3}'), "tools": [WEATHER]},
        {"messages": messages("say «abcdef»"), "stop": ["cd"], "logprobs": True, "top_logprobs": 2},
        {"messages": messages("say «abcdef»"), "max_tokens": 20, "seed": 3},
    ):
        whole = server.post("/v1/chat/completions", body).json()["choices"][0]
        chunks = streamed(server, body)
        parts = joined(chunks)
        assert parts["content"] == (whole["message"]["content"] or "")
        assert parts["reasoning"] == whole["message"].get("reasoning_content", "")
        assert parts["finish_reason"] == whole["finish_reason"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in whole["message"].get("tool_calls", ())]
        assert [(call["name"], call["arguments"]) for call in parts["calls"].values()] == calls
        assert parts["logprobs"] == ((whole["logprobs"] or {}).get("content") or [])
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all("usage" not in chunk for chunk in chunks)


def test_a_tool_call_its_result_and_an_answer(server: Running) -> None:
    talk = messages("what is the weather?")
    first = server.post("/v1/chat/completions", {"messages": talk, "tools": [WEATHER]}).json()["choices"][0]
    [call] = first["message"]["tool_calls"]
    assert first["finish_reason"] == "tool_calls"
    assert first["message"]["content"] == "I will look."
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich", "days": 3}
    talk += [first["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    found = server.post("/v1/chat/completions", {"messages": talk, "tools": [WEATHER]}).json()
    assert found["choices"][0]["message"]["content"] == agent_script.FINAL
    # The prompt begins with all of the first one and all that was answered to it.
    before, now = server.client.requests[-2], server.client.requests[-1]
    assert now.prompt_token_ids[: len(before.prompt_token_ids)] == before.prompt_token_ids
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > len(before.prompt_token_ids) + 40


def test_past_calls_are_written_as_the_model_wrote_them() -> None:
    odd = "<tool_call>get_weather\n <arg_key>days</arg_key><arg_value>3.0</arg_value>\n\n</tool_call>"

    def script(prompt: str, request: object) -> str:
        return "</think>" + odd + "<|observation|>" if "<tool_response>" not in prompt else "</think>ok<|user|>"

    with running(script) as server:
        talk = messages("hi")
        message = server.post("/v1/chat/completions", {"messages": talk, "tools": [WEATHER]}).json()["choices"][0][
            "message"
        ]
        assert message["tool_calls"][0]["function"]["arguments"] == '{"days": 3}'
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "r"}
        server.post("/v1/chat/completions", {"messages": [*talk, message, result], "tools": [WEATHER]})
        assert odd in scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)
        # A call that the client has changed, or made up, is written by the template.
        message["tool_calls"][0]["function"]["arguments"] = '{"days": 4}'
        server.post("/v1/chat/completions", {"messages": [*talk, message, result], "tools": [WEATHER]})
        prompt = scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)
        assert odd not in prompt
        assert "<arg_value>4</arg_value>" in prompt


def test_n_answers_differ_by_seed_and_repeat(server: Running) -> None:
    body = {"messages": messages(f"say «{scripted.WILD * 12}»"), "n": 3, "seed": 5}
    first = server.post("/v1/chat/completions", body).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = streamed(server, {**body, "stream_options": {"include_usage": True}})
    assert [joined(chunks, index)["content"] for index in range(3)] == texts
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == first["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }


def test_progress_is_streamed_where_it_is_asked_for(server: Running) -> None:
    body = {"messages": messages("hello"), "stream_options": {"include_progress": True}}
    progress = [chunk for chunk in streamed(server, body) if "prefill_progress" in chunk]
    total = len(server.client.requests[-1].prompt_token_ids)
    assert progress[0]["choices"] == []
    assert progress[0]["prefill_progress"] == {"done_tokens": total // 2, "total_tokens": total}


def test_stop_strings_and_length(server: Running) -> None:
    found = server.chat("say «abc STOP def»", stop="STOP", chat_template_kwargs={"enable_thinking": False})
    assert (found["choices"][0]["message"]["content"], found["choices"][0]["finish_reason"]) == ("abc ", "stop")
    short = server.chat("say «abc»", max_completion_tokens=3)
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 3)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "thinking": {"type": "enabled"}}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_every_switch_of_thinking(server: Running, fields: dict[str, Any], thinks: bool) -> None:
    message = server.chat("say «x»", **fields)["choices"][0]["message"]
    assert ("reasoning" in message) is thinks
    assert message["content"] == "x"


def test_earlier_reasoning_stays_where_it_is_asked_for(server: Running) -> None:
    for name in ("reasoning_content", "reasoning"):
        talk = [*messages("a"), {"role": "assistant", "content": "b", name: "BECAUSE"}, *messages("c")]
        prompts = []
        for fields in ({}, {"thinking": {"type": "enabled", "clear_thinking": False}}):
            server.post("/v1/chat/completions", {"messages": talk, **fields})
            prompts.append(scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids))
        assert ["BECAUSE" in prompt for prompt in prompts] == [False, True]


def test_tool_choice_none_makes_no_call(server: Running) -> None:
    found = server.chat("weather?", tools=[WEATHER], tool_choice="none")["choices"][0]
    assert "tool_calls" not in found["message"]
    assert "<tool_call>" not in found["message"]["content"]
    token_id = scripted.tokenizer().token_to_id("<tool_call>")
    assert server.client.requests[-1].params.logit_bias == {token_id: -1000.0}


def test_required_calls_are_a_grammar_and_formats_too(server: Running) -> None:
    after = scripted.tokenizer().token_to_id("</think>")
    server.chat("weather?", tools=[WEATHER], tool_choice="required")
    grammar = server.client.requests[-1].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.after_token_id) == ("lark", after)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server.chat("x", response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    grammar = server.client.requests[-1].params.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)
    server.chat("x", response_format={"type": "json_object"}, reasoning_effort="none")
    grammar = server.client.requests[-1].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.after_token_id) == ("json_object", None)


def test_without_parallel_calls_the_first_is_the_last() -> None:
    two = "</think><tool_call>f</tool_call><tool_call>g</tool_call><|observation|>"
    with running(lambda prompt, request: two) as server:
        tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
        both = server.chat("x", tools=tools)["choices"][0]
        one = server.chat("x", tools=tools, parallel_tool_calls=False)["choices"][0]
        assert [call["function"]["name"] for call in both["message"]["tool_calls"]] == ["f", "g"]
        assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["f"]
        assert one["finish_reason"] == "tool_calls"
        server.wait(lambda: len(server.client.aborted) == 1)


def test_a_call_that_was_cut_off_ends_with_length(server: Running) -> None:
    asked = 'call get_weather {"city": "a long name of a city"}'
    for limit in range(20, 60, 5):
        body = {"messages": messages(asked), "tools": [WEATHER], "max_tokens": limit, "reasoning_effort": "none"}
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        if choice["finish_reason"] == "length" and choice["message"].get("tool_calls"):
            with pytest.raises(json.JSONDecodeError):
                json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
            return
    pytest.fail("no limit cut the call")


def test_other_names_are_answered_by_the_loaded_model(server: Running) -> None:
    named = server.post("/v1/chat/completions", {"messages": messages("x"), "model": "glm"})
    other = server.post("/v1/chat/completions", {"messages": messages("x"), "model": "gpt-4o"})
    assert "x-glmlocal-model" not in named.headers
    assert (other.headers["x-glmlocal-model"], other.json()["model"]) == ("glm", "glm")
    stream = server.post("/v1/chat/completions", {"messages": messages("x"), "model": "gpt-4o", "stream": True})
    assert stream.headers["x-glmlocal-model"] == "glm"


def test_sampling_values_reach_the_engine(server: Running) -> None:
    server.chat(
        "x", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, seed=9,
        repetition_penalty=1.1, logit_bias={"5": -100, "6": 1.5}, max_tokens=8, stop=["q"], top_logprobs=3,
        logprobs=True,
    )  # fmt: skip
    params = server.client.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.seed, params.max_tokens, params.stop, params.logprobs) == (9, 8, ("q",), 3)
    assert params.logit_bias == {5: -100, 6: 1.5}
    server.chat("x")
    assert server.client.requests[-1].params.temperature == 1.0  # of the model's generation_config


def test_logprobs_are_per_token_with_bytes(server: Running) -> None:
    choice = server.chat("say «é»", logprobs=True, top_logprobs=2, reasoning_effort="none")["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) >= 2
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert "é".encode() in data
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in entries)
