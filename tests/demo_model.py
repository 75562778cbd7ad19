"""For the tests of the demo: a miniature of its source, and both files as transformers models."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from numpy.typing import NDArray
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 256, 4, 4, 2, 96


def write_mini_llama(path: Path, *, seed: int = 0, **changed: object) -> Path:
    """A random llama GGUF with the demo source's tensor names and types, in miniature; ``changed`` overrides metadata
    (underscores twice for a dot) or, with an array, replaces or adds a tensor; None leaves either out."""
    rng = np.random.default_rng(seed)
    metadata: dict[str, object] = {
        "general__name": "Mini",
        "general__license": "apache-2.0",
        "general__organization": "Nobody",
        "general__file_type": 3,
        "general__quantization_version": 2,
        "llama__block_count": LAYERS,
        "llama__context_length": 128,
        "llama__embedding_length": HIDDEN,
        "llama__feed_forward_length": INTERMEDIATE,
        "llama__attention__head_count": HEADS,
        "llama__attention__head_count_kv": KV_HEADS,
        "llama__rope__freq_base": 5000.0,
        "llama__attention__layer_norm_rms_epsilon": 1e-5,
        "llama__rope__dimension_count": HIDDEN // HEADS,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": [f"t{n}" for n in range(VOCAB - 1)] + ["Ġé"],
        "tokenizer__ggml__token_type": [3] + [1] * (VOCAB - 1),
        "tokenizer__ggml__merges": ["t 1", "t 2"],
        "tokenizer__ggml__add_bos_token": False,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__chat_template": "{{ messages }}",
    }
    arch = str(changed.pop("arch", "llama"))
    tensors = _mini_tensors(rng)
    for key, value in changed.items():
        (tensors if isinstance(value, np.ndarray) or key.replace("__", ".") in tensors else metadata)[key] = value  # type: ignore[index]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    for key, array in tensors.items():
        if array is not None:
            name = key.replace("__", ".")
            kind = Kind.F32 if "norm" in name else Kind.Q8_0 if name == "token_embd.weight" else Kind.Q4_1
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _mini_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32] | None]:
    def random(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * 2.0 / shape[-1] ** 0.5).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors: dict[str, NDArray[np.float32] | None] = {"token_embd.weight": random(VOCAB, HIDDEN)}
    for n in range(LAYERS):
        tensors |= {
            f"blk.{n}.attn_norm.weight": norm(),
            f"blk.{n}.ffn_norm.weight": norm(),
            f"blk.{n}.attn_q.weight": random(HIDDEN, HIDDEN),
            f"blk.{n}.attn_k.weight": random(kv, HIDDEN),
            f"blk.{n}.attn_v.weight": random(kv, HIDDEN),
            f"blk.{n}.attn_output.weight": random(HIDDEN, HIDDEN),
            f"blk.{n}.ffn_gate.weight": random(INTERMEDIATE, HIDDEN),
            f"blk.{n}.ffn_up.weight": random(INTERMEDIATE, HIDDEN),
            f"blk.{n}.ffn_down.weight": random(HIDDEN, INTERMEDIATE),
        }
    return tensors | {"output_norm.weight": norm()}


class Gguf:
    """A GGUF file read by the gguf package alone: metadata by key, tensors in fp32 with HF's shapes."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.meta = {key: field.contents() for key, field in self.reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, np.float32).reshape(tuple(reversed(tensor.shape.tolist()))))


