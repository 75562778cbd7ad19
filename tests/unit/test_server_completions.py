from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import scripted
from serving import Running, events, running


def shout(prompt: str, request: object) -> str:
    return prompt[::-1].upper() + scripted.WILD + "<|user|>"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(shout) as server:
        yield server


def complete(server: Running, **fields: Any) -> Any:
    answer = server.post("/v1/completions", {"max_tokens": 100, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_text_and_ids_are_continued_as_they_stand(server: Running) -> None:
    ids = scripted.tokenizer().encode("ab<|user|>")
    for prompt in ("ab<|user|>", ids):
        found = complete(server, prompt=prompt)
        assert found["object"] == "text_completion"
        assert found["choices"][0]["text"].startswith(">|RESU|<BA")
        assert server.client.requests[-1].prompt_token_ids == tuple(ids)


def test_several_prompts_and_answers_are_numbered(server: Running) -> None:
    found = complete(server, prompt=["ab", "cd"], n=2, seed=1, echo=True)
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [text[:4] for text in texts] == ["abBA", "abBA", "cdDC", "cdDC"]
    assert texts[0] != texts[1]
    stream = server.post(
        "/v1/completions",
        {"prompt": ["ab", "cd"], "n": 2, "seed": 1, "echo": True, "max_tokens": 100, "stream": True},
    )
    pieces = ["", "", "", ""]
    for _, data in events(stream.text)[:-1]:
        pieces[data["choices"][0]["index"]] += data["choices"][0]["text"]
    assert pieces == texts


def test_logprobs_have_offsets(server: Running) -> None:
    choice = complete(server, prompt="ab", logprobs=2, echo=True)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token != "<|user|>":
            assert choice["text"][offset : offset + len(token)] == token


def test_sixteen_tokens_unless_told(server: Running) -> None:
    found = server.post("/v1/completions", {"prompt": "x" * 100}).json()
    assert (found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [""] * 17}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
    ],
)
def test_what_cannot_be_is_a_400(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/completions", fields)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"] or "").startswith(param)


def test_tokenize_and_back(server: Running) -> None:
    text = "Hi <|user|> there"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == scripted.tokenizer().encode(text)
    assert (found["count"], "".join(found["token_strs"])) == (len(found["tokens"]), text)
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    talk = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert server.post("/detokenize", {"tokens": talk["tokens"]}).json() == {
        "prompt": "[gMASK]<sop><|user|>x<|assistant|><think>"
    }
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [-1]}).status_code == 400


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echoed_prompt_has_its_logprobs(server: Running, max_tokens: int) -> None:
    """As evaluation harnesses ask for them: how likely is this text?"""
    prompt = "a größer ☂"
    body = {
        "prompt": [prompt, "xy"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "seed": 4,
    }
    answer = complete(server, **body)
    for choice, text in zip(answer["choices"], (prompt, "xy"), strict=True):
        logprobs, ids = choice["logprobs"], scripted.tokenizer().encode(text)
        assert choice["text"].startswith(text)
        assert {len(each) for each in logprobs.values()} == {len(ids) + max_tokens}
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == [-0.5] * (len(ids) - 1 + max_tokens)
        assert all(
            token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
        )
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token
    if max_tokens == 0:
        assert [choice["text"] for choice in answer["choices"]] == [prompt, "xy"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
        assert answer["usage"]["completion_tokens"] == 0
    pieces = events(server.post("/v1/completions", {**body, "stream": True}).text)[:-1]
    for choice in answer["choices"]:
        mine = [data["choices"][0] for _, data in pieces if data["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for each in mine if each["logprobs"] for value in each["logprobs"][name]] == values


def test_bytes_that_are_no_characters_are_told_apart(server: Running) -> None:
    logprobs = complete(server, prompt="☂", echo=True, logprobs=2, max_tokens=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x82"]
    assert logprobs["text_offset"] == [0, 0, 0]


def test_nothing_may_be_generated(server: Running) -> None:
    choice = complete(server, prompt="ab", max_tokens=0)["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")
