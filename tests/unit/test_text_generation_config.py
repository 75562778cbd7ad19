from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmlocal.errors import CheckpointError
from glmlocal.text.generation_config import (
    GenerationDefaults,
    eos_ids,
    generation_defaults_from_gguf,
    load_generation_defaults,
    stop_token_ids,
)
from glmlocal.text.model_text import load_model_text
from glmlocal.text.tokenizer import tokenizer_from_gguf
from tiny_text import gguf_metadata


def load(tmp_path: Path, text: str) -> GenerationDefaults:
    (tmp_path / "generation_config.json").write_text(text)
    return load_generation_defaults(tmp_path)


def test_without_a_file_nothing_is_said(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path) == GenerationDefaults()
    assert GenerationDefaults().sampling() == {}


def test_fields_are_read_and_others_ignored(tmp_path: Path) -> None:
    text = '{"eos_token_id": [3, 1, 3], "temperature": 1, "top_p": 0.95, "top_k": 40, "do_sample": true, "pad": 3}'
    defaults = load(tmp_path, text)
    assert defaults == GenerationDefaults(temperature=1.0, top_p=0.95, top_k=40, eos_token_ids=(3, 1))
    assert defaults.sampling() == {"temperature": 1.0, "top_p": 0.95, "top_k": 40}
    assert load(tmp_path, '{"min_p": 0, "repetition_penalty": 1.1, "temperature": null}') == GenerationDefaults(
        min_p=0.0, repetition_penalty=1.1
    )
    assert load(tmp_path, '{"temperature": 0}').sampling() == {"temperature": 0.0}


def test_minus_one_turns_top_k_off(tmp_path: Path) -> None:
    assert load(tmp_path, '{"top_k": -1}').top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in ("-0.1", "NaN", "Infinity", "1e999", '"1"', "true", "[1]", "101")],
        *[("top_p", value) for value in ("0", "-1", "1.5", "NaN")],
        *[("min_p", value) for value in ("-0.1", "2")],
        *[("repetition_penalty", value) for value in ("0", "-1", "1e9")],
        *[("top_k", value) for value in ("-2", "1.5", "true", '"40"', "4294967296")],
        *[("eos_token_id", value) for value in ("-1", "1.5", '"x"', "[1, -1]", "[true]", '{"a": 1}', "[[1]]")],
        ("eos_token_id", json.dumps(list(range(2000)))),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field} is ") as caught:
        load(tmp_path, f'{{"{field}": {value}}}')
    assert len(str(caught.value)) < 400


FLOAT32_095 = 0.949999988079071


def test_gguf_keys_of_llama_cpp_are_read(tmp_path: Path) -> None:
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": FLOAT32_095,
        "general.sampling.top_k": 40,
        "general.sampling.min_p": 0.05,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.mirostat": 2,
    }
    read = {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    assert generation_defaults_from_gguf(metadata).sampling() == read
    assert generation_defaults_from_gguf({"general.name": "x"}) == GenerationDefaults()
    (tmp_path / "generation_config.json").write_text('{"temperature": 9}')  # of another model of the folder
    assert load_model_text(tmp_path, {}, {**gguf_metadata(), **metadata}, 1000).defaults.sampling() == read


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", float("nan")), ("temp", -0.1), ("top_p", 0.0), ("min_p", 2.0), ("penalty_repeat", 0.0), ("top_k", 1.5)],
)
def test_nonsense_in_gguf_keys_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=rf"general\.sampling\.{key} is "):
        generation_defaults_from_gguf({f"general.sampling.{key}": value})


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_damaged_file_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(tmp_path, text)


def test_an_overlong_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"a": "' + "x" * (17 << 20) + '"}')
    with pytest.raises(CheckpointError, match="larger than 16 MiB"):
        load_generation_defaults(tmp_path)


def test_end_of_turn_ids_come_from_all_files_each_once() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    defaults = GenerationDefaults(eos_token_ids=(tokenizer.eos_ids[1], 5))
    ids = stop_token_ids(defaults, {"eos_token_id": [5, 6]}, tokenizer, vocab_size=1000)
    assert ids == (tokenizer.eos_ids[1], 5, 6, tokenizer.eos_ids[0], tokenizer.eos_ids[2])
    assert stop_token_ids(GenerationDefaults(), {"eos_token_id": 7}, None, vocab_size=8) == (7,)
    assert stop_token_ids(GenerationDefaults(), {}, None, vocab_size=8) == ()


def test_ids_beyond_the_vocabulary_are_left_out_and_other_things_refused() -> None:
    assert stop_token_ids(GenerationDefaults(), {"eos_token_id": [7, 8, 151329]}, None, vocab_size=8) == (7,)
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id"):
        stop_token_ids(GenerationDefaults(), {"eos_token_id": "</s>"}, None, vocab_size=8)


def test_forms_of_eos_token_id() -> None:
    assert eos_ids(None, "x") == ()
    assert eos_ids(3, "x") == (3,)
    assert eos_ids([3, 4, 3], "x") == (3, 4)
