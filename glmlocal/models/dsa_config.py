"""GLM-5, 5.1 and 5.2 (``glm_moe_dsa``): the sizes in their config.json, and the tensors that follow. For planning only.

``ModelConfig`` refuses these models, which this version does not run; what they weigh can be told all the same.
Torch-free. Names are the checkpoint's; the schedule of indexers is transformers' (``configuration_glm_moe_dsa.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import quoted

MODEL_TYPE = "glm_moe_dsa"
_MOST = {"vocab_size": 1 << 24, "max_position_embeddings": 1 << 30, "num_hidden_layers": 512}
_MOST |= {"n_routed_experts": 1024, "num_nextn_predict_layers": 16, "index_topk_freq": 512}
_MOST_ELSE = 1 << 20
_MOST_EXPERTS_IN_ALL = 1 << 17  # GLM-5 has 19,456; the list of tensors must stay a list one can make
_LEAST = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class DsaConfig:
    """Hugging Face's names; the defaults are GLM-5's, which are those of transformers' GlmMoeDsaConfig (5.23)."""

    vocab_size: int = 154880
    hidden_size: int = 6144
    intermediate_size: int = 12288
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 78  # without MTP
    num_attention_heads: int = 64
    q_lora_rank: int = 2048
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 192
    qk_rope_head_dim: int = 64
    v_head_dim: int = 256
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 2048
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    max_position_embeddings: int = 202752
    num_nextn_predict_layers: int = 1
    indexer_types: tuple[str, ...] = ()  # "full" or "shared" for each layer; () follows the two numbers above

    @property
    def latent_width(self) -> int:
        """Numbers that MLA caches for a token and layer: the normed latent and the one rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def has_indexer(self, layer: int) -> bool:
        """Does the layer choose its own positions? The MTP layers always do; the others may reuse an earlier choice."""
        if layer >= self.num_hidden_layers:
            return True
        if self.indexer_types:
            return self.indexer_types[layer] == "full"
        return max(layer - self.index_skip_topk_offset + 1, 0) % self.index_topk_freq == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DsaConfig:
        """Read a config.json's dict. Raises CheckpointError naming the field, its value and what is accepted."""
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(f"model_type is {quoted(config.get('model_type'))}; {MODEL_TYPE!r} was expected")
        read: dict[str, Any] = {}
        for field in fields(cls):
            value = config.get(field.name)
            if field.name != "indexer_types" and value is not None:
                low, high = _LEAST.get(field.name, 1), _MOST.get(field.name, _MOST_ELSE)
                if type(value) is not int or not low <= value <= high:
                    raise _wrong(field.name, value, f"a whole number from {low} to {high}")
                read[field.name] = value
        result = cls(**read, indexer_types=_indexer_types(config, read))
        if result.num_experts_per_tok > result.n_routed_experts:
            raise _wrong("num_experts_per_tok", result.num_experts_per_tok, f"1 to {result.n_routed_experts}")
        if result.first_k_dense_replace > result.num_hidden_layers:
            raise _wrong("first_k_dense_replace", result.first_k_dense_replace, f"0 to {result.num_hidden_layers}")
        if result.num_hidden_layers * result.n_routed_experts > _MOST_EXPERTS_IN_ALL:
            wanted = f"at most {_MOST_EXPERTS_IN_ALL} experts in all {result.num_hidden_layers} layers"
            raise _wrong("n_routed_experts", result.n_routed_experts, wanted)
        return result


def top_tensors(config: DsaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is in no layer."""
    table = (config.vocab_size, config.hidden_size)
    norm = (config.hidden_size,)
    return {"model.embed_tokens.weight": table, "model.norm.weight": norm, "lm_head.weight": table}


def layer_tensors(config: DsaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Of one decoder layer, or of an MTP layer (from num_hidden_layers on) without copies of embeddings and head."""
    return dict(_layer_shapes(config, layer))


def _layer_shapes(config: DsaConfig, layer: int) -> Shapes:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield from _attention_shapes(config, f"{prefix}.self_attn")
    if config.has_indexer(layer):
        yield from _indexer_shapes(config, f"{prefix}.self_attn.indexer")
    if layer >= config.num_hidden_layers:
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    elif layer < config.first_k_dense_replace:
        yield from _ffn_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
        return
    yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _ffn_shapes(f"{prefix}.mlp.shared_experts", hidden, shared)
    for expert in range(config.n_routed_experts):
        yield from _ffn_shapes(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)


def _attention_shapes(config: DsaConfig, prefix: str) -> Shapes:
    hidden, heads, nope = config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim
    yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden)
    yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
    yield f"{prefix}.q_b_proj.weight", (heads * (nope + config.qk_rope_head_dim), config.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (config.latent_width, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + config.v_head_dim), config.kv_lora_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * config.v_head_dim)


def _indexer_shapes(config: DsaConfig, prefix: str) -> Shapes:
    width = config.index_head_dim
    yield f"{prefix}.wq_b.weight", (config.index_n_heads * width, config.q_lora_rank)
    yield f"{prefix}.wk.weight", (width, config.hidden_size)
    yield f"{prefix}.k_norm.weight", (width,)
    yield f"{prefix}.k_norm.bias", (width,)
    yield f"{prefix}.weights_proj.weight", (config.index_n_heads, config.hidden_size)


def _ffn_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _indexer_types(config: Mapping[str, Any], read: Mapping[str, int]) -> tuple[str, ...]:
    """The list, or transformers' pattern of F and S in its place."""
    value = config.get("indexer_types")
    if value is None and isinstance(config.get("index_topk_pattern"), str):
        value = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in config["index_topk_pattern"]]
    if value is None:
        return ()
    layers = read.get("num_hidden_layers", DsaConfig().num_hidden_layers)
    if not isinstance(value, list) or len(value) != layers or not all(kind in ("full", "shared") for kind in value):
        raise _wrong("indexer_types", value, f"a list of 'full' or 'shared' for each of the {layers} layers")
    return tuple(value)


def _wrong(name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{name} is {quoted(value)} in the model's config; {wanted} was expected")
