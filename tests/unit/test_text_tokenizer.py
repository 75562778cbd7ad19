from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from glmlocal.errors import CheckpointError, RequestError
from glmlocal.text.pre_tokenizers import PRE_TOKENIZERS
from glmlocal.text.tokenizer import load_tokenizer, tokenizer_from_gguf
from tiny_text import ADDED, HARD_TEXTS, PRE_TOKENIZER_JSON, SPECIAL, gguf_metadata, tokenizer_json, write_tokenizer


def hard_corpus() -> list[str]:
    """The hard texts, and random strings over the characters that pre-tokenizers care about."""
    pick = random.Random(0)
    alphabet = [
        *"abXY  \t\n\r019'.,!?<>|-_ 中é🚀ß½²\u00a0\u3000\u0301",
        "'s",
        "'re",
        "'LL",
        "<think>",
        "<|user|>",
        "</",
    ]
    return HARD_TEXTS + ["".join(pick.choices(alphabet, k=pick.randrange(1, 25))) for _ in range(400)]


def test_every_pre_tokenizer_is_tested() -> None:
    assert set(PRE_TOKENIZERS) == set(PRE_TOKENIZER_JSON)


@pytest.mark.parametrize("pre", PRE_TOKENIZER_JSON)
def test_gguf_and_json_give_the_ids_of_the_library(pre: str, tmp_path: Path) -> None:
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(pre))
    from_json, from_gguf = load_tokenizer(write_tokenizer(tmp_path, pre)), tokenizer_from_gguf(gguf_metadata(pre))
    for text in hard_corpus():
        ids = reference.encode(text, add_special_tokens=False).ids
        assert from_json.encode(text) == ids, text
        assert from_gguf.encode(text) == ids, text
        assert from_gguf.decode(ids) == reference.decode(ids, skip_special_tokens=False)
        assert from_gguf.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    assert from_gguf.vocab_size == from_json.vocab_size == reference.get_vocab_size()
    assert from_gguf.special_ids == from_json.special_ids


@pytest.mark.parametrize("pre", PRE_TOKENIZER_JSON)
def test_what_is_encoded_decodes_to_itself(pre: str) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata(pre))
    for text in hard_corpus():
        if pre != "qwen2":  # composes characters first
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("glm4", ["123", "456", "78"]),
        ("llama-bpe", ["123", "456", "78"]),
        ("qwen2", [*"12345678"]),
        ("smollm", [*"12345678"]),
        ("gpt-2", ["12", "34", "56", "78"]),  # one piece, merged by rank
    ],
)
def test_digits_are_cut_as_the_model_was_trained(pre: str, pieces: list[str]) -> None:
    tokens = [*"12345678", "34", "12", "123", "56", "456", "78"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["3 4", "1 2", "12 3", "5 6", "4 56", "7 8"],
    }
    assert [tokens[id_] for id_ in tokenizer_from_gguf(metadata).encode("12345678")] == pieces


@pytest.mark.parametrize("pre", PRE_TOKENIZER_JSON)
def test_capital_contractions_are_cut_off_where_the_model_was_trained_so(pre: str) -> None:
    tokens = ["'", "T", "I", "S", "TI", "'T", "IS"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["T I", "' T", "I S"],
    }
    pieces = [tokens[id_] for id_ in tokenizer_from_gguf(metadata).encode("'TIS")]
    assert pieces == (["'", "TI", "S"] if pre in {"gpt-2", "smollm"} else ["'T", "IS"])


@pytest.mark.parametrize("pre", PRE_TOKENIZER_JSON)
def test_ignore_merges_is_what_the_pre_tokenizer_says(pre: str) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata(pre))
    word = tokenizer.token_to_id("Ġqzqzq")
    assert ([word] == tokenizer.encode(" qzqzq")) == (pre in {"glm4", "glm5", "llama-bpe"})


def test_think_and_tool_tags_are_single_tokens_but_not_special() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    for token in SPECIAL + ADDED:
        id_ = tokenizer.token_to_id(token)
        assert id_ is not None
        assert tokenizer.encode(f"a{token}b")[1:-1] == [id_]
        assert (id_ in tokenizer.special_ids) == (token in SPECIAL)
        assert tokenizer.decode([id_], skip_special_tokens=True) == ("" if token in SPECIAL else token)


def test_padding_rows_and_foreign_ids_are_no_text() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    for id_ in (tokenizer.vocab_size, tokenizer.vocab_size + 1, 10**9, -1):
        assert tokenizer.id_to_token(id_) is None
        assert tokenizer.token_bytes(id_) == b""
        assert tokenizer.decode([id_]) == ""


