from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from crafted import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    TINY,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    GgufTensor,
    Raw,
    random_blocks,
    string,
    tiny_gguf,
    tiny_tensors,
)
from glmlocal.errors import CheckpointError
from glmlocal.formats.ggml_blocks import unpack
from glmlocal.formats.gguf_file import read_gguf
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.schemes import QUANTIZED_DTYPES, block_layout
from glmlocal.models.config import ModelConfig, check_tensors, mtp_problem

WIDE = {**TINY, "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def whole(**config: Any) -> Gguf:
    merged = {**TINY, **config}
    return tiny_gguf(merged, tiny_tensors(merged))


def check(path: Path) -> bool:
    """Open a file as if to run it; returns whether its MTP layer is usable."""
    checkpoint = open_checkpoint(path)
    return check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)


def refusal(path: Path) -> str:
    """Why the file cannot be opened, or not be run."""
    with pytest.raises(CheckpointError) as caught:
        check(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    return message


def opens(file: Gguf, directory: Path) -> bool:
    return check(file.write(directory / "model.gguf"))


def test_metadata_becomes_the_config_of_the_release(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole().write(tmp_path / "tiny.gguf"))
    assert ModelConfig.from_hf(checkpoint.config) == ModelConfig.from_hf(TINY)
    assert checkpoint.gguf_metadata is not None
    assert checkpoint.gguf_metadata["general.name"] == "tiny"
    assert checkpoint.gguf_metadata["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_matrices_of_a_quantized_file_equal_the_packages_own_dequantizing(dtype: str, tmp_path: Path) -> None:
    tensors = tiny_tensors(TINY)
    path = tiny_gguf(TINY, tensors, lambda name: "F32" if "ffn_gate_inp" in name else dtype).write(tmp_path / "q.gguf")
    checkpoint = open_checkpoint(path)
    assert check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, array in tensors.items():
        ref, raw = checkpoint.tensors[name], checkpoint.tensors.read(name)
        if array.ndim == 1 or name.endswith("mlp.gate.weight"):
            assert ref.dtype == "F32"
            continue
        assert (ref.dtype, ref.shape) == (dtype, array.shape), name
        stored = gguf.quantize(array, kind)
        assert raw.tobytes() == stored.tobytes(), name
        if dtype in QUANTIZED_DTYPES:
            np.testing.assert_array_equal(unpack(dtype, raw, ref.shape).dequantize(), gguf.dequantize(stored, kind))


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_every_quantized_type_is_sliced_into_the_right_experts(dtype: str, tmp_path: Path) -> None:
    """A stack of crafted blocks: expert e is the e-th part of its bytes, for types the package cannot write too."""
    block, size = block_layout(dtype)
    file = tiny_gguf(WIDE, tiny_tensors(WIDE))
    experts, rows, columns = 4, 256, 256
    raw = random_blocks(dtype, experts * rows * columns // block, np.random.default_rng(5))
    kind = gguf.GGMLQuantizationType[dtype]
    for name in ("gate", "up", "down"):
        file = file.with_tensor(f"blk.1.ffn_{name}_exps.weight", type_id=int(kind), data=raw.tobytes())
    checkpoint = open_checkpoint(file.write(tmp_path / "model.gguf"))
    check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)
    wanted = gguf.dequantize(raw.reshape(experts, rows, columns // block * size), kind)
    for e in range(experts):
        for name in ("gate", "up", "down"):
            expert = f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"
            ref = checkpoint.tensors[expert]
            assert (ref.dtype, ref.shape) == (dtype, (rows, columns))
            got = unpack(dtype, checkpoint.tensors.read(expert), ref.shape).dequantize()
            np.testing.assert_array_equal(got.view(np.uint32), wanted[e].view(np.uint32))


def test_mtp_layers_are_the_last_blocks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole().write(tmp_path / "model.gguf"))
    assert checkpoint.config["num_hidden_layers"] == 3
    assert checkpoint.config["num_nextn_predict_layers"] == 1
    tensors = tiny_tensors(TINY)
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "embed_tokens", "shared_head.head"):
        full = f"model.layers.3.{name}.weight"
        assert checkpoint.tensors.read(full).tobytes() == tensors[full].tobytes()


@pytest.mark.parametrize(
    ("what", "change", "usable"),
    [
        ("complete", lambda file: file, True),
        ("without copies of embeddings and head", lambda file: file.without(lambda n: "nextn.embed" in n), True),
        ("trunk only, metadata unchanged", lambda file: file.without(lambda n: n.startswith("blk.3.")), False),
        ("MTP block without its nextn tensors", lambda file: file.without(lambda n: ".nextn." in n), False),
        (
            "MTP block without an expert stack",
            lambda file: file.without(lambda n: n == "blk.3.ffn_up_exps.weight"),
            False,
        ),
        (
            "never had one",
            lambda file: file.without(lambda n: n.startswith("blk.3.")).with_keys(
                glm4moe__nextn_predict_layers=None, glm4moe__block_count=(U32, 3)
            ),
            False,
        ),
        (
            "MTP in a type that is not supported",
            lambda file: file.with_tensor(
                "blk.3.nextn.eh_proj.weight", type_id=19, dims=(256, 32), data=bytes(50 * 32)
            ),
            False,
        ),
    ],
)
def test_files_with_and_without_mtp_load(
    what: str, change: Callable[[Gguf], Gguf], usable: bool, tmp_path: Path
) -> None:
    assert opens(change(whole()), tmp_path) is usable, what


def test_why_an_mtp_layer_is_not_usable_is_said(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole().without(lambda n: n == "blk.3.nextn.enorm.weight").write(tmp_path / "m.gguf"))
    assert "1 of its" in (mtp_problem(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors) or "")


def test_an_mtp_only_file_is_refused_as_that(tmp_path: Path) -> None:
    file = whole().without(lambda n: n.startswith(("blk.0.", "blk.1.", "blk.2.")))
    assert "MTP layer alone" in refusal(file.write(tmp_path / "model.gguf"))


def test_no_output_matrix_means_tied_embeddings(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole().without(lambda n: n == "output.weight").write(tmp_path / "model.gguf"))
    config = ModelConfig.from_hf(checkpoint.config)
    assert config.tie_word_embeddings
    assert check_tensors(config, checkpoint.tensors)


def test_biases_and_qk_norm_follow_from_the_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole(attention_bias=False, use_qk_norm=False).write(tmp_path / "model.gguf"))
    config = ModelConfig.from_hf(checkpoint.config)
    assert (config.attention_bias, config.use_qk_norm) == (False, False)
    assert check_tensors(config, checkpoint.tensors)


def test_the_correction_bias_under_its_old_name(tmp_path: Path) -> None:
    file = whole()
    for i in (1, 2, 3):
        file = file.with_tensor(f"blk.{i}.exp_probs_b.bias", name=f"blk.{i}.exp_probs_b")
    assert opens(file, tmp_path)
    twice = replace(file, tensors=(*file.tensors, GgufTensor("blk.1.exp_probs_b.bias", (4,), 0, bytes(16))))
    assert "already found" in refusal(twice.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("keys", "field", "wanted"),
    [
        ({"glm4moe__expert_group_count": (U32, 2), "glm4moe__expert_group_used_count": (U32, 1)}, "n_group", 2),
        ({"glm4moe__expert_weights_norm": None}, "norm_topk_prob", False),
        ({"glm4moe__expert_weights_scale": None}, "routed_scaling_factor", 1.0),
        ({"glm4moe__expert_weights_scale": (F32, 0.0)}, "routed_scaling_factor", 1.0),
        ({"glm4moe__expert_gating_func": None}, "n_group", 1),
        ({"glm4moe__rope__freq_base": None}, "rope_theta", 10000.0),
        ({"glm4moe__attention__layer_norm_rms_epsilon": (F32, 1e-5)}, "rms_norm_eps", 1e-5),
        ({"glm4moe__attention__layer_norm_rms_epsilon": (F64, 1e-5)}, "rms_norm_eps", 1e-5),
        ({"glm4moe__attention__head_count_kv": (ARRAY, (U32, [2, 2, 2, 2]))}, "num_key_value_heads", 2),
        ({"glm4moe__block_count": (U64, 4)}, "num_hidden_layers", 3),
        ({"glm4moe__rope__dimension_count": None}, "partial_rotary_factor", 1.0),
        ({"glm4moe__rope__scaling__type": (STRING, "none")}, "rope_theta", 1e6),
        ({"tokenizer__ggml__eom_token_id": (U32, 7)}, "eos_token_id", (1, 2, 7)),
        ({"tokenizer__ggml__bos_token_id": (U32, 5)}, "bos_token_id", 5),
        ({"tokenizer__ggml__eos_token_id": None, "tokenizer__ggml__eom_token_id": None}, "eos_token_id", (2,)),
    ],
)
def test_metadata_keys(keys: dict[str, Any], field: str, wanted: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(whole().with_keys(**keys).write(tmp_path / "model.gguf"))
    assert getattr(ModelConfig.from_hf(checkpoint.config), field) == wanted


@pytest.mark.parametrize("head_dim", range(2, 256, 2))
def test_any_rotary_width_survives_being_a_fraction(head_dim: int) -> None:
    from glmlocal.formats.gguf import _fraction

    assert all(int(head_dim * _fraction(width, head_dim)) == width for width in range(head_dim + 1))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general__architecture": (STRING, "llama")}, "'llama'"),
        ({"general__architecture": (STRING, "glm-dsa")}, "'glm-dsa'"),
        ({"general__architecture": (STRING, "\x1b[31m" * 100)}, "x1b"),
        ({"general__architecture": (U32, 3)}, "architecture 3"),
        ({"general__architecture": None}, "architecture None"),
        ({"glm4moe__expert_gating_func": (U32, 1)}, "expert_gating_func is 1"),
        ({"glm4moe__rope__scaling__type": (STRING, "yarn")}, "'yarn'"),
        ({"glm4moe__attention__value_length": (U32, 16)}, "value_length"),
        ({"glm4moe__block_count": None}, "lacks the metadata key glm4moe.block_count"),
        ({"glm4moe__block_count": (U32, 0)}, "num_hidden_layers is -1"),
        ({"glm4moe__block_count": (U32, 4_000_000_000)}, "num_hidden_layers is 3999999999"),
        ({"glm4moe__block_count": (U32, 5)}, "has the tensor 'model.layers.3.eh_proj.weight'"),
        ({"glm4moe__block_count": (U32, 7)}, "lacks the tensor model.layers.4.input_layernorm.weight"),
        ({"glm4moe__block_count": (STRING, "47")}, "an integer"),
        ({"glm4moe__block_count": (F32, 47.0)}, "an integer"),
        ({"glm4moe__block_count": (BOOL, True)}, "an integer"),
        ({"glm4moe__block_count": (ARRAY, (U32, [4, 3]))}, "an integer"),
        ({"glm4moe__block_count": (ARRAY, (U32, []))}, "an integer"),
        ({"glm4moe__attention__head_count": (U32, 0)}, "num_attention_heads is 0"),
        ({"glm4moe__expert_count": (U32, 2**32 - 1)}, "n_routed_experts is 4294967295"),
        ({"glm4moe__expert_count": (U32, 8)}, "model.layers.1.mlp.experts.4.gate_proj.weight"),
        ({"glm4moe__expert_count": (U32, 2)}, "shape"),
        ({"glm4moe__expert_used_count": (U32, 5)}, "num_experts_per_tok is 5"),
        ({"glm4moe__feed_forward_length": (U32, 128)}, "model.layers.0.mlp.gate_proj.weight"),
        ({"glm4moe__expert_feed_forward_length": (U32, 64)}, "shape"),
        ({"glm4moe__rope__freq_base": (F32, float("nan"))}, "rope_theta is nan"),
        ({"glm4moe__rope__freq_base": (F32, float("inf"))}, "rope_theta is inf"),
        ({"glm4moe__rope__freq_base": (STRING, "x")}, "a number"),
        ({"glm4moe__rope__dimension_count": (U32, 31)}, "partial_rotary_factor"),
        ({"glm4moe__rope__dimension_count": (U32, 2000)}, "partial_rotary_factor"),
        ({"glm4moe__expert_weights_norm": (U32, 1)}, "true or false"),
        ({"tokenizer__ggml__eos_token_id": (STRING, "x")}, "eos_token_id"),
    ],
)
def test_metadata_that_cannot_be_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(whole().with_keys(**keys).write(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("type_id", "row_bytes", "name"),
    [
        (9, 320, "Q8_1"),
        (15, 292, "Q8_K"),
        (28, 2048, "F64"),
        (24, 256, "I8"),
        (137, 76, "IQ2_K (ggml type 137)"),
        (144, 140, "IQ4_KS (ggml type 144)"),
        (31, 144, "Q4_0_4_4 (ggml type 31)"),
        (212, 144, "ggml type 212"),
        (2**32 - 1, 64, "ggml type 4294967295"),
    ],
)
def test_a_type_that_is_not_supported_is_refused_by_name(
    type_id: int, row_bytes: int, name: str, tmp_path: Path
) -> None:
    file = tiny_gguf(WIDE, tiny_tensors(WIDE))
    file = file.with_tensor("blk.1.ffn_up_exps.weight", type_id=type_id, data=bytes(4 * 256 * row_bytes))
    path = file.write(tmp_path / "model.gguf")
    message = refusal(path)
    assert f"model.layers.1.mlp.experts.0.up_proj.weight is {name} and 3 more" in message
    assert "IQ4_XS" in message  # what is supported is listed
    assert open_checkpoint(path).tensors["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (256, 256)


@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.1.ffn_gate_inp.weight"])
def test_a_quantized_norm_or_router_is_refused(name: str, tmp_path: Path) -> None:
    file = tiny_gguf(WIDE, tiny_tensors(WIDE))
    rows = 4 if "inp" in name else 1
    message = refusal(file.with_tensor(name, type_id=8, data=bytes(rows * 8 * 34)).write(tmp_path / "model.gguf"))
    assert "Q8_0" in message
    assert "must be" in message


@pytest.mark.parametrize(
    "name", ["blk.1.attn_output.bias", "blk.9.attn_norm.weight", "rope_freqs.weight", "blk.01.attn_norm.weight", "\x1b"]
)
def test_a_tensor_that_would_be_left_out_is_refused(name: str, tmp_path: Path) -> None:
    file = whole()
    stranger = GgufTensor(name, (64,), 0, bytes(256))
    message = refusal(replace(file, tensors=(*file.tensors, stranger)).write(tmp_path / "model.gguf"))
    assert repr(name) in message or "model.layers.9" in message


def test_widths_padded_by_a_quantizer_are_taken_as_they_are(tmp_path: Path) -> None:
    assert opens(whole(moe_intermediate_size=64, intermediate_size=160), tmp_path)


def test_version_2_is_read(tmp_path: Path) -> None:
    assert opens(replace(whole(), version=2), tmp_path)


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    file = replace(whole(), alignment=256).with_keys(general__alignment=(U32, 256))
    checkpoint = open_checkpoint(file.write(tmp_path / "model.gguf"))
    assert checkpoint.tensors.read("model.norm.weight").tobytes() == tiny_tensors(TINY)["model.norm.weight"].tobytes()


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    keys: tuple[Any, ...] = tuple(
        (f"k{i}", i, v) for i, v in [(0, 255), (1, -1), (2, 65535), (3, -2), (4, 7), (5, -7), (6, 0.5)]
    )
    keys += (
        ("yes", BOOL, True),
        ("text", STRING, "é\n"),
        ("k10", U64, 2**64 - 1),
        ("k11", 11, -(2**63)),
        ("k12", F64, 0.1),
    )
    arrays = (
        ("strings", ARRAY, (STRING, ["", "a", "字"])),
        ("bytes", ARRAY, (U8, [1, 2])),
        ("flags", ARRAY, (BOOL, [True])),
    )
    metadata = read_gguf(Gguf(keys + arrays + (("empty", ARRAY, (I32, [])),)).write(tmp_path / "x.gguf")).metadata
    assert metadata == {
        "k0": 255, "k1": -1, "k2": 65535, "k3": -2, "k4": 7, "k5": -7, "k6": 0.5, "yes": True, "text": "é\n",
        "k10": 2**64 - 1, "k11": -(2**63), "k12": 0.1, "strings": ["", "a", "字"], "bytes": [1, 2], "flags": [True],
        "empty": [],
    }  # fmt: skip
    assert type(metadata["yes"]) is bool


A = GgufTensor("a", (32,), 0, bytes(128))
B = GgufTensor("b", (8, 4), 0, bytes(128))
PLAIN = Gguf((("k", U32, 1),), (A, B))


def key(name: str | bytes, kind: int, value: Any) -> Gguf:
    return replace(PLAIN, keys=((name, kind, value),))


def raw(codes: str, *numbers: int) -> Raw:
    return Raw(struct.pack("<" + codes, *numbers))


BAD_FILES: dict[str, tuple[Gguf | bytes, str]] = {
    "too short": (b"GGUF" + bytes(19), "too few"),
    "other magic": (replace(PLAIN, magic=b"FUGG"), "b'FUGG'"),
    "version 1": (replace(PLAIN, version=1), "version 1;"),
    "version 4": (replace(PLAIN, version=4), "version 4;"),
    "version 0": (replace(PLAIN, version=0), "version 0;"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "2^63 tensors": (replace(PLAIN, tensor_count=1 << 63), "can hold"),
    "2^64 - 1 keys": (replace(PLAIN, key_count=(1 << 64) - 1), "can hold"),
    "a tensor too many": (replace(PLAIN, tensor_count=3), "overlaps"),
    "a key too many": (replace(PLAIN, key_count=2), "ends inside"),
    "key name of 2^63": (key(raw("Q", 1 << 63), U32, 1), "ends inside the name of key 0"),
    "key name not UTF-8": (key(b"\xff", U32, 1), "not UTF-8"),
    "duplicate key": (replace(PLAIN, keys=(("k", U32, 1), ("k", U32, 2))), "'k' appears twice"),
    "value type 13": (key("k", 13, Raw()), "value type 13"),
    "string of 2^62": (key("k", STRING, raw("Q", 1 << 62)), "ends inside key 'k'"),
    "string not UTF-8": (key("k", STRING, b"\xff"), "key 'k' is not UTF-8"),
    "array of 2^63 bytes": (key("k", ARRAY, raw("IQ", U8, 1 << 63)), "elements"),
    "array of 2^60 strings": (key("k", ARRAY, raw("IQ", STRING, 1 << 60)), "elements"),
    "array of 2^61 doubles": (key("k", ARRAY, raw("IQ", F64, 1 << 61)), "elements"),
    "array of arrays": (key("k", ARRAY, raw("IQIQ", ARRAY, 1, U8, 0)), "value type 9"),
    "array of type 77": (key("k", ARRAY, raw("IQ", 77, 1)), "value type 77"),
    "array element too long": (key("k", ARRAY, raw("IQQ", STRING, 2, 1 << 62)), "element 0 of 2"),
    "array element not UTF-8": (key("k", ARRAY, (STRING, [b"a", b"\xff"])), "element 1"),
    "alignment 0": (PLAIN.with_keys(general__alignment=(U32, 0)), "power of two"),
    "alignment 24": (PLAIN.with_keys(general__alignment=(U32, 24)), "power of two"),
    "alignment as text": (PLAIN.with_keys(general__alignment=(STRING, "32")), "power of two"),
    "alignment -32": (PLAIN.with_keys(general__alignment=(I32, -32)), "power of two"),
    "alignment 2^31": (PLAIN.with_keys(general__alignment=(U32, 1 << 31)), "truncated"),
    "5 dimensions": (PLAIN.with_tensor("a", dims=(2, 2, 2, 2, 2)), "5 dimensions"),
    "2^32 - 1 dimensions": (PLAIN.encode().replace(raw("IQ", 1, 32), raw("IQ", 2**32 - 1, 32)), "dimensions"),
    "zero dimension": (PLAIN.with_tensor("a", dims=(32, 0)), "none may be zero"),
    "product over 2^64": (PLAIN.with_tensor("a", dims=(1 << 40, 1 << 40)), "too many"),
    "product that wraps to 32": (PLAIN.with_tensor("a", dims=(1 << 32, 1 << 32, 1 << 32, 32)), "too many"),
    "tensor larger than the file": (PLAIN.with_tensor("b", dims=(1 << 30,)), "truncated"),
    "first tensor larger than its place": (PLAIN.with_tensor("a", dims=(40,)), "overlaps"),
    "row of a part of a block": (PLAIN.with_tensor("a", dims=(16, 2), type_id=8), "multiple of 32"),
    "duplicate tensor": (PLAIN.with_tensor("b", name="a"), "'a' appears twice"),
    "tensor name not UTF-8": (replace(PLAIN, tensors=(GgufTensor(b"\xff", (32,), 0, bytes(128)),)), "not UTF-8"),
    "unaligned offset": (PLAIN.with_tensor("b", offset=129), "multiple of 32"),
    "overlapping offset": (PLAIN.with_tensor("b", offset=96), "overlaps"),
    "the same offset": (PLAIN.with_tensor("b", offset=0), "overlaps"),
    "offset beyond the file": (PLAIN.with_tensor("b", offset=1 << 40), "truncated"),
    "offset 2^64 - 32": (PLAIN.with_tensor("b", offset=(1 << 64) - 32), "truncated"),
    "truncated data": (PLAIN.encode()[:-1], "1 bytes after"),
    "no data": (PLAIN.encode()[:-256], "truncated"),
    "unknown type at the end of the file": (PLAIN.with_tensor("b", type_id=999, offset=256), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    file, words = BAD_FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(file if isinstance(file, bytes) else file.encode())
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 700


def test_the_good_version_of_the_bad_files_is_accepted(tmp_path: Path) -> None:
    refs = read_gguf(PLAIN.write(tmp_path / "x.gguf")).tensors
    assert [(ref.name, ref.shape, ref.nbytes) for ref in refs] == [("a", (32,), 128), ("b", (4, 8), 128)]
    assert read_gguf(Gguf().write(tmp_path / "empty.gguf")).tensors == ()


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    raw = PLAIN.with_keys(a__list=(ARRAY, (STRING, ["one", "two"])), b=(STRING, "text")).encode()
    path = tmp_path / "x.gguf"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_a_sparse_file_of_a_terabyte_costs_nothing(tmp_path: Path) -> None:
    """Arrays whose length fits the file, but no memory."""
    for kind, words in ((U8, "the limit"), (STRING, "the limit")):
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(Gguf((("k", ARRAY, raw("IQ", kind, 1 << 36)),)).encode())
        with open(path, "r+b") as file:
            file.truncate(1 << 40)
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=words):
            read_gguf(path)
        assert time.perf_counter() - start < 1


def test_metadata_beyond_the_limit_is_refused_by_that(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(
        Gguf((("k", U64, 1 << 30),)).encode().replace(struct.pack("<I", U64), struct.pack("<I", STRING), 1)
    )
    in_array = tmp_path / "y.gguf"
    in_array.write_bytes(Gguf((("k", ARRAY, raw("IQQ", STRING, 2, 1 << 30)),)).encode())
    for file in (path, in_array):
        os.truncate(file, 1 << 31)
        with pytest.raises(CheckpointError, match="larger than"):
            read_gguf(file)


def test_the_vocabulary_of_a_glm_opens_in_good_time(tmp_path: Path) -> None:
    tokens, merges = ([f"{word}{i}é" for i in range(n)] for word, n in (("t", 151_552), ("a b", 318_088)))
    keys = (
        ("tokens", ARRAY, (STRING, tokens)),
        ("types", ARRAY, (I32, [1] * 151_552)),
        ("merges", ARRAY, (STRING, merges)),
    )
    path = Gguf(keys).write(tmp_path / "vocabulary.gguf")
    start = time.perf_counter()
    metadata = read_gguf(path).metadata
    assert time.perf_counter() - start < 2
    assert metadata["merges"] == merges


# --- split files


def split(directory: Path, parts: int = 3, **writer_options: Any) -> list[Path]:
    """A split model as gguf-split writes it: all metadata in the first part."""
    file = whole()
    step = -(-len(file.tensors) // parts)
    paths = []
    for i in range(parts):
        own = (("split.no", U16, i), ("split.count", U16, parts), ("split.tensors.count", I32, len(file.tensors)))
        part = Gguf((file.keys if i == 0 else ()) + own, file.tensors[i * step : (i + 1) * step])
        paths.append(part.write(directory / f"model-{i + 1:05d}-of-{parts:05d}.gguf"))
    return paths


def rewrite(path: Path, **keys: tuple[int, Any]) -> None:
    """Change a part's own split keys in place."""
    raw = path.read_bytes()
    for name, (kind, new) in keys.items():
        key = string(name.replace("__", "."))
        at = raw.index(key) + len(key) + 4
        size = struct.calcsize("<" + {U16: "H", I32: "i"}[kind])
        raw = raw[:at] + struct.pack("<" + {U16: "H", I32: "i"}[kind], new) + raw[at + size :]
    path.write_bytes(raw)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_split_model_opens_from_any_of_its_parts(part: int, tmp_path: Path) -> None:
    paths = split(tmp_path)
    checkpoint = open_checkpoint(paths[part])
    assert checkpoint.path == paths[0]
    assert checkpoint.tensors.files == tuple(paths)
    assert check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)
    for name, array in tiny_tensors(TINY).items():
        assert checkpoint.tensors.read(name).tobytes() == array.tobytes()


def test_a_directory_with_one_split_set_is_that_model(tmp_path: Path) -> None:
    assert open_checkpoint(split(tmp_path)[0].parent).path == tmp_path / "model-00001-of-00003.gguf"


def test_the_split_files_of_the_gguf_package_open(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "glm4moe", split_max_tensors=20, small_first_shard=True)
    for name, kind, value in whole().keys[1:]:
        if kind == ARRAY:
            writer.add_array(name, value[1])
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType(kind))
    for tensor in whole().tensors:
        writer.add_tensor(tensor.name, np.frombuffer(tensor.data, np.float32).reshape(tensor.dims[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) > 3
    checkpoint = open_checkpoint(paths[0])  # the first part has no tensors at all
    assert check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)
    assert len(checkpoint.tensors.files) == len(paths)
    for name, array in tiny_tensors(TINY).items():
        assert checkpoint.tensors.read(name).tobytes() == array.tobytes()


def test_missing_parts_are_counted_and_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    assert "lacks 2 of the 3 parts of this model, 'model-00001-of-00003.gguf' first" in refusal(paths[1])
    assert "'model-00001-of-00003.gguf' first" in refusal(tmp_path)


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    assert str(paths[1]) in refusal(paths[0])


@pytest.mark.parametrize(
    ("part", "keys", "words"),
    [
        (1, {"split__no": (U16, 2)}, "part 3 of 3 by its metadata but part 2 of 3 by its name"),
        (2, {"split__count": (U16, 4)}, "part 3 of 4 by its metadata"),
        (0, {"split__tensors__count": (I32, 9)}, "but 9 were split"),
        (0, {"split__tensors__count": (I32, -1)}, "split.tensors.count is -1"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    part: int, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    paths = split(tmp_path)
    rewrite(paths[part], **keys)
    assert words in refusal(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    file = whole()
    own = (("split.no", U16, 1), ("split.count", U16, 3))
    count = len(read_gguf(paths[1]).tensors)
    Gguf(own, file.tensors[:count]).write(paths[1])
    assert "already found" in refusal(paths[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert "name was changed" in refusal(paths[0].rename(tmp_path / "renamed.gguf"))


@pytest.mark.parametrize(
    "name", ["model-00000-of-00003.gguf", "model-00004-of-00003.gguf", "model-00001-of-00000.gguf"]
)
def test_impossible_part_numbers_are_refused(name: str, tmp_path: Path) -> None:
    assert "calls itself part" in refusal(whole().write(tmp_path / name))


def test_a_split_of_one_part_is_a_model(tmp_path: Path) -> None:
    assert len(open_checkpoint(split(tmp_path, parts=1)[0]).tensors.files) == 1
