"""A small but valid GLM-4.5-style tokenizer and chat template of any vocabulary size. Nothing is learned from data.

Ids, in order: the 256 bytes, the results of a few merges, made-up words (so that whatever a random model says can be
read), GLM's special tokens at the distance from the end that they have in the real vocabulary of 151552, padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
)  # fmt: skip
TEXT_TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
TOKENS_FROM_SPECIAL_TO_END = 151552 - 151329
MIN_VOCAB_SIZE = 1024
COMMON_WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had by"
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# GLM's split into words, from its published tokenizer; llama.cpp's name for it is "glm4".
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>
{{ message.content }}{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
{%- elif message.role == 'assistant' %}<|assistant|>
<think></think>
{{ message.content.split('</think>')[-1].strip() }}
{%- elif message.role == 'system' %}<|system|>
{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All ``tokens`` by id; [first_word, first_special) are the made-up words, padding starts at ``num_tokens``."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    first_word: int
    first_special: int
    num_tokens: int

    @property
    def eos_token_ids(self) -> list[int]:
        return [self.tokens.index(token) for token in EOS_TOKENS]

    def token_types(self) -> list[int]:
        """GGUF's types: 1 normal, 3 control, 4 user-defined, 5 unused."""
        num_padding = len(self.tokens) - self.num_tokens
        return [1] * self.first_special + [3] * len(CONTROL_TOKENS) + [4] * len(TEXT_TAGS) + [5] * num_padding

    def tokenizer_json(self) -> dict[str, Any]:
        """The contents of ``tokenizer.json``; padding ids have no token there, as in the releases."""
        added = [
            {
                "id": self.first_special + i, "content": token, "special": token in CONTROL_TOKENS, "normalized": False,
                "single_word": False, "lstrip": False, "rstrip": False,
            }
            for i, token in enumerate(CONTROL_TOKENS + TEXT_TAGS)
        ]  # fmt: skip
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                "vocab": {token: i for i, token in enumerate(self.tokens[: self.first_special])},
                "merges": [list(pair) for pair in self.merges],
            },
        }  # fmt: skip


def build_vocabulary(vocab_size: int) -> Vocabulary:
    """A vocabulary of exactly ``vocab_size`` ids, at least MIN_VOCAB_SIZE (1024)."""
    characters = _byte_characters()
    merges = _merges(characters[ord(" ")])
    tokens = characters + [left + right for left, right in merges]
    first_word, first_special = len(tokens), vocab_size - TOKENS_FROM_SPECIAL_TO_END
    tokens += [characters[ord(" ")] + _word(i) for i in range(first_special - first_word)]
    tokens += CONTROL_TOKENS + TEXT_TAGS
    num_tokens = len(tokens)
    tokens += [f"[PAD{i}]" for i in range(num_tokens, vocab_size)]
    return Vocabulary(tuple(tokens), tuple(merges), first_word, first_special, num_tokens)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table), by byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merges(space: str) -> list[tuple[str, str]]:
    """Merges, in order, that build the common words with a space before them, each from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in COMMON_WORDS.split():
        for end in range(1, len(word) + 1):
            merges[space + word[: end - 1], word[end - 1]] = None
    return list(merges)


def _word(index: int) -> str:
    """A different three-syllable word for every index below a million."""
    scattered = index * 7919 % 1_000_000  # 7919 has no factor in common with a million
    syllables = (scattered // 10_000, scattered // 100 % 100, scattered % 100)
    return "".join("bcdfghjklmnprstvwxyz"[s // 5] + "aeiou"[s % 5] for s in syllables)