def test_token_bytes_add_up_to_the_text() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    for text in HARD_TEXTS:
        assert b"".join(tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text)) == text.encode()
    single = {tokenizer.token_bytes(id_) for id_ in range(256)}
    assert single == {bytes([byte]) for byte in range(256)}


def test_added_tokens_outside_ascii_stand_for_themselves() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.tokens"] += ["Ġé"]
    metadata["tokenizer.ggml.token_type"] += [4]
    tokenizer = tokenizer_from_gguf(metadata)
    assert len(tokenizer.encode("Ġé")) == 1
    assert tokenizer.decode(tokenizer.encode("Ġé")) == "Ġé"


def test_special_tokens_are_added_only_on_request() -> None:
    plain = tokenizer_from_gguf(gguf_metadata())
    assert plain.encode("hi", add_special_tokens=True) == plain.encode("hi")
    both = tokenizer_from_gguf(gguf_metadata(add_bos_token=True, add_eos_token=True))
    bos, eos = both.token_to_id("[gMASK]"), both.token_to_id("<|endoftext|>")
    assert both.encode("hi", add_special_tokens=True) == [bos, *plain.encode("hi"), eos]
    assert both.encode("hi") == plain.encode("hi")
    llama = tokenizer_from_gguf(gguf_metadata("llama-bpe", add_bos_token=None))
    assert llama.encode("hi", add_special_tokens=True)[0] == llama.bos_id


def test_names_and_end_of_turn_ids(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    names = [tokenizer.id_to_token(id_) for id_ in tokenizer.eos_ids]
    assert names == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert tokenizer.special_tokens == {"bos_token": "[gMASK]", "eos_token": "<|endoftext|>"}
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None, "pad_token": "<|endoftext|>"}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, config=config))
    assert tokenizer.special_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|endoftext|>"),)
    assert tokenizer.bos_id is None


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    size = load_tokenizer(write_tokenizer(tmp_path)).vocab_size
    extra = {str(size): {"content": "<|new|>", "special": True}, "0": {"content": "!"}}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, config={"added_tokens_decoder": extra}))
    assert tokenizer.encode("a<|new|>")[1:] == [size]
    assert size in tokenizer.special_ids
    assert tokenizer.vocab_size == size + 1
    extra = {str(size + 1): {"content": "<|new|>", "special": True}}
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: added token '<\|new\|>' cannot have id"):
        load_tokenizer(write_tokenizer(tmp_path, config={"added_tokens_decoder": extra}))


