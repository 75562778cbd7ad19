"""The checkpoints of tiny.py as ``glm4moe`` GGUF files, written with the gguf package as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
    "embed_tokens": "nextn.embed_tokens",
}
_ZEROS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """model.layers.1.self_attn.q_proj.bias → blk.1.attn_q.bias"""
    if name == "lm_head.weight":
        return "output.weight"
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    if rest in _LAYER:
        return f"blk.{layer}.{_LAYER[rest]}"
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """fp32 arrays with the experts of a layer stacked, as GGUF has them."""
    out: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        expert = int(parts.pop(parts.index("experts") + 1)) if "experts" in parts else -1
        out.setdefault(".".join(parts), []).append((expert, tensor.float()))
    return {
        name: (
            torch.stack([t for _, t in sorted(items, key=lambda item: item[0])]) if items[0][0] >= 0 else items[0][1]
        )
        .contiguous()
        .numpy()
        for name, items in out.items()
    }


def convert(
    directory: Path,
    out: Path,
    quant: str = "F32",
    split_bytes: int = 0,
    type_of: Callable[[str, int], str | None] = lambda name, columns: None,
    blocks: Callable[[tuple[int, ...], GGMLQuantizationType], np.ndarray[Any, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Write ``directory`` (tiny.save's) as GGUF; returns the weights as the file has them, HF names, fp32.

    ``quant`` is the type of every matrix but the router, where ``type_of`` (HF name without the expert's number, width)
    does not name another; widths must suit it. ``blocks`` makes the bytes of a shape instead of the weights' own; K
    types and IQ4 come as zeros without it: gguf-py cannot make them.
    """
    config = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(out, "glm4moe", split_max_size=split_bytes)
    _write_metadata(writer, config, directory)
    stored: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name, array in stacked(tensors).items():
        kind = GGMLQuantizationType[type_of(name, array.shape[-1]) or quant]
        if array.ndim < 2 or name.endswith("mlp.gate.weight") or kind is GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), array)
        else:
            make = blocks or (_zeros if kind.name in _ZEROS else None)
            data = quantize(array, kind) if make is None else make(array.shape, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
            array = dequantize(data, kind).reshape(array.shape)
        if ".experts." in name:
            for e, expert in enumerate(array):
                stored[f"{name.replace('.experts.', f'.experts.{e}.')}"] = torch.from_numpy(np.array(expert))
        else:
            stored[name] = torch.from_numpy(np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _zeros(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return np.zeros((*shape[:-1], shape[-1] // block * block_bytes), np.uint8)


def _write_metadata(writer: GGUFWriter, config: dict[str, Any], directory: Path) -> None:
    rope = config["rope_parameters"]
    num_mtp = config.get("num_nextn_predict_layers") or 0
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"] + num_mtp)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if num_mtp:
        writer.add_nextn_predict_layers(num_mtp)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab: dict[str, int] = dict(tokenizer["model"]["vocab"])
    types = dict.fromkeys(vocab, 1)
    for token in tokenizer["added_tokens"]:
        vocab[token["content"]] = token["id"]
        types[token["content"]] = 3 if token["special"] else 4
    tokens = sorted(vocab, key=vocab.__getitem__)
    unused = [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*(types[token] for token in tokens), *[5] * len(unused)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"][0])
    writer.add_chat_template((directory / "chat_template.jinja").read_text())
