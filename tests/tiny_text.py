"""Small byte-level BPE tokenizers in both forms that we read: a tokenizer.json and GGUF metadata."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "/nothink")

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTE_LEVEL, "use_regex": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS + digits + _REST}
    return _sequence({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _BYTE_LEVEL)


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


# As the released tokenizer.json files have it, written down here a second time on purpose.
PRE_TOKENIZER_JSON: dict[str, dict[str, Any]] = {
    "glm4": _split(r"\p{N}{1,3}"),
    "glm5": _split(r"\p{N}{1,3}"),
    "chatglm-bpe": _split(r"\p{N}{1,3}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _GPT2),
    "gpt-2": _GPT2,
}
IGNORE_MERGES = {"glm4", "glm5", "llama-bpe"}

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world! It's what they're sayin', isn't it? WE'LL 'S 'LL 'Tis 'ſ",
    "3 33 333 3333 12345678 3.14 1,000,000 ½ ② ٣٤٥ Ⅷ 𝟘𝟙 1a2b",
    "  leading\t\ttabs\n\n\nnewlines \r\n x  \n  y   \u00a0nbsp\u2003em\u3000wide\u200bzero\u0085nel\u2028ls",
    "日本語のテキスト 中文字符，标点。「引号」 한국어 Ὀδυσσεύς नमस्ते العربية ไทย ខ្មែរ",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 é ñ İstanbul ßẞ ǅ ℵ 𐌰",
    "def f(x):\n    return x**2  # comment\n\tif a != b: {}[];\n\n\n    pass\n",
    "a" * 300 + " " * 70 + "!" * 40 + "\n" * 20 + "x",
    "\x00\x01\x7f \ufeff",
    "<|user|>\nhi<think>\nhm</think>/nothink<tool_call>f\n<arg_key>k</arg_key></tool_call><|endoftext|>",
    "<| user|> < think> </ think> <|user|",
    "http://example.com/?q=1&b=%20x ''''''```````\"\"\"\" ........!!!!!!??????",
]


@functools.cache
def tokenizer_json(pre: str) -> str:
    """A trained tokenizer of a few hundred tokens, with GLM's special and added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in IGNORE_MERGES))
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"], spec["decoder"] = PRE_TOKENIZER_JSON[pre], _BYTE_LEVEL
    spec["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text for text in HARD_TEXTS for _ in range(3)], trainer)
    spec = json.loads(tokenizer.to_str())
    _add_unmergeable(spec)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer.to_str()


def _add_unmergeable(spec: dict[str, Any]) -> None:
    """A token that no merge makes: with ``ignore_merges`` a word, without it never produced."""
    spec["model"]["vocab"]["Ġqzqzq"] = len(spec["model"]["vocab"])


def write_tokenizer(directory: Path, pre: str = "glm4", config: dict[str, Any] | None = None) -> Path:
    """Write tokenizer.json and, if given, tokenizer_config.json."""
    (directory / "tokenizer.json").write_text(tokenizer_json(pre), encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def gguf_metadata(pre: str = "glm4", **changes: Any) -> dict[str, Any]:
    """What a converter writes for the same tokenizer, two padding rows included. ``changes`` replace
    ``tokenizer.ggml.*`` keys; None removes one."""
    spec = json.loads(tokenizer_json(pre))
    ids = dict(spec["model"]["vocab"]) | {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "[PAD0]", "[PAD1]"],
        "token_type": [*types, 5, 5],
        "merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "eos_token_id": ids["<|endoftext|>"],
        "eot_token_id": ids["<|user|>"],
        "eom_token_id": ids["<|observation|>"],
        "bos_token_id": ids["[gMASK]"],
        "add_bos_token": False,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