def test_training_time_truncation_is_lifted(tmp_path: Path) -> None:
    spec = json.loads(tokenizer_json("glm4"))
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write_tokenizer(tmp_path).joinpath("tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(tmp_path).encode("a b c d e f g h")) > 3


def test_half_a_surrogate_pair_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer_from_gguf(gguf_metadata()).encode("a\ud800b")


def test_others_run_while_a_long_text_is_tokenized() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    tokenizer.encode("a")
    thread = threading.Thread(target=tokenizer.encode, args=("a b " * 200_000,))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20


def test_a_text_many_times_too_long_is_known_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    encode, seen = tokenizer.encode, []

    def spy(text: str) -> list[int]:
        seen.append(len(text))
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", spy)
    assert tokenizer.surely_exceeds("a b " * 100_000, 100)
    assert seen == [1_600]
    assert not tokenizer.surely_exceeds("a b " * 799, 100)  # short enough to be tokenized as a whole
    assert not tokenizer.surely_exceeds("a b " * 100_000, 400_000)
    assert len(seen) == 1
    few = "<|user|>" * 1_000  # each one token, so that the beginning makes 200
    assert not tokenizer.surely_exceeds(few, 100)
    assert len(seen) == 2


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        spec = json.loads(text)
        change(spec)
        return json.dumps(spec)

    return edited


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "not valid JSON"),
        (lambda text: text[:-20], "not valid JSON"),
        (lambda text: "[]", "not an object"),
        (lambda text: "[" * 100_000, "nests too deeply"),
        (lambda text: "{}", "only byte-level BPE"),
        (_edit(lambda spec: spec["model"].update(type="Unigram")), "'Unigram' model"),
        (_edit(lambda spec: spec.update(decoder=None)), "only ByteLevel"),
        (_edit(lambda spec: spec["model"].update(vocab=[])), "no model.vocab"),
        (_edit(lambda spec: spec["model"]["merges"].append(["a", "nope"])), r"merge \d+ is \['a', 'nope'\]"),
        (_edit(lambda spec: spec["model"]["merges"].append("Ġqzqzq Ġqzqzq")), "two tokens that make a third"),
        (_edit(lambda spec: spec["model"]["merges"].append(7)), "merge"),
        (_edit(lambda spec: spec["model"]["vocab"].update(a=5)), "two tokens one id"),
        (_edit(lambda spec: spec["model"]["vocab"].update(a=-5)), "two tokens one id"),
        (_edit(lambda spec: spec["model"]["vocab"].update(a=2**40)), "two tokens one id"),
        (_edit(lambda spec: spec["model"].update(unk_token="nope")), "unk_token 'nope'"),
        (_edit(lambda spec: spec["model"].update(continuing_subword_prefix="##")), "continuing_subword_prefix"),
        (_edit(lambda spec: spec["added_tokens"][-1].update(id=10**6)), "wants id 1000000"),
        (_edit(lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(type="Nope")), "cannot be used"),
        (_edit(lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")), "cannot be used"),
    ],
)
def test_damaged_tokenizer_json_is_one_line(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff}")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": []}, "not an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "entry 'x'"),
        ({"added_tokens_decoder": {"9999999999": {"content": "a"}}}, "entry"),
        ({"added_tokens_decoder": {"1": {"content": 3}}}, "entry '1'"),
        ({"eos_token": 7}, "eos_token is 7"),
        ({"eos_token": "<|absent|>"}, "does not hold"),
    ],
)
def test_damaged_tokenizer_config_is_one_line(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_tokenizer(tmp_path, config=config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer model 'llama'; only 'gpt2'"),
        ({"model": None}, "only 'gpt2'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'; supported are glm4, "),
        ({"pre": None}, "supported are"),
        ({"pre": ["glm4"]}, "supported are"),
        ({"tokens": None}, "no list tokenizer.ggml.tokens"),
        ({"merges": None}, "no list tokenizer.ggml.merges"),
        ({"tokens": "abc"}, "no list"),
        ({"tokens": ["a", b"\xff"], "token_type": None}, r"tokens\[1\]"),
        ({"tokens": ["a", "\udcff"], "token_type": None}, r"tokens\[1\]"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "a token twice"),
        ({"tokens": ["a", ""], "token_type": [1, 1]}, "empty token"),
        ({"token_type": [1, 1]}, "2 entries for"),
        ({"token_type": 3}, "not a list of numbers"),
        ({"merges": ["a nope"]}, "merge 0 is 'a nope'"),
        ({"merges": ["a"]}, "merge 0 is 'a'"),
        ({"merges": ["a b c"]}, "merge 0"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"eot_token_id": -1}, "eot_token_id is -1"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"add_bos_token": 3}, "add_bos_token is 3"),
    ],
)
def test_damaged_gguf_metadata_is_one_line(changes: dict[str, Any], message: str) -> None:
    metadata = gguf_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None})
    assert "\n" not in str(caught.value)


def test_unknown_token_kinds_are_refused() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.token_type"][3] = 9
    with pytest.raises(CheckpointError, match="unknown kind 9"):
        tokenizer_from_gguf(metadata)


def test_a_padding_row_cannot_end_a_turn() -> None:
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.eos_token_id"] = len(metadata["tokenizer.ggml.tokens"]) - 1
    with pytest.raises(CheckpointError, match="eos_token_id"):
        tokenizer_from_gguf(metadata)


def test_a_vocabulary_of_glm_size_is_rebuilt_in_seconds() -> None:
    tokens, merges = _glm_sized()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    start_s = time.process_time()
    tokenizer = tokenizer_from_gguf(metadata)
    assert time.process_time() - start_s < 6  # 0.9 s on the slowest machine tried; quadratic would be minutes
    assert tokenizer.vocab_size == 151_552
    assert tokenizer.decode(tokenizer.encode("abcdefg gfedcba")) == "abcdefg gfedcba"


def _glm_sized() -> tuple[list[str], list[str]]:
    """151,552 tokens and 318,088 merges: all strings of up to six of seven letters, cut in up to three ways."""
    tokens = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]]
    layer = list("abcdefg")
    while len(tokens) < 151_552:
        layer = [prefix + letter for prefix in layer for letter in "abcdefg"]
        tokens += layer[: 151_552 - len(tokens)]
    words = [token for token in tokens[256:] if len(token) > 1]
    merges = [f"{word[:-cut]} {word[-cut:]}" for cut in (1, 2, 3) for word in words if len(word) > cut]
    return tokens, merges[:318_088]
