"""Agent frameworks, in the versions that a Python of GLMLOCAL_CLIENTS has. Skipped where they are not installed.

For example ~/clients/bin after ``python -m venv ~/clients; ~/clients/bin/pip install litellm langchain-openai
langchain-anthropic pydantic-ai-slim[openai] openai-agents instructor``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent_script
from served import Process, served

MODULES = {"openai_agents": "agents"}
PYTHON = shutil.which("python", path=os.environ.get("GLMLOCAL_CLIENTS", ""))
pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with served(tmp_path_factory.mktemp("frameworks"), "b") as server:
        yield server


@pytest.mark.parametrize(
    "name", ["litellm", "langchain_openai", "langchain_anthropic", "pydantic_ai", "openai_agents", "instructor"]
)
def test_a_tool_its_result_and_an_answer(server: Process, tmp_path: Path, name: str) -> None:
    if PYTHON is None:
        pytest.skip("no Python in GLMLOCAL_CLIENTS")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    found = subprocess.run([PYTHON, "-c", f"import {MODULES.get(name, name)}"], capture_output=True, env=environment)
    if found.returncode:
        pytest.skip(f"{name} is not installed for {PYTHON}")
    program = Path(__file__).with_name("frameworks.py")
    command = [PYTHON, "-W", "ignore", str(program), name, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == agent_script.FINAL
