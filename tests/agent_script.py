"""What the scripted model says to agents: one tool call, and after its result a final answer.

The call that is made is the first of a few well-known tools that the prompt offers, or the one that a message asks for:
``call NAME {"argument": …}``. Text between ``say «`` and ``»`` is said as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from glmlocal.engine.request import Request

FINAL = "The tool said so: all done."
# Tools of real clients and what a model would do with them.
KNOWN: dict[str, Mapping[str, Any]] = {
    "Bash": {"command": "echo glm-was-here", "description": "Print a word"},
    "bash": {"command": "echo glm-was-here", "description": "Print a word"},
    "exec_command": {"cmd": "echo glm-was-here"},
    "shell": {"command": ["echo", "glm-was-here"]},
    "shell_command": {"command": "echo glm-was-here"},
    "get_weather": {"city": "Zürich", "days": 3},
    "llm_version": {},
    "upper": {"text": "panda"},
}


def answer(prompt: str, request: Request) -> str:
    """In the form of the prompt: 4.5's with newlines, 4.7's without."""
    last = prompt.rsplit("<|assistant|>", 1)[0]
    form_a = "<|user|>\n" in prompt or "<|system|>\n" in prompt
    tail = prompt.rsplit("<|assistant|>", 1)[1]
    thinks = "</think>" not in tail
    think = ("" if tail.endswith("<think>") else "\n<think>") + "Let me see.</think>" if thinks else ""
    newline = "\n" if form_a else ""
    said = re.split(r"<\|user\|>", last)[-1]
    if literal := re.search(r"say «(.*?)»", said, re.DOTALL):
        return f"{think}{newline}{literal[1]}<|user|>"
    if "<tool_response>" in said:
        return f"{think}{newline}{FINAL}<|user|>"
    name, arguments = _call(said, prompt)
    if name is None:
        return f"{think}{newline}Hello! You said something of {len(said)} characters.<|user|>"
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    pairs = newline.join(
        f"<arg_key>{key}</arg_key>{newline}<arg_value>{text}</arg_value>" for key, text in texts.items()
    )
    return f"{think}{newline}I will look.{newline}<tool_call>{name}{newline}{pairs}{newline}</tool_call><|observation|>"


def _call(said: str, prompt: str) -> tuple[str | None, Mapping[str, Any]]:
    if asked := re.search(r"call ([\w.-]+) (\{.*?\})(?:\n|$|<)", said):
        return asked[1], json.loads(asked[2])
    tools = prompt.partition("<tools>")[2].partition("</tools>")[0]
    offered = re.findall(r'"name": "([\w.-]+)"', tools)
    return next(((name, KNOWN[name]) for name in KNOWN if name in offered), (None, {}))
