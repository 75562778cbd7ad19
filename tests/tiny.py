"""Tiny GLM-4.5-architecture checkpoints, saved by transformers; every bias, norm and correction bias is random."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "use_qk_norm": False,
    "attention_bias": True,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "eos_token_id": [1, 2],
    "pad_token_id": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "air": {},
    "glm45": {"use_qk_norm": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2, "num_hidden_layers": 4},
    "two_groups": {"n_group": 2, "topk_group": 1, "n_routed_experts": 8},
    "four_groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 3},
    "two_shared_experts": {"n_shared_experts": 2},
    "three_dense_layers": {"first_k_dense_replace": 3, "num_hidden_layers": 5},
    "all_moe": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "no_attention_bias": {"attention_bias": False, "use_qk_norm": True},
    "no_norm_topk_prob": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "full_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "mha_odd_sizes": {"num_key_value_heads": 4, "hidden_size": 80, "moe_intermediate_size": 48, "head_dim": 24},
    "head_dim_12": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
}


def build_model(seed: int = 0, **overrides: Any) -> Glm4MoeForCausalLM:
    """A model in fp32 whose every parameter and buffer is random and matters."""
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**{**BASE, **overrides})).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.3, 0.3)
        elif name.endswith("bias"):
            tensor.normal_(std=0.3)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            tensor.normal_(std=1.0)
        else:
            tensor.normal_(std=1.0 / tensor.shape[-1] ** 0.5)
    return model


def save(model: Glm4MoeForCausalLM, directory: Path, *, mtp: bool = False, max_shard_size: str = "5GB") -> Path:
    """Write the checkpoint as transformers does, a byte-level tokenizer, and on request an MTP layer."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)
    if mtp:
        append_mtp(directory)
    return directory


FP8_SIZES: dict[str, Any] = {  # more than one block of 128, the last one ragged
    "hidden_size": 160,
    "intermediate_size": 288,
    "moe_intermediate_size": 144,
    "num_attention_heads": 8,
    "head_dim": 24,
}


def quantize_fp8(source: Path, directory: Path, *, style: str) -> Path:
    """A copy of a checkpoint in FP8, and in ``directory``/dequantized what its weights then are, in fp32.

    ``style`` "compressed-tensors" writes weight_scale [out, 1] as GLM-4.5-FP8 has them, "deepseek" writes
    weight_scale_inv per block of 128 x 128 as GLM-5-FP8 has them. Routers, head, embeddings and norms stay.
    """
    shutil.copytree(source, directory / "dequantized")
    tensors = load_file(source / "model.safetensors")
    stored, wide = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = weight.shape
        blocks = (rows, 1) if style == "compressed-tensors" else (-(-rows // 128), -(-columns // 128))
        sizes = (1, columns) if style == "compressed-tensors" else (128, 128)
        scale = torch.empty(blocks)
        for i, j in itertools.product(*map(range, blocks)):
            block = weight[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
            scale[i, j] = block.float().abs().max() / 448
        spread = scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[:rows, :columns]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[name + ("_scale" if style == "compressed-tensors" else "_scale_inv")] = scale
        wide[name] = stored[name].float() * spread
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(wide, directory / "dequantized" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _QUANTIZATION_CONFIG[style]
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(source / name, directory)
    return directory


_FP8_TYPE = {"num_bits": 8, "type": "float", "symmetric": True}
_QUANTIZATION_CONFIG: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_FP8_TYPE, "strategy": "channel", "dynamic": False},
                "input_activations": {**_FP8_TYPE, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    },
    "deepseek": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    },
}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 384 ids with GLM's role and think tokens, and GLM-4.5's way of templating in miniature."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|none|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
        "\n<think></think>{% endif %}{% endif %}"
    )


def append_mtp(directory: Path) -> None:
    """Add a complete random MTP layer, with copies of embedding and head as in GLM-4.5's release."""
    config_file, weights_file = directory / "config.json", directory / "model.safetensors"
    config = json.loads(config_file.read_text())
    tensors = load_file(weights_file)
    last, n, hidden = config["num_hidden_layers"] - 1, config["num_hidden_layers"], config["hidden_size"]
    for name in list(tensors):
        if name.startswith(f"model.layers.{last}."):
            copy = torch.randn_like(tensors[name].float()).mul(0.1).to(tensors[name].dtype)
            tensors[name.replace(f"layers.{last}.", f"layers.{n}.")] = copy
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.{n}.{name}.weight"] = torch.rand(hidden) + 0.5
    tensors[f"model.layers.{n}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.1
    tensors[f"model.layers.{n}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{n}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, weights_file, metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = 1
    config_file.write_text(json.dumps(config))


def attention_weights(layer: Any) -> Any:
    """The ``kernels.AttentionBlock`` of a layer, whichever kernels it is bound to."""
    return getattr(layer.attention, "weights", layer.attention)
