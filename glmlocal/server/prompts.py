"""Messages → the ids of the prompt, and what is known of the answer before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmlocal.errors import RequestError
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


def prompt_ids(model: ServedModel, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
    """The ids of a prompt that is to be answered. Raises RequestError for one that is many times too long."""
    context = model.facts.context
    if model.tokenizer.surely_exceeds(text, context):
        raise RequestError(
            f"the prompt of {len(text)} characters is several times too long: the context holds {context} tokens, the "
            "answer included; shorten it or start the server with a larger --context"
        )
    return tuple(model.tokenizer.encode(text, add_special_tokens=add_special_tokens))


def chat_prompt(model: ServedModel, conversation: Conversation, *, is_counted: bool = False) -> Prompt:
    """Render and tokenize. Takes a while for long conversations: not for the event loop's thread.

    ``is_counted``: it is not to be answered, and may be of any length.
    Raises RequestError or ApiError for messages that the template cannot take, and for a prompt that is far too long.
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
        tuple(model.tokenizer.encode(text)) if is_counted else prompt_ids(model, text),
        starts_in_reasoning(text, thinking_enabled=thinking) if template.supports_thinking else None,
    )
