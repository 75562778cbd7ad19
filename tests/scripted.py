"""A backend without a model: it answers with token ids that a script gives, through GLM's kind of template.

``ScriptedClient`` is an EngineClient whose "model" is a function from the prompt's text to the answer's text. The
tokenizer has GLM's special tokens, the template is GLM's in both forms (written for these tests). As a program it is
``glmlocal serve`` with such a model:

    python tests/scripted.py serve a --port 0 --announce        4.5/4.6's form
    python tests/scripted.py serve b …                          4.7/5's form

Environment: SCRIPTED_DELAY_S per token, SCRIPTED_LOAD_S, SCRIPTED_RECORD (a file that gets every prompt as a JSON line)
and SCRIPTED_WIRE (one that gets every request with its answer, as they were on the wire).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

import tiny_text
from glmlocal.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from glmlocal.errors import QueueFull, RequestError
from glmlocal.server.model import LoadProgress, ModelFacts, ServedModel
from glmlocal.text.chat_template import ChatTemplate
from glmlocal.text.generation_config import GenerationDefaults
from glmlocal.text.model_text import ModelText
from glmlocal.text.tokenizer import Tokenizer

Script = Callable[[str, Request], str]
WILD = "☃"  # in a script: a letter that depends on the seed
_EXTRA = ("<tool_response>", "</tool_response>", "<arg_value>", "</arg_value>")

_TEMPLATE = """[gMASK]<sop>
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ part if part is string else part.text | default('') }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|system|>NL# Tools
<tools>
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}</tools>{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>NL{{ text(m.content) }}NOTHINK
{%- elif m.role == 'system' -%}<|system|>NL{{ text(m.content) }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
NL<tool_response>NL{{ text(m.content) }}NL</tool_response>
{%- else -%}<|assistant|>
{%- set kept = clear_thinking is defined and not clear_thinking or loop.index0 > ns.last -%}
{%- if kept and m.reasoning_content -%}NL<think>{{ m.reasoning_content.strip() }}</think>{%- else -%}EMPTY{%- endif -%}
{%- if text(m.content).strip() -%}NL{{ text(m.content).strip() }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}{%- set call = call.function or call -%}
NL<tool_call>{{ call.name }}NL
{%- for key, value in call.arguments.items() -%}
<arg_key>{{ key }}</arg_key>NL<arg_value>
{{- value if value is string else value | tojson(ensure_ascii=False) -}}
</arg_value>NL
{%- endfor -%}
</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>OPEN{%- endif -%}"""
_OFF = "enable_thinking is defined and not enable_thinking"
_FORMS = {
    "a": {
        "NL": "{{ '\\n' }}",
        "NOTHINK": f"{{{{ '/nothink' if {_OFF} else '' }}}}",
        "EMPTY": "{{ '\\n<think></think>' }}",
        "OPEN": f"{{{{ '\\n<think></think>' if {_OFF} else '' }}}}",
    },
    "b": {"NL": "", "NOTHINK": "", "EMPTY": "</think>", "OPEN": f"{{{{ '</think>' if {_OFF} else '<think>' }}}}"},
}


def template(form: str) -> str:
    """GLM-4.5's ("a") or GLM-4.7's ("b") way of writing a conversation."""
    source = _TEMPLATE
    for name, text in _FORMS[form].items():
        source = source.replace(name, text)
    return source


@functools.cache
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tiny_text.tokenizer_json("glm4"))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in _EXTRA])
    return Tokenizer(backend, vocab_size=backend.get_vocab_size())


@functools.cache
def model_text(form: str) -> ModelText:
    names = ("<|endoftext|>", "<|user|>", "<|observation|>")
    ids = frozenset(id_ for name in names if (id_ := tokenizer().token_to_id(name)) is not None)
    return ModelText(tokenizer(), ChatTemplate(template(form)), GenerationDefaults(temperature=1.0), ids)


def echo(prompt: str, request: Request) -> str:
    """Thinks a little if it may, then repeats the last user's text."""
    said = re.split(r"<\|user\|>\n?", prompt)[-1].split("<|")[0].removesuffix("/nothink")
    thinks = prompt.endswith(("<think>", "<|assistant|>"))
    opening = "" if prompt.endswith("<think>") else "\n<think>"
    return (f"{opening}Let me see.</think>" if thinks else "") + f"You said: {said}<|user|>"


@dataclass(frozen=True, slots=True)
class ScriptedStats:
    running: int
    waiting: int
    max_batch: int
    max_waiting: int
    queried: int
    hits: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "queue": {
                "running": self.running,
                "waiting": self.waiting,
                "max_batch": self.max_batch,
                "max_waiting": self.max_waiting,
            },
            "speed": {"decode_tokens_per_s": 0.0, "prefill_tokens_per_s": 0.0},
            "kv": {"used_tokens": 0, "capacity_tokens": 1 << 20},
            "prefix_cache": {"queried_tokens": self.queried, "hit_tokens": self.hits},
        }


_REMEMBERED = 1000


class ScriptedClient:
    """Runs ``max_batch`` requests at a time, token by token, and remembers what it was asked.

    Every WILD of an answer is replaced by a letter that depends on the request's seed, so that n answers differ.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        delay_s: float = 0.0,
        max_batch: int = 8,
        max_waiting: int = 64,
        context: int = 1 << 17,
    ) -> None:
        self.script, self.delay_s, self.context = script, delay_s, context
        self.max_waiting, self.max_batch = max_waiting, max_batch
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.num_running = self.num_waiting = 0
        self._slots = asyncio.Semaphore(max_batch)
        self._seen: set[tuple[int, ...]] = set()
        self._queried = self._hits = 0
        self._gone: set[str] = set()
        self._record = os.environ.get("SCRIPTED_RECORD")

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        if len(request.prompt_token_ids) >= self.context:
            raise RequestError(
                f"the prompt has {len(request.prompt_token_ids)} tokens but the context holds {self.context}"
            )
        if self.num_waiting >= self.max_waiting:
            raise QueueFull(f"{self.num_waiting} requests are waiting already; try again later", 1.5)
        self.requests.append(request)
        if len(self.requests) > _REMEMBERED:  # a server that is soaked must not grow on account of its double
            for memory in (self.requests, self.aborted, self._seen):
                memory.clear()
        prompt = tokenizer().decode(request.prompt_token_ids)
        if self._record:
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(json.dumps(prompt) + "\n")
        self.num_waiting += 1
        return self._run(request, prompt)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._gone.add(request_id)

    def stats(self) -> ScriptedStats:
        return ScriptedStats(
            self.num_running, self.num_waiting, self.max_batch, self.max_waiting, self._queried, self._hits
        )

    async def aclose(self) -> None:
        self.script = echo

    async def _run(self, request: Request, prompt: str) -> AsyncIterator[RequestOutput]:
        is_waiting = True
        try:
            async with self._slots:
                self.num_waiting -= 1
                self.num_running += 1
                is_waiting = False
                try:
                    async for output in self._outputs(request, prompt):
                        yield output
                finally:
                    self.num_running -= 1
        finally:
            self.num_waiting -= is_waiting

    async def _outputs(self, request: Request, prompt: str) -> AsyncIterator[RequestOutput]:
        num_prompt, params = len(request.prompt_token_ids), request.params
        cached = self._cached(request.prompt_token_ids)
        half = num_prompt // 2
        scored: tuple[TokenLogprob, ...] = ()
        if params.prompt_logprobs is not None:
            scored = tuple(_logprob(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:])
        name = request.request_id
        if half:
            yield RequestOutput(name, (), num_prompt, half, None, None, (), cached, None, scored[:half])
        if params.max_tokens == 0:
            reason = FinishReason.LENGTH
            yield RequestOutput(name, (), num_prompt, num_prompt, reason, None, (), cached, None, scored[half:])
            return
        sampled = random.Random(params.seed)
        text = re.sub(WILD, lambda found: sampled.choice("abcdefgh"), self.script(prompt, request))
        ids = tokenizer().encode(text)
        room = min(params.max_tokens or self.context, self.context - num_prompt)
        for number, token in enumerate(itertools.chain(ids, itertools.repeat(_eos())), 1):
            await asyncio.sleep(self.delay_s)
            if request.request_id in self._gone:
                return
            stops = token in request.eos_token_ids or token in params.stop_token_ids
            reason = FinishReason.STOP if stops else FinishReason.LENGTH if number >= room else None
            if reason is not None:
                self._seen.add(request.prompt_token_ids + tuple(ids[:number]))
            logprobs = () if params.logprobs is None else (_logprob(token, params.logprobs),)
            yield RequestOutput(
                request.request_id,
                (token,),
                num_prompt,
                num_prompt + number - 1,
                reason,
                token if stops else None,
                logprobs,
                cached,
                None,
                scored[half:] if number == 1 else (),
            )
            if reason is not None:
                return

    def _cached(self, prompt: tuple[int, ...]) -> int:
        """The longest common prefix with what was computed before, as a prefix cache would have it."""
        best = 0
        for seen in self._seen:
            length = next(
                (i for i, (a, b) in enumerate(zip(seen, prompt, strict=False)) if a != b), min(len(seen), len(prompt))
            )
            best = max(best, min(length, len(prompt) - 1))
        self._queried += len(prompt)
        self._hits += best
        return best


def _eos() -> int:
    id_ = tokenizer().token_to_id("<|user|>")
    assert id_ is not None
    return id_


def _logprob(token: int, count: int) -> TokenLogprob:
    """Some distribution in which the token comes first."""
    rivals = tuple(((token + rank) % 256, -0.5 - rank) for rank in range(count))
    return TokenLogprob(token, -0.5, rivals)


def served_model(form: str = "b", client: ScriptedClient | None = None, context: int = 1 << 17) -> ServedModel:
    facts = ModelFacts(f"scripted-{form}", context, "keep", "fp32", 0)
    return ServedModel(facts, model_text(form), client or ScriptedClient(context=context))


def load(options: Any, progress: LoadProgress) -> Callable[[], Awaitable[ServedModel]]:
    """In the place of ``glmlocal.server.loading.load``."""
    total_s = float(os.environ.get("SCRIPTED_LOAD_S", "0"))
    for done in range(11):
        progress.report(done * 1000, 10_000)
        time.sleep(total_s / 10)
    if options.model == "broken":
        from glmlocal.errors import CheckpointError

        raise CheckpointError("broken is damaged; fetch it again")

    async def start() -> ServedModel:
        import agent_script

        client = ScriptedClient(
            agent_script.answer,
            delay_s=float(os.environ.get("SCRIPTED_DELAY_S", "0")),
            max_batch=options.batch,
            max_waiting=options.max_waiting,
            context=options.context or 1 << 17,
        )
        return served_model(options.model, client, client.context)

    return start


class Wire:
    """ASGI middleware that writes down what went over the wire, one JSON line per request."""

    def __init__(self, app: Any, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, answer = bytearray(), bytearray()
        seen: dict[str, Any] = {"method": scope["method"], "path": scope["path"]}
        seen["query"] = scope["query_string"].decode()
        seen["headers"] = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]

        async def receiving() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
            answer.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            seen["body"], seen["response"] = body.decode("utf-8", "replace"), answer.decode("utf-8", "replace")
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(seen, ensure_ascii=False) + "\n")


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from glmlocal.server import app, loading

    loading.load = load
    if path := os.environ.get("SCRIPTED_WIRE"):
        create_app = app.create_app
        app.create_app = lambda *args, **kwargs: Wire(create_app(*args, **kwargs), path)
    from glmlocal.cli.main import main as real_main

    return real_main()


if __name__ == "__main__":
    sys.exit(main())
