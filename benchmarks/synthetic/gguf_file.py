"""A synthetic model as one GGUF file of arch ``glm4moe``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter

from synthetic.model import plan_tensors
from synthetic.pieces import PARTIAL_ROTARY_FACTOR, RMS_NORM_EPS, ROPE_THETA, Piece, Spec, write_pieces
from synthetic.storage import F32, Q4_0, Q8_0, Codec
from synthetic.text import CHAT_TEMPLATE

ALIGNMENT = 32  # of every tensor in the file
LINEAR: dict[str, Codec] = {"gguf-q4_0": Q4_0(), "gguf-q8_0": Q8_0()}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate": "ffn_gate_inp",
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")},
    **{f"mlp.experts.*.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
    **{n: f"nextn.{n}" for n in ("enorm", "hnorm", "eh_proj")},
    "shared_head.norm": "nextn.shared_head_norm",
}


def pieces(spec: Spec) -> list[Piece]:
    """Every tensor of the file in its order."""
    linear = LINEAR[spec.format]
    # eh_proj never below 8 bits: drafts suffer first. Routers, norms and biases as llama.cpp writes them.
    codecs = {"linear": linear, "table": linear, "eh_proj": Q8_0()}
    out = []
    for tensor in plan_tensors(spec.shape, spec.vocabulary, spec.seed, spec.skew, spec.acceptance):
        codec = codecs.get(tensor.kind, F32())
        out.append(Piece(gguf_name(tensor.name), codec.name, tensor.shape, tensor, codec))
    return out


def gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``blk.3.attn_q.weight``."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match
    layer, module, suffix = match[1], match[2], match[3] or ""
    return (f"blk.{layer}." if layer else "") + GGUF_NAMES[module] + suffix


def write(spec: Spec, pieces: Sequence[Piece], path: Path, on_bytes: Callable[[int], None]) -> None:
    """Write the file; ``on_bytes`` hears of every chunk of weights."""
    writer = GGUFWriter(path, "glm4moe")
    _add_metadata(writer, spec)
    for piece in pieces:
        kind = GGMLQuantizationType[piece.dtype]
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        write_pieces(file, path, pieces, spec.seed, on_bytes, alignment=ALIGNMENT)


def _add_metadata(writer: GGUFWriter, spec: Spec) -> None:
    shape, vocabulary = spec.shape, spec.vocabulary
    writer.add_name(spec.title)
    writer.add_description(spec.description)
    writer.add_block_count(shape.num_hidden_layers + spec.num_nextn_predict_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(int(shape.head_dim * PARTIAL_ROTARY_FACTOR))
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)
    writer.add_expert_count(shape.n_routed_experts)
    writer.add_expert_used_count(shape.num_experts_per_tok)
    writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_expert_shared_count(1)
    writer.add_leading_dense_block_count(shape.first_k_dense_replace)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(shape.routed_scaling_factor)
    writer.add_expert_weights_norm(True)
    writer.add_nextn_predict_layers(spec.num_nextn_predict_layers)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types())
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    special = vocabulary.first_special
    writer.add_eos_token_id(special)
    writer.add_pad_token_id(special)
    writer.add_unk_token_id(special)
    writer.add_bos_token_id(vocabulary.tokens.index("[gMASK]"))
    writer.add_eot_token_id(vocabulary.tokens.index("<|user|>"))
    writer.add_eom_token_id(vocabulary.tokens.index("<|observation|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
