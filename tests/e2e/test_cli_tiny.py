"""The commands with the real engine on a tiny random checkpoint, as processes of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4MoeForCausalLM

import tiny
from glmlocal import LLM
from pty_terminal import Terminal

TEXT = "the quick brown fox jumps over the lazy dog; naïve 中文 text, twice over. " * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(), tmp_path_factory.mktemp("tiny"))


def glmlocal(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "glmlocal", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120, **options)


def test_stdout_is_the_greedy_answer_of_the_python_api(directory: Path) -> None:
    options = ("--temp", "0", "--max-tokens", "24", "--threads", "1")
    plain = glmlocal("chat", str(directory), "-p", "the quick", "--no-think", *options)
    raw = glmlocal("chat", str(directory), "-p", "the quick", "--raw", "--json", *options)
    with LLM(directory, max_batch=1) as llm:
        messages = [{"role": "user", "content": "the quick"}]
        answer = llm.chat(messages, enable_thinking=False, temperature=0.0, max_tokens=24)
        completion = llm.generate("the quick", temperature=0.0, max_tokens=24)
    assert (plain.returncode, plain.stdout.decode()) == (0, answer.text + "\n")
    assert f"{answer.usage.prompt_tokens} prompt + 24 generated tokens" in plain.stderr.decode()
    assert b"\x1b" not in plain.stderr
    fields = json.loads(raw.stdout)
    assert (fields["text"], fields["finish_reason"]) == (completion.text, completion.finish_reason)
    assert fields["usage"]["completion_tokens"] == completion.usage.completion_tokens
    assert raw.stderr == b""


def test_a_saved_plan_is_shown_and_run(directory: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    words = ("--gpus", "none", "--nvme", "none", "--context", "96", "--batch", "1", "--quant", "int8")
    made = glmlocal("plan", str(directory), *words, "--save", str(saved), "--json")
    assert made.returncode == 0
    again = glmlocal("plan", str(saved), "--json")
    assert json.loads(again.stdout) == json.loads(made.stdout)
    prompt = ("-p", "the quick", "--raw", "--json", "--temp", "0", "--max-tokens", "24")
    planned = glmlocal("chat", str(directory), *prompt, "--plan", str(saved))
    told = glmlocal("chat", str(directory), *prompt, "--context", "96", "--quant", "int8")
    assert json.loads(planned.stdout)["text"] == json.loads(told.stdout)["text"]
    for words in (("--plan", str(saved), "--quant", "int4"), ("--gpus", "2xH100"), ("--plan", str(directory))):
        refused = glmlocal("chat", str(directory), *prompt, *words)
        assert (refused.returncode, refused.stderr.count(b"\n")) == (2, 1), refused.stderr


def test_a_context_that_is_too_small_is_one_line(directory: Path) -> None:
    done = glmlocal("chat", str(directory), "-p", "the quick brown fox", "--context", "4")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"glmlocal: error: the prompt has ")
    assert done.stderr.count(b"\n") == 1


def test_a_session_on_a_terminal(directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "glmlocal", "chat", str(directory), "--plain", "--max-tokens", "12"]
    command += ["--seed", "1"]
    terminal = Terminal(command, GLMLOCAL_HOME=str(tmp_path))
    try:
        for number, message in enumerate(("the quick", "brown fox"), 1):
            terminal.say(message)
            terminal.wait(lambda number=number: terminal.text.count(" generated tokens") == number)  # type: ignore[misc]
        terminal.say(f"/save {tmp_path / 'talk.json'}")
        terminal.wait("saved 4 messages")
        terminal.say("/quit")
        assert terminal.end() == 0
    finally:
        terminal.process.close(force=True)
    messages = json.loads((tmp_path / "talk.json").read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages[::2]] == ["the quick", "brown fox"]


def test_perplexity_equals_the_hugging_face_loop_on_the_hugging_face_model(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, "utf-8")
    context, stride = 64, 24
    done = glmlocal(
        "eval",
        str(directory),
        "--text",
        str(tmp_path / "text"),
        "--context",
        str(context),
        "--stride",
        str(stride),
        "--json",
    )
    found = json.loads(done.stdout)
    with LLM(directory, max_batch=1) as llm:
        tokens = llm.tokenizer.encode(TEXT)
    model = Glm4MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    nll: list[float] = []
    end = min(context, len(tokens))
    while len(nll) < len(tokens) - 1:
        window = tokens[max(0, end - context) : end]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double().log_softmax(-1).numpy()
        new = end - 1 - len(nll)
        rows = range(len(window) - 1 - new, len(window) - 1)
        nll += [-logits[row, window[row + 1]] for row in rows]
        end = min(end + stride, len(tokens))
    assert found["num_scored"] == len(tokens) - 1 > 100
    assert found["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
