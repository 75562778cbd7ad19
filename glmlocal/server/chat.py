"""``POST /v1/chat/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmlocal.server import sse
from glmlocal.server.begin import begin
from glmlocal.server.context import ServerContext
from glmlocal.server.errors import api_error, error_body
from glmlocal.server.generation import Generation, Step, ToolUse, Wanted
from glmlocal.server.model import ServedModel
from glmlocal.server.openai_types import ChatRequest
from glmlocal.server.prompts import Conversation
from glmlocal.server.reply import Reply, timings_dict, token_logprobs, usage_dict
from glmlocal.server.switches import message_dicts, response_grammar, template_switches, tool_dicts, tool_use
from glmlocal.text.stream_parser import ContentDelta, ReasoningDelta
from glmlocal.text.tool_calls import ToolCallDelta, ToolCallStart


async def chat_completions(body: ChatRequest, request: Request, context: ServerContext) -> Response:
    model = context.state.ready()
    headers = context.state.answering(body.model)
    conversation = _conversation(body)
    use = tool_use(conversation.tools, body.tool_choice, body.parallel_tool_calls)
    wanted = Wanted(body.sampling(), body.n or 1, use, response_grammar(body.response_format), body.user or "")
    generation = await begin(context, model, conversation, wanted)
    answer = _Answer(model, body, use, context.state.served_names[0], wanted.n)
    if body.stream:
        return context.stream(_chunks(answer, generation), generation, headers)
    return JSONResponse(await context.collected(answer.collect(generation), generation, request), headers=headers)


def _conversation(body: ChatRequest) -> Conversation:
    switches = template_switches(effort=body.reasoning_effort, thinking=body.thinking, kwargs=body.chat_template_kwargs)
    return Conversation(message_dicts(body.messages), tool_dicts(body.tools), switches)


@dataclass(slots=True)
class _Answer:
    """The choices of one response, as they grow."""

    model: ServedModel
    body: ChatRequest
    use: ToolUse
    served_name: str
    n: int
    response_id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    replies: list[Reply] = field(init=False)

    def __post_init__(self) -> None:
        self.replies = [Reply(self.model) for _ in range(self.n)]

    def frame(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.served_name,
            "system_fingerprint": None,
            **fields,
        }

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        steps = generation.steps()
        try:
            async for step in steps:
                self.replies[step.index].take(step.delta)
        finally:
            await sse.aclose(steps)
        choices = [self._choice(index, reply) for index, reply in enumerate(self.replies)]
        return self.frame("chat.completion", choices=choices, **self.totals(generation))

    def totals(self, generation: Generation) -> dict[str, Any]:
        completions = [reply.completion for reply in self.replies if reply.completion is not None]
        return {
            "usage": usage_dict(generation.num_prompt_tokens, completions),
            "timings": timings_dict(completions),
        }

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.calls else "")}
        if reply.reasoning:
            message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
        if reply.calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in reply.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply),
            "finish_reason": reply.finish_reason,
        }

    def _logprobs(self, reply: Reply) -> dict[str, Any] | None:
        """All that were not reported yet."""
        if not self.body.logprobs or not reply.logprobs:
            return None
        entries, reply.logprobs = token_logprobs(self.model.tokenizer, reply.logprobs), []
        return {"content": entries, "refusal": None}

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        """What a step adds to the stream."""
        reply = self.replies[step.index]
        reply.take(step.delta)
        deltas = [_delta(event, reply) for event in step.delta.events]
        chunks = [self._chunk(step.index, delta) for delta in deltas if delta]
        if step.delta.completion is not None:
            chunks.append(self._chunk(step.index, {}, reply.finish_reason))
        if chunks:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(reply)
        return chunks

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.n)]

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.frame("chat.completion.chunk", choices=[choice])


def _delta(event: object, reply: Reply) -> dict[str, Any]:
    """One event as OpenAI streams it; nothing for the end of a call."""
    match event:
        case ReasoningDelta(text):
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": reply.calls[index].call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolCallDelta(index, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
        case _:
            return {}


async def _chunks(answer: _Answer, generation: Generation) -> AsyncIterator[bytes]:
    options = answer.body.stream_options
    steps = generation.steps()
    try:
        for chunk in answer.opening():
            yield sse.data(chunk)
        async for step in steps:
            if step.delta.prefill_progress is not None and options is not None and options.include_progress:
                progress = {"done_tokens": step.done_tokens, "total_tokens": step.total_tokens}
                yield sse.data(answer.frame("chat.completion.chunk", choices=[], prefill_progress=progress))
            for chunk in answer.chunks(step):
                yield sse.data(chunk)
        if options is not None and options.include_usage:
            yield sse.data(answer.frame("chat.completion.chunk", choices=[], **answer.totals(generation)))
    except Exception as error:
        yield sse.data(error_body(api_error(error), anthropic=False))
    finally:
        await sse.aclose(steps)
    yield sse.DONE
