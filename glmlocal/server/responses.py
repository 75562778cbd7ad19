"""``/v1/responses``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmlocal.server import sse
from glmlocal.server.begin import begin
from glmlocal.server.context import ServerContext
from glmlocal.server.errors import api_error
from glmlocal.server.generation import Generation, Step, Wanted
from glmlocal.server.model import ServedModel
from glmlocal.server.reply import Reply, usage_dict
from glmlocal.server.response_items import Items
from glmlocal.server.response_store import ResponseStore
from glmlocal.server.responses_input import conversation, is_probe, text_grammar, use_of_tools
from glmlocal.server.responses_types import ResponsesRequest, given


async def responses(body: ResponsesRequest, request: Request, context: ServerContext) -> Response:
    model = context.state.ready()
    headers = context.state.answering(body.model)
    history = [] if body.previous_response_id is None else context.responses.history(body.previous_response_id)
    answer = _Answer(model, body, context.state.served_names[0], context.responses)
    if is_probe(body):
        return _probed(answer, body, headers)
    asked = conversation(body, history)
    wanted = Wanted(body.sampling(), 1, use_of_tools(body, asked), text_grammar(body), body.user or "")
    generation = await begin(context, model, asked, wanted)
    if body.stream:
        return context.stream(_events(answer, generation), generation, headers)
    return JSONResponse(await context.collected(answer.collect(generation), generation, request), headers=headers)


def _probed(answer: _Answer, body: ResponsesRequest, headers: dict[str, str]) -> Response:
    """An answer without output to an input without content."""
    response = answer.kept(answer.response("completed", usage=answer.usage(None)))
    if not body.stream:
        return JSONResponse(response, headers=headers)

    async def events() -> AsyncIterator[bytes]:
        yield answer.event("response.created", response=answer.response("in_progress"))
        yield answer.event("response.completed", response=response)

    return sse.EventStream(events(), headers=headers)


@dataclass(slots=True)
class _Answer:
    """One response as it grows."""

    model: ServedModel
    body: ResponsesRequest
    served_name: str
    store: ResponseStore
    response_id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    reply: Reply = field(init=False)
    items: Items = field(init=False)
    _sequence: int = 0

    def __post_init__(self) -> None:
        self.reply = Reply(self.model)
        include = self.body.include or ()
        self.items = Items(
            self.model,
            seals="reasoning.encrypted_content" in include,
            with_logprobs="message.output_text.logprobs" in include,
        )

    def response(self, status: str, **fields: Any) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.served_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": given(body.text.format) if body.text and body.text.format else {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else given(body.tool_choice),
            "tools": [given(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
            **fields,
        }

    def usage(self, generation: Generation | None) -> dict[str, Any]:
        completion = self.reply.completion
        num_prompt_tokens = 0 if generation is None else generation.num_prompt_tokens
        usage = usage_dict(num_prompt_tokens, [] if completion is None else [completion])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def ended(self, generation: Generation) -> dict[str, Any]:
        """The response when its last token is there."""
        is_cut = self.reply.finish_reason == "length"
        response = self.response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=self.items.done,
            usage=self.usage(generation),
        )
        return self.kept(response)

    def kept(self, response: dict[str, Any]) -> dict[str, Any]:
        """The same, remembered for the next request unless this one wants it forgotten."""
        if self.body.store is not False:
            self.store.keep(response, self.body.items)
        return response

    async def collect(self, generation: Generation) -> dict[str, Any]:
        steps = generation.steps()
        try:
            async for step in steps:
                for _ in self.take(step):
                    pass
        finally:
            await sse.aclose(steps)
        return self.ended(generation)

    def take(self, step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and fields of the events of a step."""
        self.reply.take(step.delta)
        for event in step.delta.events:
            yield from self.items.take(event, self.reply)
        if step.delta.completion is not None:
            yield from self.items.close()

    def event(self, kind: str, **fields: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return sse.event(kind, {"type": kind, "sequence_number": number, **fields})


async def _events(answer: _Answer, generation: Generation) -> AsyncIterator[bytes]:
    steps = generation.steps()
    try:
        yield answer.event("response.created", response=answer.response("in_progress"))
        yield answer.event("response.in_progress", response=answer.response("in_progress"))
        async for step in steps:
            for kind, fields in answer.take(step):
                yield answer.event(kind, **fields)
        ended = answer.ended(generation)
        yield answer.event(f"response.{ended['status']}", response=ended)
    except Exception as error:
        found = api_error(error)
        details = {"code": found.code or "server_error", "message": found.message}
        failed = answer.response("failed", error=details, output=answer.items.done)
        yield answer.event("response.failed", response=failed)
    finally:
        await sse.aclose(steps)
