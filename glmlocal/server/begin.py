"""The beginning that all chat APIs share: a conversation → a generation that runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from glmlocal.server.context import ServerContext
from glmlocal.server.generation import Generation, Wanted
from glmlocal.server.model import ServedModel
from glmlocal.server.prompts import Conversation, chat_prompt
from glmlocal.server.switches import after_thinking
from glmlocal.server.tool_grammar import answer_grammar


async def begin(context: ServerContext, model: ServedModel, conversation: Conversation, wanted: Wanted) -> Generation:
    """Render the prompt beside the event loop, and queue the request. Raises what makes it impossible."""
    prompt = await asyncio.to_thread(chat_prompt, model, conversation)
    grammar = answer_grammar(wanted.grammar, wanted.tool_use, model.text.tokenizer)
    if grammar is not None:
        grammar = replace(grammar, after_token_id=after_thinking(model, prompt.in_reasoning))
    generation = Generation(model, prompt, replace(wanted, grammar=grammar), context.metrics)
    await generation.start()
    return generation
