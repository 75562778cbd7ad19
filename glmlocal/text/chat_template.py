"""Chat templates: where a checkpoint keeps its template, and messages → prompt text.

The template is part of the checkpoint, so it is run as what it is: somebody else's program (``template_sandbox``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2.exceptions import SecurityError

from glmlocal.errors import CheckpointError, RequestError
from glmlocal.text.files import one_line, quoted, read_json_object, read_text_file
from glmlocal.text.messages import normalize_messages, plain
from glmlocal.text.template_meter import MAX_VALUE, TemplateOverrun, input_weight, metered
from glmlocal.text.template_sandbox import MAX_SOURCE_CHARS, TemplateEnvironment

MAX_PROMPT_CHARS = 16_000_000


class ChatTemplate:
    """A compiled template. Immutable; ``render`` may run in several threads at once.

    ``supports_thinking``     the template (and so the model) knows ``<think>``
    ``can_disable_thinking``  … and lets ``enable_thinking=False`` turn it off
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: names such as ``bos_token`` that the template may print. Raises CheckpointError."""
        if len(source) > MAX_SOURCE_CHARS:
            raise CheckpointError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are run")
        self.source = source
        self.can_disable_thinking = "enable_thinking" in source
        self.supports_thinking = self.can_disable_thinking or "<think>" in source
        self._special_tokens = dict(special_tokens or {})
        try:
            with metered():
                self._template = TemplateEnvironment().load(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template cannot be read: line {error.lineno}: {one_line(error.message)}"
            raise CheckpointError(message) from error
        except Exception as error:  # nesting too deep for Python, numbers too long, a constant that cannot be computed
            message = f"the chat template cannot be compiled: {one_line(error) or type(error).__name__}"
            raise CheckpointError(message) from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """The prompt for a conversation. ``kwargs`` (``enable_thinking=False`` …) become variables of the template.

        Raises RequestError: messages that are malformed or that the template refuses, with its own words;
        CheckpointError: a template that does something forbidden, or does not come to an end.
        """
        variables = {
            **self._special_tokens,
            **{name: plain(value, name) for name, value in kwargs.items()},
            "messages": normalize_messages(messages),
            "tools": _tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            allowance = input_weight(variables)
        except TemplateOverrun:
            raise RequestError(f"the conversation is too large to render: over {MAX_VALUE // 1_000_000} MB") from None
        try:
            with metered(allowance):
                prompt = self._template.render(variables)
        except (TemplateOverrun, RecursionError, OverflowError, MemoryError) as error:
            reason = one_line(error) or "out of memory"
            raise CheckpointError(f"the chat template was stopped: {reason}") from error
        except SecurityError as error:
            raise CheckpointError(f"the chat template does what it must not: {one_line(error)}") from error
        except Exception as error:  # raise_exception(), undefined variables, and every error of Python inside it
            message = one_line(error) or type(error).__name__
            raise RequestError(f"the chat template refuses these messages: {message}") from error
        if len(prompt) > MAX_PROMPT_CHARS:
            raise CheckpointError(f"the chat template made a prompt of {len(prompt)} characters from these messages")
        return prompt


def load_chat_template(directory: Path) -> str | None:
    """The template's source: chat_template.jinja, else ``chat_template`` of tokenizer_config.json. None: a base model.

    Raises CheckpointError.
    """
    source = read_text_file(directory / "chat_template.jinja")
    if source is not None:
        return source if source.strip() else None
    path = directory / "tokenizer_config.json"
    return _source((read_json_object(path) or {}).get("chat_template"), str(path))


def chat_template_from_gguf(metadata: Mapping[str, object]) -> str | None:
    """The source in ``tokenizer.chat_template``. None: a base model. Raises CheckpointError."""
    return _source(metadata.get("tokenizer.chat_template"), "the GGUF file")


def _source(value: object, where: str) -> str | None:
    if isinstance(value, list):  # several, by name
        entries = [entry for entry in value if isinstance(entry, Mapping)]
        by_name = {str(entry.get("name")): entry.get("template") for entry in entries}
        if "default" not in by_name:
            raise CheckpointError(f"{where} has no chat template named 'default', only {quoted(sorted(by_name))}")
        value = by_name["default"]
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise CheckpointError(f"{where} has a chat_template that is not text: {quoted(value)}")
    return value if value.strip() else None


def _tools(tools: Sequence[Mapping[str, object]] | None) -> object:
    if not tools:
        return None  # an empty list would make some templates announce tools
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools must be a list of objects")
    return plain(tools, "tools")
