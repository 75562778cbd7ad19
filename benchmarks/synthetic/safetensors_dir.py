"""A synthetic model as a safetensors directory in the layout of the releases."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from synthetic.model import Fp8Scales, Random, plan_tensors
from synthetic.pieces import PARTIAL_ROTARY_FACTOR, RMS_NORM_EPS, ROPE_THETA, Piece, Spec, Tables, write_pieces
from synthetic.storage import BF16, F32, FP8, Codec
from synthetic.text import CHAT_TEMPLATE

SHARD_BYTES = 5_000_000_000
LINEAR: dict[str, Codec] = {"safetensors-bf16": BF16(), "safetensors-fp8": FP8()}


def pieces(spec: Spec) -> list[Piece]:
    """Every tensor of the checkpoint in the order of writing, experts one by one."""
    out: list[Piece] = []
    for tensor in plan_tensors(spec.shape, spec.vocabulary, spec.seed, spec.skew, spec.acceptance):
        codec = LINEAR[spec.format] if tensor.kind == "linear" else BF16()
        if tensor.kind == "correction_bias":
            codec = F32()
        names, shape = [tensor.name], tensor.shape
        if ".experts.*." in tensor.name:
            names = [tensor.name.replace("*", str(expert)) for expert in range(shape[0])]
            shape = shape[1:]
        for name in names:
            out.append(Piece(name, codec.name, shape, tensor, codec))
            if isinstance(codec, FP8):
                assert isinstance(tensor.fill, Random)
                scale = replace(tensor, fill=Fp8Scales(tensor.fill.std))
                out.append(Piece(f"{name}_scale", "F32", (shape[0], 1), scale, F32()))
    return out


def write(spec: Spec, pieces: Sequence[Piece], directory: Path, on_bytes: Callable[[int], None]) -> None:
    """Write shards, index, configs, tokenizer and chat template into an empty directory."""
    shards = _shards(pieces)
    weight_map: dict[str, str] = {}
    tables: Tables = {}
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= {piece.name: name for piece in shard}
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            write_pieces(file, directory / name, shard, spec.seed, on_bytes, tables=tables)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(piece.nbytes for piece in pieces)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    vocabulary = spec.vocabulary
    texts = {
        "config.json": hf_config(spec),
        "generation_config.json": {"eos_token_id": vocabulary.eos_token_ids, "pad_token_id": vocabulary.first_special},
        "tokenizer.json": vocabulary.tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.shape.max_position_embeddings,
        },
    }
    for name, value in texts.items():
        (directory / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _header(shard: Sequence[Piece]) -> bytes:
    """A safetensors file up to its data: length, then JSON padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in shard:
        offsets = [offset, offset + piece.nbytes]
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": offsets}
        offset += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hf_config(spec: Spec) -> dict[str, Any]:
    """``config.json`` in the form of the releases (rope at the top level)."""
    shape, vocabulary = spec.shape, spec.vocabulary
    config: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **{field.name: getattr(shape, field.name) for field in fields(shape) if field.name != "name"},
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "partial_rotary_factor": PARTIAL_ROTARY_FACTOR,
        "tie_word_embeddings": False,
        "use_cache": True,
        "num_nextn_predict_layers": spec.num_nextn_predict_layers,
        "eos_token_id": vocabulary.eos_token_ids,
        "pad_token_id": vocabulary.first_special,
        "torch_dtype": "bfloat16",
        "synthetic": spec.description,
    }
    if spec.format == "safetensors-fp8":
        config["quantization_config"] = _fp8_config(spec)
    return config


def _fp8_config(spec: Spec) -> dict[str, Any]:
    shape, fp8 = spec.shape, {"num_bits": 8, "type": "float", "symmetric": True}
    layers = range(shape.first_k_dense_replace, shape.num_hidden_layers + spec.num_nextn_predict_layers)
    group = {
        "targets": ["Linear"],
        "weights": {**fp8, "strategy": "channel", "dynamic": False},
        "input_activations": {**fp8, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    glue = [f"model.layers.{shape.num_hidden_layers}.eh_proj"] if spec.num_nextn_predict_layers else []
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in layers), *glue],
        "kv_cache_scheme": None,
    }


def _shards(pieces: Sequence[Piece]) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards
