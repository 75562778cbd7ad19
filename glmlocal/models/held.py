"""What a loaded model really holds, in the words of a plan's ledger, so that the two can be compared."""

from __future__ import annotations

from collections import Counter
from typing import Any

from glmlocal.models.glm4_moe import DecoderLayer, Glm4MoeForCausalLM


def held_bytes(model: Glm4MoeForCausalLM) -> dict[str, int]:
    """Bytes of the model's buffers by component, those of MTP layers with "MTP " before it; nothing that is empty."""
    counts: Counter[str] = Counter()
    for layer in model.layers:
        _add_layer(counts, layer, "")
    counts["head"] += _nbytes(model.lm_head.weight)
    counts["norms"] += _nbytes(model.norm.weight)
    for mtp in model.mtp:
        _add_layer(counts, mtp.layer, "MTP ")
        counts["MTP norms"] += _nbytes(mtp.enorm.weight, mtp.hnorm.weight, mtp.shared_head_norm.weight)
        counts["MTP weights"] += _nbytes(mtp.eh_proj.weight)
        counts["MTP head"] += _nbytes(mtp.head.weight) if mtp.head is not None else 0
    return {name: count for name, count in counts.items() if count}


def _add_layer(counts: Counter[str], layer: DecoderLayer, prefix: str) -> None:
    attention = getattr(layer.attention, "weights", layer.attention)  # the plain kernels bind nothing
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_bias", "k_bias", "v_bias"):
        counts[f"{prefix}attention"] += _nbytes(getattr(attention, name))
    for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"):
        counts[f"{prefix}norms"] += _nbytes(getattr(attention, name))
    if attention.router is not None:
        counts[f"{prefix}router"] += _nbytes(attention.router.weight, attention.router.e_score_correction_bias)
    if layer.experts is not None:
        counts[f"{prefix}routed experts"] += layer.experts.nbytes
    counts[f"{prefix}dense"] += _nbytes(*(layer.mlp or ()))
    counts[f"{prefix}shared"] += _nbytes(*(layer.shared_experts or ()))


def _nbytes(*buffers: Any) -> int:
    return sum(int(buffer.nbytes) for buffer in buffers if buffer is not None)
