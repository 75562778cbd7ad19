"""What real clients sent (tests/fixtures/clients: captured, long texts shortened), sent again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agent_script
import scripted
from serving import Running, events, running

FIXTURES = Path(__file__).parents[1] / "fixtures" / "clients"


@pytest.fixture(scope="module", params=["a", "b"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(agent_script.answer, request.param) as server:
        yield server


def replay(server: Running, name: str) -> list[tuple[Any, str, str]]:
    """(what was sent, the prompt that it became, the answer's text) for every request that the model answered."""
    result = []
    for request in json.loads((FIXTURES / f"{name}.json").read_text("utf-8"))["requests"]:
        path = request["path"] + (f"?{request['query']}" if request["query"] else "")
        answer = server.http.request(
            request["method"],
            path,
            content=json.dumps(request["body"]) if request["body"] is not None else None,
            headers=[tuple(header) for header in request["headers"]],
        )
        assert answer.status_code == 200, answer.text
        if request["method"] == "POST":
            prompt = scripted.tokenizer().decode(server.client.requests[-1].prompt_token_ids)
            result.append((request["body"], prompt, answer.text))
    return result


def test_claude_code(server: Running) -> None:
    (first, before, answer), (second, after, last) = replay(server, "claude-code")
    assert first["system"][0]["text"].startswith("x-anthropic-billing-header:"), "the capture has the header"
    assert "billing-header" not in before
    names = [name for name, _ in events(answer)]
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"
    starts = [data["content_block"] for name, data in events(answer) if name == "content_block_start"]
    assert [block["type"] for block in starts] == ["thinking", "text", "tool_use"]
    assert starts[2]["name"] == "Bash"
    sent_back = second["messages"][-2]["content"]
    assert [block["type"] for block in sent_back] == ["thinking", "text", "tool_use"]
    assert after.startswith(before.rpartition("<|assistant|>")[0])
    assert f"<think>{sent_back[0]['thinking']}</think>" in after
    assert second["messages"][-1]["content"][0]["content"] == "glm-was-here"
    assert "glm-was-here" in after.rpartition("<tool_response>")[2]
    assert "".join(
        data["delta"].get("text", "") for name, data in events(last) if name == "content_block_delta"
    ).endswith(agent_script.FINAL)


def test_codex(server: Running) -> None:
    (first, before, answer), (second, after, last) = replay(server, "codex")
    kinds = {tool["type"] for tool in first["tools"]}
    assert kinds > {"function"}, "the capture has kinds of tools that are skipped"
    offered = before.partition("<tools>")[2].partition("</tools>")[0]
    assert '"name": "exec_command"' in offered
    assert "web_search" not in offered
    done = [data for name, data in events(answer) if name == "response.completed"]
    assert [item["type"] for item in done[0]["response"]["output"]] == ["reasoning", "message", "function_call"]
    reasoning = next(item for item in second["input"] if item["type"] == "reasoning")
    assert reasoning["encrypted_content"].startswith("glmlocal1:")
    assert "<think>Let me see.</think>" in after
    assert after.startswith(before.rpartition("<|assistant|>")[0])
    assert "glm-was-here" in after.rpartition("<tool_response>")[2]
    assert agent_script.FINAL in last


def test_opencode(server: Running) -> None:
    (_, _, _), (first, before, answer), (second, after, last) = replay(server, "opencode")
    assert first["tools"][0]["function"]["name"] == "bash"
    chunks = [data for _, data in events(answer)[:-1]]
    assert chunks[-1]["usage"]["prompt_tokens"] > 0, "include_usage was asked for"
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    turn = next(message for message in second["messages"] if message["role"] == "assistant")
    assert turn["tool_calls"][0]["function"]["name"] == "bash"
    assert after.startswith(before.rpartition("<|assistant|>")[0])
    assert "<tool_call>bash" in after
    assert "glm-was-here" in after.rpartition("<tool_response>")[2]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for _, c in events(last)[:-1] if c["choices"])
    assert text.strip() == agent_script.FINAL
