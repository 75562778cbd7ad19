from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import agent_script
import scripted
from serving import Running, events, running

EXEC = {
    "type": "function",
    "name": "exec_command",
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}},
}
OTHERS = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "namespace", "name": "n"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(agent_script.answer) as server:
        yield server


def ask(server: Running, given: Any, **fields: Any) -> Any:
    answer = server.post("/v1/responses", {"model": "glm", "input": given, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_of(server: Running) -> str:
    return scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)


def test_output_is_reasoning_message_and_call(server: Running) -> None:
    found = ask(server, "do it", tools=[EXEC, *OTHERS], instructions="Be brief.")
    assert [item["type"] for item in found["output"]] == ["reasoning", "message", "function_call"]
    assert found["output"][1]["content"][0]["text"] == "I will look."
    assert json.loads(found["output"][2]["arguments"]) == {"cmd": "echo glm-was-here"}
    assert (found["object"], found["status"]) == ("response", "completed")
    assert found["usage"]["input_tokens"] == len(server.client.requests[-1].prompt_token_ids)
    assert "<|system|>Be brief." in prompt_of(server)
    assert "web_search" not in prompt_of(server)


def test_a_stream_tells_the_same(server: Running) -> None:
    request = {"tools": [EXEC], "include": ["reasoning.encrypted_content"]}
    whole = ask(server, "do it", **request)
    answer = server.post("/v1/responses", {"input": "do it", "stream": True, **request})
    found = events(answer.text)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    assert all(name == data["type"] for name, data in found)
    assert [name for name, _ in found[:2]] == ["response.created", "response.in_progress"]
    assert found[-1][0] == "response.completed"
    assert [_anonymous(item) for item in found[-1][1]["response"]["output"]] == [
        _anonymous(item) for item in whole["output"]
    ]
    text: dict[str, str] = {}
    for name, data in found:
        if name.endswith((".delta",)):
            text[data["item_id"]] = text.get(data["item_id"], "") + data["delta"]
    done = {data["item"]["id"]: data["item"] for name, data in found if name == "response.output_item.done"}
    assert list(done) == list(text)
    for item_id, item in done.items():
        assert text[item_id] == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    added = [data["output_index"] for name, data in found if name == "response.output_item.added"]
    assert added == [0, 1, 2]


def _anonymous(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def test_items_go_back_as_one_turn_and_the_prefix_is_kept(server: Running) -> None:
    include = ["reasoning.encrypted_content"]
    question = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "do it now"}]}
    first = ask(server, [question], tools=[EXEC], include=include)
    before = server.client.requests[-1].prompt_token_ids
    items = [dict(item) for item in first["output"]]
    items[0].pop("content")  # as Codex does
    result = {"type": "function_call_output", "call_id": items[2]["call_id"], "output": "done"}
    skipped = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    second = ask(server, [question, *items, skipped, result], tools=[EXEC], include=include)
    assert second["output"][-1]["content"][0]["text"] == agent_script.FINAL
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > len(before) + 40


def test_probes_are_answered_without_the_model(server: Running) -> None:
    before = len(server.client.requests)
    assert ask(server, [])["output"] == []
    assert ask(server, "")["status"] == "completed"
    stream = events(server.post("/v1/responses", {"input": "x", "generate": False, "stream": True}).text)
    assert [name for name, _ in stream] == ["response.created", "response.completed"]
    assert len(server.client.requests) == before


