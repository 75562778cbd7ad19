"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmlocal.completion import Completion
from glmlocal.server import sse
from glmlocal.server.anthropic import conversation, output_grammar, use_of_tools
from glmlocal.server.anthropic_types import CountRequest, MessagesRequest
from glmlocal.server.begin import begin
from glmlocal.server.context import ServerContext
from glmlocal.server.errors import api_error, error_body
from glmlocal.server.generation import Generation, Step, Wanted
from glmlocal.server.model import ServedModel
from glmlocal.server.prompts import chat_prompt
from glmlocal.server.reply import Reply
from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallEnd, ToolCallStart

PING = sse.event("ping", {"type": "ping"})
_SIGNATURE = "glmlocal"  # clients want one and send it back; nothing here checks it
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(body: MessagesRequest, request: Request, context: ServerContext) -> Response:
    model = context.state.ready()
    headers = context.state.answering(body.model)
    asked = conversation(body)
    wanted = Wanted(body.sampling(), 1, use_of_tools(body, asked.tools), output_grammar(body))
    generation = await begin(context, model, asked, wanted)
    answer = _Answer(model, body.model or context.state.served_names[0], generation.num_prompt_tokens)
    if body.stream:
        return context.stream(_events(answer, generation), generation, headers, PING)
    return JSONResponse(await context.collected(answer.collect(generation), generation, request), headers=headers)


async def count_tokens(body: CountRequest, context: ServerContext) -> dict[str, int]:
    """Exactly what a message would have, tools and system included."""
    model = context.state.ready()
    prompt = await asyncio.to_thread(chat_prompt, model, conversation(body), is_counted=True)
    return {"input_tokens": len(prompt.token_ids)}


@dataclass(slots=True)
class _Answer:
    """One message as it grows; at most one content block is open at a time."""

    model: ServedModel
    model_name: str
    num_prompt_tokens: int
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    reply: Reply = field(init=False)
    _open: Literal["thinking", "text", "tool_use"] | None = None
    _num_blocks: int = 0

    def __post_init__(self) -> None:
        self.reply = Reply(self.model, "toolu_")

    async def collect(self, generation: Generation) -> dict[str, Any]:
        steps = generation.steps()
        try:
            async for step in steps:
                self.reply.take(step.delta)
        finally:
            await sse.aclose(steps)
        completion = self.reply.completion
        assert completion is not None
        return self.message(self._content(), usage=self._usage(completion), **self._ending(completion))

    def message(self, content: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model_name,
            "content": content,
            **fields,
        }

    def _content(self) -> list[dict[str, Any]]:
        """Blocks of a whole message. A call that was cut off has no input that could be given, and is left out."""
        blocks: list[dict[str, Any]] = []
        if self.reply.reasoning:
            blocks.append({"type": "thinking", "thinking": self.reply.reasoning, "signature": _SIGNATURE})
        if self.reply.text:
            blocks.append({"type": "text", "text": self.reply.text})
        for call in self.reply.calls:
            if call.is_complete:
                arguments = json.loads(call.arguments)
                blocks.append({"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments})
        return blocks

    def _usage(self, completion: Completion | None, cached_tokens: int = 0) -> dict[str, int]:
        """Anthropic's input_tokens are those that were computed."""
        cached = cached_tokens if completion is None else completion.usage.cached_tokens
        return {
            "input_tokens": self.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if completion is None else completion.usage.completion_tokens,
        }

    def _ending(self, completion: Completion) -> dict[str, Any]:
        reason = _STOP_REASONS.get(self.reply.finish_reason, "end_turn")
        if completion.stop is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": completion.stop}

    def opening(self) -> bytes:
        message = self.message([], stop_reason=None, stop_sequence=None, usage=self._usage(None))
        return _event("message_start", message=message)

    def events(self, step: Step) -> Iterator[bytes]:
        """What a step adds to the stream."""
        self.reply.take(step.delta)
        for event in step.delta.events:
            yield from self._event(event)
        completion = step.delta.completion
        if completion is not None:
            yield from self._close()
            yield _event("message_delta", delta=self._ending(completion), usage=self._usage(completion))
            yield _event("message_stop")

    def _event(self, event: object) -> Iterator[bytes]:
        match event:
            case ReasoningDelta(text):
                yield from self._open_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ContentDelta(text):
                yield from self._open_block("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case ToolCallStart(index, name):
                yield from self._close()
                block = {"type": "tool_use", "id": self.reply.calls[index].call_id, "name": name, "input": {}}
                yield from self._open_block("tool_use", block)
            case ToolCallDelta(_, arguments):
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            case ToolCallEnd():
                yield from self._close()

    def _open_block(self, kind: Literal["thinking", "text", "tool_use"], block: dict[str, Any]) -> Iterator[bytes]:
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        yield _event("content_block_start", index=self._num_blocks, content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        yield _event("content_block_stop", index=self._num_blocks)
        self._open = None
        self._num_blocks += 1

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event(kind, {"type": kind, **fields})


async def _events(answer: _Answer, generation: Generation) -> AsyncIterator[bytes]:
    steps = generation.steps()
    try:
        yield answer.opening()
        yield PING
        async for step in steps:
            for event in answer.events(step):
                yield event
    except Exception as error:
        yield sse.event("error", error_body(api_error(error), anthropic=True))
    finally:
        await sse.aclose(steps)
