"""Whatever is in a file: it opens with every tensor inside its file, or it is a CheckpointError. Nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crafted import ARRAY, STRING, TINY, U32, safetensors_bytes, tiny_gguf, tiny_tensors, with_header
from glmlocal.errors import CheckpointError
from glmlocal.formats.gguf_file import read_gguf
from glmlocal.formats.index import TensorRef, open_checkpoint
from glmlocal.formats.safetensors import read_file
from glmlocal.models.config import ModelConfig, check_tensors

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {**TINY, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": 32, "first_k_dense_replace": 0}
TENSORS = tiny_tensors(SMALL, mtp=False)
GGUF_FILE = tiny_gguf(SMALL, TENSORS).with_keys(some__list=(ARRAY, (STRING, ["a", "bc"])), n=(U32, 3))
GGUF = GGUF_FILE.encode()
GGUF_HEADER = len(GGUF) - sum(-(-len(tensor.data) // 32) * 32 for tensor in GGUF_FILE.tensors)
SAFETENSORS = safetensors_bytes(TENSORS)
SAFETENSORS_HEADER = 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]


def attempt(action: Callable[[], Any]) -> Any:
    """The result; None for a CheckpointError whose message is one decent line."""
    message = ""
    try:
        return action()
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()  # no newline either
    assert len(message) < 1000
    return None


def check(path: Path, content: bytes, read: Callable[[Path], list[TensorRef]]) -> None:
    path.write_bytes(content)
    refs = attempt(lambda: read(path)) or []
    for ref in refs:
        assert len(content) >= ref.offset + ref.nbytes
        assert ref.offset >= 0 < ref.nbytes
        assert all(n > 0 for n in ref.shape)
    places = sorted((ref.offset, ref.offset + ref.nbytes) for ref in refs)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))


def edits(header_bytes: int) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    extremes = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)]
    anything = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(extremes))
    return st.lists(st.tuples(st.integers(0, header_bytes - 1), anything), min_size=1, max_size=4)


def edited(content: bytes, changes: list[tuple[int, bytes]], cut: int | None) -> bytes:
    raw = bytearray(content)
    for at, new in changes:
        raw[at : at + len(new)] = new
    return bytes(raw[:cut])


@SETTINGS
@given(changes=edits(GGUF_HEADER), cut=st.none() | st.integers(0, len(GGUF)))
def test_gguf_with_bytes_overwritten_or_cut(tmp_path: Path, changes: list[tuple[int, bytes]], cut: int | None) -> None:
    check(tmp_path / "x.gguf", edited(GGUF, changes, cut), lambda path: list(read_gguf(path).tensors))


@SETTINGS
@given(changes=edits(SAFETENSORS_HEADER), cut=st.none() | st.integers(0, len(SAFETENSORS)))
def test_safetensors_with_bytes_overwritten_or_cut(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    check(tmp_path / "x", edited(SAFETENSORS, changes, cut), lambda path: list(read_file(path).values()))


@SETTINGS
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("start", [b"", b"GGUF\3\0\0\0"])
def test_noise(tmp_path: Path, start: bytes, content: bytes) -> None:
    check(tmp_path / "x.gguf", start + content, lambda path: list(read_gguf(path).tensors))
    check(tmp_path / "x", content, lambda path: list(read_file(path).values()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@SETTINGS
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=4), size=st.integers(0, 40))
def test_safetensors_headers_of_any_json(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    check(tmp_path / "x", with_header(header, bytes(size)), lambda path: list(read_file(path).values()))


@SETTINGS
@given(
    field=st.sampled_from([*SMALL, "n_group", "rope_parameters", "rope_scaling", "hidden_act"]), value=JSON | NUMBERS
)
def test_configs_with_any_field_replaced(tmp_path: Path, field: str, value: Any) -> None:
    """Loaded as it is, or refused; never a crash, and never a long list of tensors built for a hostile number."""
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, field: value}))
    checkpoint = open_checkpoint(tmp_path)
    attempt(lambda: check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors))


@SETTINGS
@given(weight_map=JSON | st.dictionaries(st.sampled_from(list(TENSORS)), JSON, min_size=1, max_size=3))
def test_indexes_of_any_json(tmp_path: Path, weight_map: Any) -> None:
    directory = tmp_path / "release"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SMALL))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        open_checkpoint(directory)