def test_only_what_is_new_has_to_be_sent(server: Running) -> None:
    first = ask(server, "do it", tools=[EXEC], instructions="Be brief.")
    before = server.client.requests[-1].prompt_token_ids
    result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "it is so"}
    second = ask(server, [result], tools=[EXEC], instructions="Be brief.", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert second["output"][-1]["content"][0]["text"] == agent_script.FINAL
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > len(before) + 40
    items = [{"role": "user", "content": "do it"}, *first["output"], result]
    ask(server, items, tools=[EXEC], instructions="Be brief.")
    assert server.client.requests[-1].prompt_token_ids == server.client.requests[-2].prompt_token_ids
    third = ask(server, "say «more»", previous_response_id=second["id"])  # without the instructions and tools
    text = prompt_of(server)
    assert [text.count(each) for each in ("do it", "it is so", agent_script.FINAL, "say «more»")] == [1, 1, 1, 1]
    assert "Be brief." not in text
    assert third["id"] not in (first["id"], second["id"])


def test_a_branch_goes_on_from_an_earlier_answer(server: Running) -> None:
    first = ask(server, "say «one»")
    ask(server, "say «two»", previous_response_id=first["id"])
    ask(server, "say «three»", previous_response_id=first["id"])
    assert "two" not in prompt_of(server)
    assert "say «one»" in prompt_of(server)


def test_streams_cut_offs_and_probes_are_kept_too(server: Running) -> None:
    found = events(server.post("/v1/responses", {"input": "say «streamed»", "stream": True}).text)
    streamed = found[-1][1]["response"]
    assert server.http.get(f"/v1/responses/{streamed['id']}").json() == streamed
    cut = ask(server, "say «abcdef»", max_output_tokens=3)
    assert server.http.get(f"/v1/responses/{cut['id']}").json()["status"] == "incomplete"
    probe = ask(server, "warm up «x»", generate=False)
    ask(server, "say «y»", previous_response_id=probe["id"])
    assert "warm up «x»" in prompt_of(server)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_to_be_stored_is_not(stream: bool, server: Running) -> None:
    answer = server.post("/v1/responses", {"input": "say «secret»", "store": False, "stream": stream})
    body = events(answer.text)[-1][1]["response"] if stream else answer.json()
    assert body["store"] is False
    assert server.http.get(f"/v1/responses/{body['id']}").status_code == 404
    answer = server.post("/v1/responses", {"input": "x", "previous_response_id": body["id"]})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "previous_response_not_found"
    assert answer.json()["error"]["param"] == "previous_response_id"


def test_kept_answers_can_be_read_and_deleted(server: Running) -> None:
    found = ask(server, "say «x»", metadata={"a": "b"})
    path = f"/v1/responses/{found['id']}"
    assert found["store"] is True
    assert server.http.get(path).json() == found
    assert server.http.delete(path).json() == {"id": found["id"], "object": "response", "deleted": True}
    for answer in (server.http.get(path), server.http.delete(path)):
        assert answer.status_code == 404
        assert found["id"] in answer.json()["error"]["message"]


def test_an_answer_to_what_was_deleted_is_given_up_with_one_clear_line(server: Running) -> None:
    first = ask(server, "say «x»")
    second = ask(server, "say «y»", previous_response_id=first["id"])
    server.http.delete(f"/v1/responses/{first['id']}")
    answer = server.post("/v1/responses", {"input": "z", "previous_response_id": second["id"]})
    assert answer.status_code == 404
    assert f"all that came before it: '{first['id']}' is gone" in answer.json()["error"]["message"]


def test_an_answer_that_was_cut_off_is_incomplete(server: Running) -> None:
    found = ask(server, "say «abcdef»", max_output_tokens=3)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_formats_and_effort(server: Running) -> None:
    schema = {"type": "object", "properties": {}}
    ask(server, "x", text={"format": {"type": "json_schema", "name": "n", "schema": schema}})
    grammar = server.client.requests[-1].params.grammar
    assert grammar is not None
    assert json.loads(grammar.source) == schema
    found = ask(server, "say «x»", reasoning={"effort": "minimal"})
    assert [item["type"] for item in found["output"]] == ["message"]


@pytest.mark.parametrize(
    ("item", "word"),
    [
        ({"type": "message", "role": "robot", "content": "x"}, "robot"),
        (
            {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]},
            "text only",
        ),
        ({"type": "function_call", "name": "f"}, "function_call"),
        ({"type": "reasoning", "encrypted_content": "glmlocal1:###"}, "encrypted_content"),
    ],
)
def test_items_that_cannot_be_are_refused(server: Running, item: dict[str, Any], word: str) -> None:
    answer = server.post("/v1/responses", {"input": [item]})
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
    assert "input.0" in answer.json()["error"]["message"]


def test_a_call_that_was_cut_off_is_not_in_the_next_prompt(server: Running) -> None:
    whole = ask(server, "do it", tools=[EXEC])
    for max_tokens in range(whole["usage"]["output_tokens"] - 1, 0, -1):
        cut = ask(server, "do it", tools=[EXEC], max_output_tokens=max_tokens)
        if cut["output"][-1].get("arguments", "{}").count("{") > cut["output"][-1].get("arguments", "{}").count("}"):
            break
    else:
        raise AssertionError("no answer ended inside the arguments")
    assert cut["output"][-1]["status"] == "incomplete"
    ask(server, "say «go on»", tools=[EXEC], previous_response_id=cut["id"])
    assert "<tool_call>exec_command" not in prompt_of(server).rpartition("<|user|>do it")[2]
    assert cut["output"][1]["content"][0]["text"] in prompt_of(server)
