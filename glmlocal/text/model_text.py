"""Everything textual that belongs to one checkpoint, wherever its files keep it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmlocal.text.chat_template import ChatTemplate, chat_template_from_gguf, load_chat_template
from glmlocal.text.generation_config import (
    GenerationDefaults,
    generation_defaults_from_gguf,
    load_generation_defaults,
    stop_token_ids,
)
from glmlocal.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf


@dataclass(frozen=True, slots=True)
class ModelText:
    """Tokenizer, template (None for a base model), sampling defaults, and the tokens that end an answer."""

    tokenizer: Tokenizer | None  # None: the checkpoint came without one, and works with token ids alone
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]


def load_model_text(
    directory: Path, config: Mapping[str, Any], gguf_metadata: Mapping[str, Any] | None, vocab_size: int
) -> ModelText:
    """From the GGUF metadata, or from the directory's files. Raises CheckpointError.

    A generation_config.json beside a GGUF file is not read: it may belong to another model of the same folder.
    """
    if gguf_metadata is not None:
        has_tokenizer = "tokenizer.ggml.model" in gguf_metadata
        tokenizer = tokenizer_from_gguf(gguf_metadata) if has_tokenizer else None
        source, defaults = chat_template_from_gguf(gguf_metadata), generation_defaults_from_gguf(gguf_metadata)
    else:
        tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None
        source, defaults = load_chat_template(directory), load_generation_defaults(directory)
    return ModelText(
        tokenizer,
        None if source is None else ChatTemplate(source, tokenizer.special_tokens if tokenizer else {}),
        defaults,
        frozenset(stop_token_ids(defaults, config, tokenizer, vocab_size)),
    )
