"""Hostile quantized releases: whatever config and shapes say, a matrix is read as it is or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import releases
import tiny
from crafted import with_header
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorIndex, open_checkpoint
from glmlocal.formats.joined import joined
from glmlocal.formats.safetensors import read_file
from glmlocal.formats.stored_rows import StoredRows, unpack_bits
from loading import load_engine

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_DTYPES = {
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_BYTES = {"I32": 4, "U32": 4, "I8": 1, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
MODULE = "model.layers.1.mlp.experts.2.up_proj"
WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
KINDS = ("gptq asymmetric", "gptq int8", "awq", "awq gemv", "packed int4", "packed asymmetric", "int8", "mlx 3-bit")


def stored(kind: str) -> dict[str, tuple[str, list[int]]]:
    """Name → dtype and shape, of one matrix."""
    style = releases.STYLES[kind]
    form = style.base
    tensors = style.store(MODULE, releases.quantized(WEIGHT, form), form)
    return {name: (_DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}


def config_of(kind: str) -> dict[str, Any]:
    return {releases.STYLES[kind].config_key: releases.STYLES[kind].config}


def attempt(path: Path, tensors: dict[str, tuple[str, list[int]]], config: dict[str, Any]) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = _BYTES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    path.write_bytes(with_header(header, np.random.default_rng(0).integers(0, 256, end, np.uint8).tobytes()))
    refs, unreadable = joined(config, read_file(path))
    for message in unreadable.values():
        assert message.isprintable()
        assert len(message) < 1000
    for ref in refs.values():
        if ref.matrix is None:
            continue
        rows, columns = ref.shape
        assert ref.nbytes == sum(part.nbytes for part in ref.stored)
        index = TensorIndex("safetensors", path, refs, (path,))
        try:
            found = StoredRows.open(index, ref.matrix).rows(0, rows)
        except CheckpointError:  # what the bytes contradict
            continue
        assert found.codes.shape == (rows, columns)
        assert int(found.codes.max()) < 1 << ref.matrix.scheme.bits
        groups = -(-columns // ref.matrix.scheme.group_size)
        for values in (found.super_scale, found.super_min, found.sub_min):
            assert values is None or values.shape == (rows, groups)


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 48, 64, 96, 128])


@SETTINGS
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_shapes_and_dtypes(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    tensors = stored(kind)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        dtype, shape = tensors[name]
        changed = data.draw(st.lists(SIZES, min_size=1, max_size=3) | st.just(shape))
        tensors[name] = (data.draw(st.sampled_from(sorted(_BYTES)) | st.just(dtype)), changed)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=1)):
        del tensors[name]
    attempt(tmp_path / "x", tensors, config_of(kind))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 8, 16, 32, 33, 64, 96, 128, 1 << 24, 1 << 40, "gptq", "gemm", "re:(", True]
)


def with_one_field_replaced(value: Any, draw: Any) -> Any:
    """Somewhere inside a JSON value."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: with_one_field_replaced(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        return [with_one_field_replaced(value[0], draw), *value[1:]]
    return draw(LIKELY | JSON)


@SETTINGS
@given(data=st.data())
@pytest.mark.parametrize("kind", [*KINDS, "gptq int4-int8mix", "packed mix", "mlx mix"])
def test_any_configs(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(config_of(kind)))
    tensors = stored(kind)
    (key,) = config
    attempt(tmp_path / "x", tensors, {key: with_one_field_replaced(config[key], data.draw)})


@SETTINGS
@given(
    codes=st.integers(1, 6).flatmap(lambda rows: st.integers(1, 70).map(lambda columns: (rows, columns))),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    seed=st.integers(0, 1000),
)
def test_streams_of_bits_are_taken_apart(codes: tuple[int, int], bits: int, seed: int) -> None:
    wanted = np.random.default_rng(seed).integers(0, 1 << bits, codes)
    words = np.ascontiguousarray(releases.bit_stream(wanted, bits)).view(np.uint8)
    assert np.array_equal(unpack_bits(words, bits, codes[1]), wanted)


REFUSED = {
    "gptq asymmetric": [
        (
            {"quant_method": "exl2"},
            "quantized with 'exl2'; gptq, awq, compressed-tensors, mlx, modelopt, quark, FP8 and",
        ),
        ({"checkpoint_format": "marlin"}, "GPTQ in the format 'marlin'; gptq and gptq_v2 are supported"),
        ({"dynamic": {"+:(": {}}}, r"has '\(', which is no regular expression"),
        ({"dynamic": {"(.*a)*b": {}}}, r"which is no regular expression that is taken: a group is repeated"),
        ({"dynamic": {".*" * 9: {}}}, r"which is no regular expression that is taken: more than 8 repetitions"),
        ({"sym": True}, "has the zero point [0-9]+ where the config's sym means 8"),
        ({"group_size": 48}, "has group_size '48'; powers of two from 16 on and -1 are supported"),
    ],
    "awq": [
        ({"version": "gemv_fast"}, "AWQ of version 'gemv_fast'; gemm and gemv are supported"),
        ({"bits": 8}, "AWQ of 8 bits; 4 are supported"),
        ({"group_size": 64}, "do not belong together with groups of 64"),
    ],
    "packed int4": [
        ({"format": "marlin-24"}, "compressed-tensors in the format 'marlin-24'"),
        ({"config_groups": {}}, "no target of the quantization config names it"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"type": "float"}}}}, "says type 'float'"),
        ({"config_groups": {"a": {"targets": ["re:["]}}}, r"has '\[', which is no regular expression"),
    ],
    "mlx 4-bit": [
        ({"mode": "mxfp8"}, "says mode 'mxfp8'; affine, nvfp4 and mxfp4 are supported"),
        ({"mode": "nvfp4"}, "scales is F16|scales is BF16"),
        ({"bits": 8}, "for 8 bits in [0-9]+ groups of 32; the config and the tensors are of different models"),
        ({"model.layers.0.mlp.up_proj": False}, "the config says False of 'model.layers.0.mlp.up_proj'"),
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(**releases.SIZES), tmp_path_factory.mktemp("source") / "source")


@pytest.mark.parametrize(("kind", "change", "message"), [(k, *case) for k, cases in REFUSED.items() for case in cases])
def test_what_cannot_be_read_is_named(
    source: Path, tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:

    style = releases.STYLES[kind]
    (tmp_path / "release").mkdir()
    directory = releases.quantize_release(source, tmp_path / "release", style)
    config = json.loads((directory / "config.json").read_text())
    config[style.config_key] = {**style.config, **change}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        load_engine(open_checkpoint(directory), context=64)
    assert "\n" not in str(error.value)
    assert "model.layers.0" in str(error.value) or str(directory) in str(error.value)


def test_act_order_is_refused_with_the_tensors_name(source: Path, tmp_path: Path) -> None:
    directory = releases.quantize_release(source, tmp_path, releases.STYLES["gptq asymmetric"])
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, directory / "model.safetensors")
    found = open_checkpoint(directory).tensors
    with pytest.raises(CheckpointError, match=rf"tensor {name} gives neighbouring columns .* \(act-order, desc_act\)"):
        StoredRows.open(found, found["model.layers.1.mlp.experts.3.up_proj.weight"].matrix)
