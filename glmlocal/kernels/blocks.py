"""A decoder layer in three calls: attention with the router, the experts, and what joins them to the residual.

The values here are what all three are told; ``attention_block`` and ``combine`` compose them of single ops, which is
how they run without native kernels and what the native ones (``cpu/blocks.py``) must equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Generic, TypeVar

from torch import Tensor

W = TypeVar("W")


@dataclass(frozen=True, slots=True, eq=False)
class Router(Generic[W]):
    """Sigmoid scores in fp32; the correction bias chooses, the plain scores weigh (glm-4.5's noaux_tc)."""

    weight: W  # [experts, hidden], fp32: the whole product is
    e_score_correction_bias: Tensor  # fp32 [experts]
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBlock(Generic[W]):
    """Everything of a layer up to the choice of experts. Vectors are fp32."""

    input_layernorm: Tensor  # [hidden]
    q_proj: W
    k_proj: W
    v_proj: W
    o_proj: W
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    post_attention_layernorm: Tensor  # [hidden]
    rms_norm_eps: float
    head_dim: int
    cos_sin: Tensor  # [max_positions, rotary_dim]
    router: Router[W] | None  # None: a dense layer


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of one layer, [blocks, block_size, kv_heads, head_dim] in fp32, bf16, fp8 or int8.

    int8 has a scale per token and kv head, fp32 [blocks, kv_heads, block_size].
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class StepIndex:
    """The new tokens of all requests one after another: request r owns query_start_loc[r] … query_start_loc[r + 1]."""

    positions: Tensor  # int64 [tokens]
    slot_mapping: Tensor  # int64 [tokens] = block · block_size + offset
    block_tables: Tensor  # int32 [requests, max_blocks]
    query_start_loc: Tensor  # int32 [requests + 1]
    seq_lens: Tensor  # int32 [requests], new tokens included


@dataclass(frozen=True, slots=True, eq=False)
class BlockOutput:
    """What an attention block leaves: fp32 [tokens, hidden] twice, and the chosen experts where it has a router."""

    residual: Tensor
    hidden: Tensor  # after the post-attention norm
    topk_ids: Tensor | None  # int32 [tokens, num_experts_per_tok]
    topk_weights: Tensor | None  # fp32, the same


def attention_block(
    ops: ModuleType, block: AttentionBlock[W], x: Tensor, step: StepIndex, cache: LayerCache
) -> BlockOutput:
    """x fp32 [tokens, hidden] through the block, in the ops of a module; writes the tokens' keys and values."""
    tokens = x.shape[0]
    normed = ops.rms_norm(x, block.input_layernorm, block.rms_norm_eps)
    q, k, v = (
        ops.linear(normed, weight, bias).view(tokens, -1, block.head_dim)
        for weight, bias in (
            (block.q_proj, block.q_bias),
            (block.k_proj, block.k_bias),
            (block.v_proj, block.v_bias),
        )
    )
    ops.rope_store_(
        q,
        k,
        v,
        block.q_norm,
        block.k_norm,
        block.rms_norm_eps,
        block.cos_sin,
        step.positions,
        cache.keys,
        cache.values,
        step.slot_mapping,
        cache.key_scales,
        cache.value_scales,
    )
    context = ops.paged_attention(
        q,
        cache.keys,
        cache.values,
        step.block_tables,
        step.query_start_loc,
        step.seq_lens,
        block.head_dim**-0.5,
        cache.key_scales,
        cache.value_scales,
    )
    residual = x + ops.linear(context.view(tokens, -1), block.o_proj, None)
    hidden = ops.rms_norm(residual, block.post_attention_layernorm, block.rms_norm_eps)
    if block.router is None:
        return BlockOutput(residual, hidden, None, None)
    return BlockOutput(residual, hidden, *choose(ops, block.router, hidden))


def choose(ops: ModuleType, router: Router[W], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """topk_ids and topk_weights of ``BlockOutput``."""
    ids, weights = ops.router_topk(
        ops.linear(hidden, router.weight, None),
        router.e_score_correction_bias,
        top_k=router.num_experts_per_tok,
        n_group=router.n_group,
        topk_group=router.topk_group,
        norm_topk_prob=router.norm_topk_prob,
        routed_scaling_factor=router.routed_scaling_factor,
    )
    return ids, weights


def route(ops: ModuleType, block: AttentionBlock[W], x: Tensor) -> tuple[Tensor, Tensor]:
    """What the router would choose if attention added nothing to x: a guess, made before attention is computed."""
    router = block.router
    assert router is not None
    return choose(ops, router, ops.rms_norm(x, block.post_attention_layernorm, block.rms_norm_eps))


def combine(
    ops: ModuleType, residual: Tensor, hidden: Tensor, routed: Tensor | None, ffn: tuple[W, W, W] | None
) -> Tensor:
    """residual + (ffn(hidden) + routed), all fp32 [tokens, hidden]; ffn is gate, up, down; either may be None."""
    if ffn is None:
        assert routed is not None
        return residual + routed
    out: Tensor = ops.swiglu_ffn(hidden, *ffn)
    return residual + (out if routed is None else out + routed)
