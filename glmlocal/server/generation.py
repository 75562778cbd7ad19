"""One or several answers to one prompt: the engine's outputs → deltas of text, in the order in which they come."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glmlocal.completion import Completion, CompletionBuilder, CompletionDelta
from glmlocal.engine.request import Grammar, Request, SamplingParams
from glmlocal.errors import RequestError
from glmlocal.server.errors import ApiError
from glmlocal.server.metrics import Metrics
from glmlocal.server.model import EngineClient, ServedModel
from glmlocal.server.prompts import Prompt
from glmlocal.server.sse import aclose
from glmlocal.text.stream_parser import ReasoningParser
from glmlocal.text.tool_calls import ToolCallParser

_FIRST_S = 0.25  # how long an error may take to become a status instead of an event of the stream
_BUFFERED = 64  # deltas that wait for a reader; the engine's own streams hold the rest as token ids


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and what it says about using them."""

    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    only: str | None = None  # the one function that must be called; choice is "required" then
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the answers are to be made, whichever API it came through."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of SamplingParams; None: not given
    n: int = 1
    tool_use: ToolUse = ToolUse()
    grammar: Grammar | None = None
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One delta of one answer."""

    index: int
    delta: CompletionDelta
    done_tokens: int  # of the prompt
    total_tokens: int


class Generation:
    """The answers to one prompt. ``start``, then ``steps``, which aborts what still runs when it is closed."""

    def __init__(self, model: ServedModel, prompt: Prompt, wanted: Wanted, metrics: Metrics) -> None:
        """Raises RequestError for sampling values out of range, ApiError for a prompt that is too long."""
        self._client: EngineClient = model.client
        self._metrics = metrics
        self.prompt_token_ids = prompt.token_ids
        params = _params(model, wanted)
        _check_length(model, prompt)
        name = secrets.token_hex(12)
        self._requests = [
            Request(
                f"{name}-{index}",
                prompt.token_ids,
                _seeded(params, index),
                model.text.eos_token_ids,
                wanted.client_id,
            )
            for index in range(wanted.n)
        ]
        self._builders = [_builder(model, prompt, wanted.tool_use, request.params) for request in self._requests]
        self._queue: asyncio.Queue[Step | Exception] = asyncio.Queue(_BUFFERED)
        self._pumps: list[asyncio.Task[None]] = []
        self._first: Step | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    async def start(self) -> None:
        """Queue the requests. Raises RequestError, QueueFull or EngineError."""
        try:
            for index, request in enumerate(self._requests):
                outputs = self._client.submit(request)
                self._pumps.append(asyncio.create_task(self._pump(index, request, outputs)))
            self._first = await self._peek()
        except BaseException:
            await self.stop()
            raise

    async def steps(self) -> AsyncIterator[Step]:
        """What happens, until every answer is complete. Raises what a failing engine raises."""
        num_open = len(self._requests)
        try:
            while num_open:
                step = self._first or await self._queue.get()
                self._first = None
                if isinstance(step, Exception):
                    raise step
                if step.delta.completion is not None:
                    num_open -= 1
                    self._check(step.delta.completion)
                yield step
        finally:
            await self.stop()

    def _check(self, completion: Completion) -> None:
        self._metrics.completed(completion)
        if completion.finish_reason == "error":
            raise ApiError(500, completion.error or "the engine failed; see the server's log", code="engine_error")
        if completion.finish_reason == "abort":
            raise ApiError(503, "the request was cancelled because the server is stopping", code="stopping")

    async def _peek(self) -> Step | None:
        """The first step if it comes soon. Raises the error that came instead; grammars are always waited for."""
        grammar = self._requests[0].params.grammar
        try:
            async with asyncio.timeout(None if grammar is not None else _FIRST_S):
                first = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(first, Exception):
            raise first
        return first

    async def _pump(self, index: int, request: Request, outputs: AsyncIterator[Any]) -> None:
        builder = self._builders[index]
        is_over = was_stopped = False
        try:
            async for output in outputs:
                delta = builder.push(output)
                is_over, was_stopped = output.finish_reason is not None, delta.completion is not None
                done = min(output.num_computed_tokens, output.num_prompt_tokens)
                await self._queue.put(Step(index, delta, done, output.num_prompt_tokens))
                if delta.completion is not None:
                    return
            raise ApiError(500, "the engine ended an answer without saying why", code="engine_error")
        except Exception as error:
            await self._queue.put(error)
        finally:
            if not is_over:  # a stop string, or nobody listens any more
                self._client.abort(request.request_id)
                self._metrics.aborted(by_client=not was_stopped)
            await aclose(outputs)

    async def stop(self) -> None:
        """Abort what still runs; stopping twice is allowed. For whoever started and may not come to read."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


def _params(model: ServedModel, wanted: Wanted) -> SamplingParams:
    """The model's generation_config under the request's values."""
    given = {name: value for name, value in wanted.sampling.items() if value is not None}
    tool_use = wanted.tool_use
    if tool_use.tools and tool_use.choice == "none":
        given["logit_bias"] = {**given.get("logit_bias", {}), **_no_calls(model)}
    return SamplingParams.from_dict({**model.text.defaults.sampling(), **given, "grammar": wanted.grammar})


def _no_calls(model: ServedModel) -> dict[int, float]:
    """A bias that keeps the model from opening a call, where that is one token."""
    token_id = model.tokenizer.token_to_id("<tool_call>")
    return {} if token_id is None else {token_id: -1000.0}


def _check_length(model: ServedModel, prompt: Prompt) -> None:
    """Raises RequestError. An answer may be shorter than max_tokens, but there must be room for one."""
    context = model.facts.context
    if len(prompt.token_ids) >= context:
        raise RequestError(
            f"the prompt has {len(prompt.token_ids)} tokens but the context holds {context}, the answer included; "
            "shorten it or start the server with a larger --context"
        )


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Answers to one seeded request differ, and are the same the next time."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index) % 2**63)


def _builder(model: ServedModel, prompt: Prompt, tool_use: ToolUse, params: SamplingParams) -> CompletionBuilder:
    parser = None if prompt.in_reasoning is None else ReasoningParser(prompt.in_reasoning)
    tools = ToolCallParser(tool_use.tools, suppress=tool_use.choice == "none") if tool_use.tools else None
    return CompletionBuilder(
        model.text.tokenizer, params, parser, 0.0, tools=tools, single_call=tools is not None and not tool_use.parallel
    )
