"""``POST /v1/completions``: text as it stands, without the chat template."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmlocal.completion import Completion
from glmlocal.engine.request import TokenLogprob
from glmlocal.server import sse
from glmlocal.server.context import ServerContext
from glmlocal.server.errors import api_error, bad_request, error_body
from glmlocal.server.generation import Generation, Step, Wanted
from glmlocal.server.limits import MAX_N
from glmlocal.server.model import ServedModel
from glmlocal.server.openai_types import CompletionRequest
from glmlocal.server.prompts import Prompt, prompt_ids
from glmlocal.server.reply import Reply, timings_dict, usage_dict
from glmlocal.text.detokenizer import IncrementalDetokenizer


async def completions(body: CompletionRequest, request: Request, context: ServerContext) -> Response:
    model = context.state.ready()
    headers = context.state.answering(body.model)
    if body.suffix:
        raise bad_request("suffix is not supported; put what comes before into prompt", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of is not supported; ask for n answers and choose among them", "best_of")
    prompts = await asyncio.to_thread(_prompts, model, body.prompt)
    n = body.n or 1
    if len(prompts) * n > MAX_N:
        raise bad_request(f"{len(prompts)} prompts × n {n} are more than {MAX_N} answers; send fewer", "prompt")
    sampling = {"max_tokens": 16, **{key: value for key, value in body.sampling().items() if value is not None}}
    wanted = Wanted(sampling, n, client_id=body.user or "")
    generations = [Generation(model, prompt, wanted, context.metrics) for prompt in prompts]
    group = _Group(generations)
    await group.start()
    answer = _Answer(model, body, context.state.served_names[0], generations, n)
    if body.stream:
        return context.stream(_chunks(answer, group), group, headers)
    return JSONResponse(await context.collected(answer.collect(group), group, request), headers=headers)


def _prompts(model: ServedModel, prompt: str | Sequence[Any]) -> list[Prompt]:
    """One prompt, or a list of them; token ids are taken as they are. Raises RequestError or ApiError."""
    if isinstance(prompt, str):
        return [Prompt(prompt_ids(model, prompt, add_special_tokens=True))]
    if prompt and all(isinstance(part, int) for part in prompt):
        return [Prompt(tuple(int(part) for part in prompt))]
    if not prompt:
        raise bad_request("prompt is an empty list", "prompt")
    return [each for part in prompt for each in _prompts(model, part)]


class _Group:
    """Generations of several prompts that run side by side; like one of them to its reader."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations

    async def start(self) -> None:
        try:
            for generation in self._generations:
                await generation.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        for generation in self._generations:
            await generation.stop()

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """Steps with the number of their prompt, prompt by prompt; the engine computes them all at once."""
        for number, generation in enumerate(self._generations):
            steps = generation.steps()
            try:
                async for step in steps:
                    yield number, step
            finally:
                await sse.aclose(steps)


@dataclass(slots=True)
class _Answer:
    model: ServedModel
    body: CompletionRequest
    served_name: str
    generations: Sequence[Generation]
    n: int
    response_id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    replies: list[Reply] = field(init=False)
    _reports: list[_Report] = field(init=False)  # one for each answer

    def __post_init__(self) -> None:
        num_answers = len(self.generations) * self.n
        self.replies = [Reply(self.model) for _ in range(num_answers)]
        self._reports = [_Report(self.model) for _ in range(num_answers)]

    def frame(self, **fields: Any) -> dict[str, Any]:
        head = {"id": self.response_id, "object": "text_completion", "created": self.created}
        return {**head, "model": self.served_name, **fields}

    async def collect(self, group: _Group) -> dict[str, Any]:
        steps = group.steps()
        try:
            async for number, step in steps:
                self.replies[number * self.n + step.index].take(step.delta)
        finally:
            await sse.aclose(steps)
        choices = [
            self.choice(index, self.echoed(index) + reply.text, reply.finish_reason)
            for index, reply in enumerate(self.replies)
        ]
        return self.frame(choices=choices, **self.totals())

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index), "finish_reason": finish_reason}

    def echoed(self, index: int) -> str:
        """The prompt's own text, if it is to come first."""
        if not self.body.echo:
            return ""
        prompt = self.generations[index // self.n].prompt_token_ids
        return self.model.tokenizer.decode(prompt, skip_special_tokens=True)

    def totals(self) -> dict[str, Any]:
        completions = [reply.completion for reply in self.replies if reply.completion is not None]
        num_prompt_tokens = sum(generation.num_prompt_tokens for generation in self.generations)
        return {"usage": usage_dict(num_prompt_tokens, completions), "timings": timings_dict(completions)}

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        """Of the tokens that were not reported yet, in the shape of this old API; an echoed prompt's come first."""
        reply, report = self.replies[index], self._reports[index]
        if self.body.logprobs is None:
            return None
        if self.body.echo and report.is_empty:
            prompt = self.generations[index // self.n].prompt_token_ids
            for token_id, entry in zip(prompt, (None, *reply.prompt_logprobs), strict=False):
                report.add(token_id, entry)
        for entry in reply.logprobs:
            report.add(entry.token_id, entry)
        reply.logprobs = []
        return report.taken()


class _Report:
    """Tokens of an answer, with logprobs and the places where they begin in its text."""

    def __init__(self, model: ServedModel) -> None:
        self._tokenizer, self._detokenizer = model.tokenizer, IncrementalDetokenizer(model.tokenizer)
        self._num_chars = 0
        self._new: list[tuple[str, TokenLogprob | None, int]] = []
        self.is_empty = True

    def add(self, token_id: int, entry: TokenLogprob | None) -> None:
        """``entry`` None: the first token of a prompt, which nothing came before."""
        self.is_empty = False
        self._new.append((self._text(token_id), entry, self._num_chars))
        self._num_chars += len(self._detokenizer.push(token_id))

    def taken(self) -> dict[str, Any] | None:
        """What was added since the last time."""
        new, self._new = self._new, []
        if not new:
            return None
        return {
            "tokens": [token for token, _, _ in new],
            "token_logprobs": [None if entry is None else max(entry.logprob, -9999.0) for _, entry, _ in new],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry, _ in new],
            "text_offset": [offset for _, _, offset in new],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that was taken, as OpenAI has it."""
        pairs = [*entry.top, (entry.token_id, entry.logprob)]
        return {self._text(token_id): max(logprob, -9999.0) for token_id, logprob in pairs}

    def _text(self, token_id: int) -> str:
        """Half a character in OpenAI's form, so that two of them are not one key."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def _chunks(answer: _Answer, group: _Group) -> AsyncIterator[bytes]:
    options = answer.body.stream_options
    steps = group.steps()
    begun: set[int] = set()
    try:
        async for number, step in steps:
            index = number * answer.n + step.index
            reply = answer.replies[index]
            reply.take(step.delta)
            completion: Completion | None = step.delta.completion
            if step.delta.text or completion is not None:
                text = step.delta.text if index in begun else answer.echoed(index) + step.delta.text
                begun.add(index)
                finish_reason = None if completion is None else reply.finish_reason
                yield sse.data(answer.frame(choices=[answer.choice(index, text, finish_reason)]))
        if options is not None and options.include_usage:
            yield sse.data(answer.frame(choices=[], **answer.totals()))
    except Exception as error:
        yield sse.data(error_body(api_error(error), anthropic=False))
    finally:
        await sse.aclose(steps)
    yield sse.DONE