def llama_model(path: Path) -> LlamaForCausalLM:
    """The source in transformers, fp32; rows of q and k brought into HF's order here, by indices, on its own account."""
    file = Gguf(path)
    meta = {key.removeprefix("llama."): value for key, value in file.meta.items()}
    heads, kv_heads, hidden = meta["attention.head_count"], meta["attention.head_count_kv"], meta["embedding_length"]
    config = LlamaConfig(
        vocab_size=len(file["token_embd.weight"]),
        hidden_size=hidden,
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    dim = hidden // heads
    order = [2 * n for n in range(dim // 2)] + [2 * n + 1 for n in range(dim // 2)]

    def rows(name: str, num_heads: int) -> torch.Tensor:
        return file[name][[head * dim + n for head in range(num_heads) for n in order]]

    state = {"model.embed_tokens.weight": file["token_embd.weight"], "model.norm.weight": file["output_norm.weight"]}
    for n in range(config.num_hidden_layers):
        hf, blk = f"model.layers.{n}.", f"blk.{n}."
        state |= {
            hf + "input_layernorm.weight": file[blk + "attn_norm.weight"],
            hf + "post_attention_layernorm.weight": file[blk + "ffn_norm.weight"],
            hf + "self_attn.q_proj.weight": rows(blk + "attn_q.weight", heads),
            hf + "self_attn.k_proj.weight": rows(blk + "attn_k.weight", kv_heads),
            hf + "self_attn.v_proj.weight": file[blk + "attn_v.weight"],
            hf + "self_attn.o_proj.weight": file[blk + "attn_output.weight"],
            **{hf + f"mlp.{part}_proj.weight": file[blk + f"ffn_{part}.weight"] for part in ("gate", "up", "down")},
        }
    return _loaded(LlamaForCausalLM(config), state)


def glm_model(path: Path) -> Glm4MoeForCausalLM:
    """The demo in transformers, fp32, configured from the file's own metadata."""
    file = Gguf(path)
    meta = {key.removeprefix("glm4moe."): value for key, value in file.meta.items()}
    assert (meta["general.architecture"], meta["expert_gating_func"]) == ("glm4moe", 2)
    config = Glm4MoeConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"],
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        head_dim=meta["attention.key_length"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": meta["rope.freq_base"],
            "partial_rotary_factor": meta["rope.dimension_count"] / meta["attention.key_length"],
        },
        attention_bias=False,
        use_qk_norm=False,
        moe_intermediate_size=meta["expert_feed_forward_length"],
        n_routed_experts=meta["expert_count"],
        n_shared_experts=meta["expert_shared_count"],
        num_experts_per_tok=meta["expert_used_count"],
        first_k_dense_replace=meta["leading_dense_block_count"],
        norm_topk_prob=meta["expert_weights_norm"],
        routed_scaling_factor=meta["expert_weights_scale"],
        n_group=1,
        topk_group=1,
        tie_word_embeddings="output.weight" not in file.tensors,
        attn_implementation="eager",
    )
    state = {"model.embed_tokens.weight": file["token_embd.weight"], "model.norm.weight": file["output_norm.weight"]}
    for n in range(config.num_hidden_layers):
        hf, blk = f"model.layers.{n}.", f"blk.{n}."
        state |= {
            hf + "input_layernorm.weight": file[blk + "attn_norm.weight"],
            hf + "post_attention_layernorm.weight": file[blk + "post_attention_norm.weight"],
            hf + "self_attn.o_proj.weight": file[blk + "attn_output.weight"],
            **{hf + f"self_attn.{x}_proj.weight": file[blk + f"attn_{x}.weight"] for x in "qkv"},
        }
        parts = ("gate", "up", "down")
        if n < config.first_k_dense_replace:
            state |= {hf + f"mlp.{part}_proj.weight": file[blk + f"ffn_{part}.weight"] for part in parts}
            continue
        gate_up = [file[blk + f"ffn_{part}_exps.weight"] for part in ("gate", "up")]
        state |= {
            hf + "mlp.gate.weight": file[blk + "ffn_gate_inp.weight"],
            hf + "mlp.gate.e_score_correction_bias": file[blk + "exp_probs_b.bias"],
            hf + "mlp.experts.gate_up_proj": torch.cat(gate_up, dim=1),
            hf + "mlp.experts.down_proj": file[blk + "ffn_down_exps.weight"],
            **{hf + f"mlp.shared_experts.{p}_proj.weight": file[blk + f"ffn_{p}_shexp.weight"] for p in parts},
        }
    return _loaded(Glm4MoeForCausalLM(config), state)


def _loaded(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embeddings
    return model.float().eval()
