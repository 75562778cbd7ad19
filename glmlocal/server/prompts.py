"""Messages → the ids of the prompt, and what is known of the answer before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmlocal.server.errors import bad_request
from glmlocal.server.model import ServedModel
from glmlocal.server.raw_calls import unmark, with_marks
from glmlocal.text.messages import normalize_messages
from glmlocal.text.stream_parser import starts_in_reasoning

_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "documents"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. ``in_reasoning`` None: the model does not reason, or the text is raw."""

    token_ids: tuple[int, ...]
    in_reasoning: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given, whichever API it came through."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()  # in OpenAI's form
    switches: Mapping[str, Any] = field(default_factory=dict)  # variables of the template


def chat_prompt(model: ServedModel, conversation: Conversation) -> Prompt:
    """Render and tokenize. Takes a while for long conversations: not for the event loop's thread.

    Raises RequestError or ApiError for messages that the template cannot take.
    """
    template, switches = model.template, conversation.switches
    taken = sorted(_RESERVED & set(switches))
    if taken:
        raise bad_request(f"chat_template_kwargs may not set {', '.join(taken)}", "chat_template_kwargs")
    messages = normalize_messages(conversation.messages)
    marked, texts = with_marks(messages, model.raw_calls)
    tools = conversation.tools or None
    text = None
    if texts:
        text = unmark(template.render(marked, tools=tools, **switches), texts)
    if text is None:
        text = template.render(messages, tools=tools, **switches)
    thinking = bool(switches.get("enable_thinking", True))
    return Prompt(
        tuple(model.tokenizer.encode(text)),
        starts_in_reasoning(text, thinking_enabled=thinking) if template.supports_thinking else None,
    )
