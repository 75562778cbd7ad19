"""``POST /tokenize`` and ``/detokenize``, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field

from glmlocal.server.context import ServerContext
from glmlocal.server.errors import bad_request
from glmlocal.server.limits import MAX_MESSAGES, MAX_TOOLS
from glmlocal.server.openai_types import Message, Strict, Tool
from glmlocal.server.prompts import Conversation, chat_prompt
from glmlocal.server.switches import message_dicts, template_switches, tool_dicts

_MAX_IDS = 4_000_000


class TokenizeRequest(Strict):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=_MAX_IDS)]


async def tokenize(body: TokenizeRequest, context: ServerContext) -> dict[str, Any]:
    model = context.state.ready()
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("send either prompt or messages", "prompt")
    if body.messages is not None:
        switches = template_switches(kwargs=body.chat_template_kwargs)
        asked = Conversation(message_dicts(body.messages), tool_dicts(body.tools), switches)
        ids = list((await asyncio.to_thread(chat_prompt, model, asked, is_counted=True)).token_ids)
    else:
        assert body.prompt is not None
        special = body.add_special_tokens
        ids = await asyncio.to_thread(model.tokenizer.encode, body.prompt, add_special_tokens=special)
    result = {"count": len(ids), "max_model_len": model.facts.context, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [model.tokenizer.token_bytes(id_).decode("utf-8", "replace") for id_ in ids]
    return result


async def detokenize(body: DetokenizeRequest, context: ServerContext) -> dict[str, str]:
    model = context.state.ready()
    return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}
