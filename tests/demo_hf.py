"""For the tests of the demo: its source and its result as transformers models, read by the gguf package alone."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

Model = TypeVar("Model", LlamaForCausalLM, Glm4MoeForCausalLM)


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
    """The source in transformers, fp32; rows of q and k are brought into HF's order by a list of indices."""
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
    return _built(LlamaForCausalLM, config, state)


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
    return _built(Glm4MoeForCausalLM, config, state)


def _built(kind: type[Model], config: PretrainedConfig, state: dict[str, torch.Tensor]) -> Model:
    with torch.device("meta"):  # no time lost on random weights
        model = kind(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embeddings
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()
