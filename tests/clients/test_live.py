"""Real agents, run for a turn with a tool against the scripted engine. Skipped where they are not installed.

They are looked for on the PATH and in GLMLOCAL_CLIENTS, for example ~/clients/node_modules/.bin after
``npm install --prefix ~/clients @anthropic-ai/claude-code @openai/codex opencode-ai``. OpenCode fetches its
provider package from npm when it starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agent_script
from served import Process, served

WHERE = f"{os.environ.get('GLMLOCAL_CLIENTS', '')}:{os.environ['PATH']}"
ASK = "Print a word with a command"
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(params=["a", "b"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    with served(
        tmp_path, request.param, SCRIPTED_WIRE=str(tmp_path / "wire"), SCRIPTED_RECORD=str(tmp_path / "prompts")
    ) as server:
        yield server


def run(tmp_path: Path, name: str, *arguments: str, **environment: str) -> str:
    """What the client printed. Its home is a fresh directory; nothing of the caller's settings reaches it."""
    program = shutil.which(name, path=WHERE)
    if name == "llm" and importlib.util.find_spec("llm") is not None:
        command = [sys.executable, "-m", "llm"]
    elif program is not None:
        command = [program]
    else:
        pytest.skip(f"{name} is not installed (GLMLOCAL_CLIENTS names the directory of such programs)")
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=work,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wire(tmp_path: Path) -> list[dict[str, Any]]:
    """The requests that were answered by the model, as they were on the wire."""
    lines = [json.loads(line) for line in (tmp_path / "wire").read_text("utf-8").splitlines()]
    asked = [line for line in lines if line["method"] == "POST"]
    assert all(line["status"] == 200 for line in asked), [line["response"] for line in asked]
    return asked


def check_prompts(tmp_path: Path, *, keeps_reasoning: bool = True) -> None:
    """The prompt with the tool's result goes on from the one before it, wherever a prompt for a title came in between.

    A client that does not send reasoning back (``llm``) makes the prefix end where the answer began.
    """
    prompts = [json.loads(line) for line in (tmp_path / "prompts").read_text("utf-8").splitlines()]
    after = [prompt for prompt in prompts if "glm-was-here" in prompt.rpartition("<tool_response>")[2]][-1]
    earlier = prompts[: prompts.index(after)]
    kept = earlier if keeps_reasoning else [prompt.rpartition("<|assistant|>")[0] for prompt in earlier]
    assert any(after.startswith(prompt) for prompt in kept), "the prefix cache would miss"


def test_claude_code(server: Process, tmp_path: Path) -> None:
    out = run(
        tmp_path,
        "claude",
        *("-p", ASK, "--allowedTools", "Bash", "--model", "glm", "--output-format", "json"),
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_AUTH_TOKEN="local",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )
    assert json.loads(out)["result"] == agent_script.FINAL
    assert [line["query"] for line in wire(tmp_path)] == ["beta=true", "beta=true"]
    check_prompts(tmp_path)


def test_codex(server: Process, tmp_path: Path) -> None:
    home = tmp_path / "home" / ".codex"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        'model = "glm"\nmodel_provider = "glmlocal"\n[model_providers.glmlocal]\nname = "glmlocal"\n'
        f'base_url = "{server.url}/v1"\nwire_api = "responses"\nenv_key = "GLMLOCAL_KEY"\n',
        "utf-8",
    )
    options = ("--skip-git-repo-check", "--sandbox", "danger-full-access")
    out = run(tmp_path, "codex", "exec", *options, ASK, GLMLOCAL_KEY="x")
    assert out.strip() == agent_script.FINAL
    assert {line["path"] for line in wire(tmp_path)} == {"/v1/responses"}
    check_prompts(tmp_path)


def test_opencode(server: Process, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "glmlocal",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": "x"},
        "models": {"glm": {"name": "glm", "reasoning": True, "limit": {"context": 131072, "output": 32768}}},
    }
    config = {"model": "glmlocal/glm", "small_model": "glmlocal/glm", "provider": {"glmlocal": provider}}
    (tmp_path / "work" / "opencode.json").write_text(json.dumps({**config, "autoupdate": False}), "utf-8")
    out = run(tmp_path, "opencode", "run", ASK)
    assert agent_script.FINAL in out
    assert {line["path"] for line in wire(tmp_path)} == {"/v1/chat/completions"}
    check_prompts(tmp_path)


def test_llm(server: Process, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: glm\n  model_name: glm\n  api_base: {server.url}/v1\n  supports_tools: true\n", "utf-8"
    )
    code = "def upper(text: str) -> str:\n    'Upper case'\n    return text.upper() + ' glm-was-here'\n"
    out = run(
        tmp_path, "llm", "-m", "glm", "--functions", code, "upper panda", LLM_USER_PATH=str(home), OPENAI_API_KEY="x"
    )
    assert agent_script.FINAL in out
    check_prompts(tmp_path, keeps_reasoning=False)
