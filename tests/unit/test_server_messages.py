from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import agent_script
import scripted
from serving import Running, events, running

BASH = {
    "name": "Bash",
    "description": "run",
    "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}},
}
THINK = {"type": "enabled", "budget_tokens": 2000}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(agent_script.answer) as server:
        yield server


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "glm", "max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}


def prompt_of(server: Running) -> str:
    return scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)


def test_a_message_with_thinking_text_and_a_tool(server: Running) -> None:
    found = server.post("/v1/messages?beta=true", body("do it", tools=[BASH], thinking=THINK)).json()
    kinds = [block["type"] for block in found["content"]]
    assert kinds == ["thinking", "text", "tool_use"]
    assert found["content"][0]["thinking"] == "Let me see."
    assert found["content"][2]["input"]["command"] == "echo glm-was-here"
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "tool_use")
    assert found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"] == len(
        server.client.requests[-1].prompt_token_ids
    )


def test_events_come_in_anthropics_order(server: Running) -> None:
    request = body("do it", tools=[BASH], thinking=THINK, stream=True)
    found = events(server.post("/v1/messages", request).text)
    assert all(name == data["type"] for name, data in found)
    without_repeats = [name for i, (name, _) in enumerate(found) if i == 0 or found[i - 1][0] != name]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert without_repeats == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    blocks: dict[int, dict[str, Any]] = {}
    for name, data in found:
        if name == "content_block_start":
            blocks[data["index"]] = {**data["content_block"], "json": ""}
        elif name == "content_block_delta":
            delta, open_block = data["delta"], blocks[data["index"]]
            kind = delta["type"]
            if kind == "input_json_delta":
                open_block["json"] += delta["partial_json"]
            else:
                field = kind.removesuffix("_delta")
                open_block[field] += delta[field]
    assert [each["type"] for each in blocks.values()] == ["thinking", "text", "tool_use"]
    assert (blocks[0]["thinking"], bool(blocks[0]["signature"])) == ("Let me see.", True)
    assert blocks[1]["text"] == "I will look."
    assert json.loads(blocks[2]["json"])["command"] == "echo glm-was-here"
    start, end = found[0][1]["message"], found[-2][1]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] > 0


def test_results_of_tools_go_back_and_the_prefix_is_kept(server: Running) -> None:
    first = server.post("/v1/messages", body("do it please", tools=[BASH], thinking=THINK)).json()
    before = server.client.requests[-1].prompt_token_ids
    call = first["content"][2]
    talk = [
        {"role": "user", "content": "do it please"},
        {"role": "assistant", "content": first["content"]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "glm"}]},
                {"type": "text", "text": ""},
            ][:1],
        },
    ]
    second = server.post("/v1/messages", body("", tools=[BASH], thinking=THINK, messages=talk)).json()
    assert second["content"][-1]["text"] == agent_script.FINAL
    assert second["stop_reason"] == "end_turn"
    assert second["usage"]["cache_read_input_tokens"] > len(before) + 40
    assert "<tool_response>glm</tool_response>" in prompt_of(server)


def test_thinking_is_off_unless_it_is_asked_for(server: Running) -> None:
    for fields, thinks in (
        ({}, False),
        ({"thinking": THINK}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ):
        found = server.post("/v1/messages", body("say «x»", **fields)).json()
        assert [block["type"] for block in found["content"]] == (["thinking", "text"] if thinks else ["text"])


def test_the_billing_header_is_dropped_and_the_rest_stays(server: Running) -> None:
    header = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0; cch=abcde;"}
    for system in ([header, {"type": "text", "text": "Be brief."}], "x-anthropic-billing-header: a\nBe brief."):
        server.post("/v1/messages", body("x", system=system))
        assert "billing" not in prompt_of(server)
        assert "<|system|>Be brief." in prompt_of(server)
    server.post("/v1/messages", body("x", system=[header]))
    assert "<|system|>" not in prompt_of(server)


def test_counting_is_exact(server: Running) -> None:
    request = body("count me", tools=[BASH], system="Be brief.", thinking=THINK)
    counted = server.post("/v1/messages/count_tokens", {k: v for k, v in request.items() if k != "max_tokens"}).json()
    used = server.post("/v1/messages", request).json()["usage"]
    assert counted == {"input_tokens": used["input_tokens"] + used["cache_read_input_tokens"]}
    bare = server.post("/v1/messages/count_tokens", {"messages": request["messages"]}).json()
    assert bare["input_tokens"] < counted["input_tokens"]


def test_stop_sequences_are_named(server: Running) -> None:
    found = server.post("/v1/messages", body("say «ab END cd»", stop_sequences=["zz", "END"])).json()
    assert (found["content"][0]["text"], found["stop_reason"], found["stop_sequence"]) == (
        "ab ",
        "stop_sequence",
        "END",
    )
    cut = server.post("/v1/messages", body("say «abcdef»", max_tokens=2)).json()
    assert cut["stop_reason"] == "max_tokens"


def test_a_call_that_was_cut_off_is_left_out_of_a_whole_message(server: Running) -> None:
    kinds = set()
    for limit in range(14, 60, 3):
        found = server.post("/v1/messages", body("do it", tools=[BASH], max_tokens=limit)).json()
        assert all(isinstance(block.get("input", {}), dict) for block in found["content"])
        if found["stop_reason"] == "max_tokens":
            kinds |= {block["type"] for block in found["content"]}
    assert kinds == {"text"}


def test_tool_choices(server: Running) -> None:
    server.post("/v1/messages", body("do it", tools=[BASH], tool_choice={"type": "any"}))
    grammar = server.client.requests[-1].params.grammar
    assert grammar is not None
    assert "call_0" in grammar.source
    found = server.post("/v1/messages", body("do it", tools=[BASH], tool_choice={"type": "none"})).json()
    assert all(block["type"] != "tool_use" for block in found["content"])
    wrong = server.post("/v1/messages", body("x", tools=[BASH], tool_choice={"type": "tool", "name": "nope"}))
    assert (wrong.status_code, "nope" in wrong.text) == (400, True)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}},
        {"type": "document", "source": {}},
        {"type": "text"},
        {"text": "no type"},
        {"type": "tool_use", "name": "x", "input": {}},
    ],
)
def test_blocks_that_are_not_text_are_refused(server: Running, block: dict[str, Any]) -> None:
    answer = server.post("/v1/messages", body("", messages=[{"role": "user", "content": [block]}]))
    assert answer.status_code == 400
    assert "messages.0.content" in answer.json()["error"]["message"]


def test_tools_of_anthropics_own_are_left_out(server: Running) -> None:
    server.post("/v1/messages", body("x", tools=[{"type": "web_search_20250305", "name": "web_search"}]))
    assert "web_search" not in prompt_of(server)


def test_claude_codes_wish_to_keep_thinking(server: Running) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "BECAUSE", "signature": "s"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "c"},
    ]
    keep = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    for fields, kept in (({}, False), ({"context_management": keep}, True)):
        server.post("/v1/messages", body("", messages=talk, thinking=THINK, **fields))
        assert ("BECAUSE" in prompt_of(server)) is kept
