"""A running server (`glmlocal serve demo`) asked over HTTP: thinking on and off, a stream, a tool."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import httpx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
parser.add_argument("key", nargs="?", default="local")
args = parser.parse_args()
http = httpx.Client(base_url=f"{args.url}/v1", headers={"Authorization": f"Bearer {args.key}"}, timeout=600)


def chat(messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    try:
        answer = http.post("/chat/completions", json={"messages": messages, "max_tokens": 300, **options})
    except (httpx.ConnectError, httpx.UnsupportedProtocol):
        sys.exit(f"there is no server at {args.url}; start one with `glmlocal serve demo`")
    body = answer.json()
    if answer.status_code != 200:
        sys.exit(body["error"]["message"])
    choice: dict[str, Any] = body["choices"][0]
    return choice


# 1. Thinking: on unless it is turned off.
question = [{"role": "user", "content": "What is the capital of France?"}]
for thinking in (True, False):
    message = chat(question, chat_template_kwargs={"enable_thinking": thinking}, temperature=0)["message"]
    print(f"thinking={thinking}: {message['content']!r}, after {len(message.get('reasoning_content', ''))} characters")

# 2. A stream, with the prompt's progress and the speed at the end.
options = {"include_usage": True, "include_progress": True}
request = {"messages": question, "stream": True, "stream_options": options, "max_tokens": 100}
with http.stream("POST", "/chat/completions", json=request) as stream:
    for line in stream.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        for choice in chunk.get("choices", ()):
            print(choice["delta"].get("content") or "", end="", flush=True)
        if "timings" in chunk:
            print(
                f"\n[{chunk['usage']['completion_tokens']} tokens, {chunk['timings']['decode_tokens_per_s']:.1f} tok/s]"
            )

# 3. A tool: the model asks for it, this program runs it, the model answers.
tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city today",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
talk: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Zürich?"}]
choice = chat(talk, tools=[tool])
talk.append(choice["message"])
for call in choice["message"].get("tool_calls", ()):
    arguments = json.loads(call["function"]["arguments"])
    print(f"the model calls {call['function']['name']}({arguments})")
    talk.append({"role": "tool", "tool_call_id": call["id"], "content": f"Sunny in {arguments.get('city')}, 24 °C"})
if len(talk) > 2:
    print(chat(talk, tools=[tool])["message"]["content"])
else:
    print(f"no tool was called: {choice['message']['content']}")  # small models, such as the demo, do not know how
