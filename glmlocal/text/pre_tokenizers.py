"""How each ``tokenizer.ggml.pre`` cuts text into pieces before the merges run.

A GGUF file stores only a name; the rule behind it is the pre-tokenizer of the tokenizer.json that the file was made
from. llama.cpp (``src/llama-vocab.cpp``, names and ``ignore_merges`` are its) spells ``(?i:'s|…)`` out as ``'[sS]|…``
because its regex engine has no inline flags; the original, which it quotes, is used here, so that a rebuilt tokenizer
gives the ids of its tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """``ignore_merges``: a piece that is a token by itself is never built from merges."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    adds_bos: bool = False  # what add_bos_token means when the file does not say
    nfc: bool = False


def _regex_split(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The cl100k rule of GPT-4, Llama 3, GLM-4 (3 digits at a time) and Qwen2 (one digit at a time)."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _gpt2_single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_THREE_DIGITS = _regex_split(r"\p{N}{1,3}")

PRE_TOKENIZERS = {
    "glm4": PreTokenizer(_THREE_DIGITS, ignore_merges=True),
    "glm5": PreTokenizer(_THREE_DIGITS, ignore_merges=True),
    "chatglm-bpe": PreTokenizer(_THREE_DIGITS),
    "llama-bpe": PreTokenizer(_THREE_DIGITS, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(_regex_split(r"\p{N}"), nfc=True),
    "smollm": PreTokenizer(_gpt2_single_digits),
    "gpt-2": PreTokenizer(_gpt2),
}


def nfc() -> normalizers.Normalizer:
    """Qwen2's tokenizer.json composes characters first; llama.cpp does not."""
    return normalizers.NFC()
