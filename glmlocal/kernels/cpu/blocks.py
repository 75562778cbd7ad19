"""A decoder layer's calls, native. Shapes are checked where weights, caches and steps are bound, for all calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal.kernels import blocks
from glmlocal.kernels.blocks import BlockOutput, LayerCache, StepIndex
from glmlocal.kernels.cpu import _cpu, ops
from glmlocal.kernels.cpu.attention import check_cache, check_cache_order
from glmlocal.kernels.cpu.linear import check_rows, check_tensor
from glmlocal.kernels.cpu.packing import PackedWeight


@dataclass(frozen=True, slots=True, eq=False)
class BoundAttention:
    weights: blocks.AttentionBlock[PackedWeight]
    native: _cpu.AttentionBlock | None  # None: no native attention for this head_dim


@dataclass(frozen=True, slots=True, eq=False)
class BoundCache:
    tensors: LayerCache
    native: _cpu.LayerCache


@dataclass(frozen=True, slots=True, eq=False)
class BoundStep:
    tensors: StepIndex
    native: _cpu.StepIndex
    num_tokens: int


def bind_attention(block: blocks.AttentionBlock[PackedWeight]) -> BoundAttention:
    """Raises ValueError for weights whose shapes do not belong together."""
    hidden, head_dim = block.input_layernorm.shape[0], block.head_dim
    q_size, kv_size = block.q_proj.shape[0], block.k_proj.shape[0]
    vectors = (
        ("input_layernorm", block.input_layernorm, hidden),
        ("post_attention_layernorm", block.post_attention_layernorm, hidden),
        ("q_bias", block.q_bias, q_size),
        ("k_bias", block.k_bias, kv_size),
        ("v_bias", block.v_bias, kv_size),
        ("q_norm", block.q_norm, head_dim),
        ("k_norm", block.k_norm, head_dim),
    )
    for name, vector, size in vectors:
        if vector is not None:
            check_tensor(f"attention_block: {name}", vector, torch.float32, (size,))
    check_rows("attention_block: cos_sin", block.cos_sin, block.cos_sin.shape[-1])
    matrices = (
        ("q_proj", block.q_proj, (q_size, hidden)),
        ("k_proj", block.k_proj, (kv_size, hidden)),
        ("v_proj", block.v_proj, (kv_size, hidden)),
        ("o_proj", block.o_proj, (hidden, q_size)),
    )
    for name, weight, shape in matrices:
        if weight.shape != shape:
            raise ValueError(f"attention_block: {name} wanted {list(shape)}, found {list(weight.shape)}")
    if head_dim <= 0 or q_size % head_dim or kv_size % head_dim or not kv_size or q_size % kv_size:
        raise ValueError(
            f"attention_block: wanted query and kv heads of head_dim, found {q_size} and {kv_size} of {head_dim}"
        )
    if head_dim % 8:
        return BoundAttention(block, None)
    addresses = {name: 0 if vector is None else vector.data_ptr() for name, vector, _ in vectors}
    native = _cpu.AttentionBlock(
        hidden,
        q_size // head_dim,
        kv_size // head_dim,
        head_dim,
        block.rms_norm_eps,
        addresses,
        {name: weight.native for name, weight, _ in matrices},
        block.cos_sin.data_ptr(),
        *block.cos_sin.shape,
    )
    if block.router is not None:
        _bind_router(native, block.router, hidden)
    return BoundAttention(block, native)


def _bind_router(native: _cpu.AttentionBlock, router: blocks.Router[PackedWeight], hidden: int) -> None:
    experts = router.weight.shape[0]
    if router.weight.shape[1] != hidden:
        raise ValueError(f"attention_block: router wanted [experts, {hidden}], found {list(router.weight.shape)}")
    check_tensor("attention_block: e_score_correction_bias", router.e_score_correction_bias, torch.float32, (experts,))
    native.set_router(
        router.weight.native,
        router.e_score_correction_bias.data_ptr(),
        router.num_experts_per_tok,
        router.n_group,
        router.topk_group,
        router.norm_topk_prob,
        router.routed_scaling_factor,
    )


def bind_cache(cache: LayerCache) -> BoundCache:
    """Raises ValueError for tensors that are no cache (see ``attention.check_cache``)."""
    shape = cache.keys.shape
    if len(shape) != 4 or shape[1] == 0:
        raise ValueError(f"cache wanted [blocks, block_size, kv_heads, head_dim], found {list(shape)}")
    four = (shape[0], shape[1], shape[2], shape[3])
    kind, key_scales, value_scales = check_cache(
        "bind_cache", cache.keys, cache.values, cache.key_scales, cache.value_scales, four
    )
    check_cache_order("bind_cache", cache.keys, cache.values)
    native = _cpu.LayerCache(
        kind,
        cache.keys.data_ptr(),
        cache.keys.stride(),
        key_scales,
        cache.values.data_ptr(),
        cache.values.stride(),
        value_scales,
        four,
    )
    return BoundCache(cache, native)


def bind_step(step: StepIndex) -> BoundStep:
    """Raises ValueError for indices of other types or lengths."""
    tokens, (requests, max_blocks) = step.positions.shape[0], step.block_tables.shape
    check_tensor("bind_step: positions", step.positions, torch.int64, (tokens,))
    check_tensor("bind_step: slot_mapping", step.slot_mapping, torch.int64, (tokens,))
    check_tensor("bind_step: block_tables", step.block_tables, torch.int32, (requests, max_blocks))
    check_tensor("bind_step: query_start_loc", step.query_start_loc, torch.int32, (requests + 1,))
    check_tensor("bind_step: seq_lens", step.seq_lens, torch.int32, (requests,))
    native = _cpu.StepIndex(
        tokens,
        step.positions.data_ptr(),
        step.slot_mapping.data_ptr(),
        step.block_tables.data_ptr(),
        max_blocks,
        step.query_start_loc.data_ptr(),
        step.seq_lens.data_ptr(),
        requests,
    )
    return BoundStep(step, native, tokens)


def attention_block(block: BoundAttention, x: Tensor, step: BoundStep, cache: BoundCache) -> BlockOutput:
    weights = block.weights
    if block.native is None:
        return blocks.attention_block(ops, weights, x, step.tensors, cache.tensors)
    check_tensor("attention_block: x", x, torch.float32, (step.num_tokens, weights.input_layernorm.shape[0]))
    residual, hidden = torch.empty_like(x), torch.empty_like(x)
    if weights.router is None:
        block.native.run(step.native, cache.native, x.data_ptr(), residual.data_ptr(), hidden.data_ptr(), 0, 0)
        return BlockOutput(residual, hidden, None, None)
    shape = (step.num_tokens, weights.router.num_experts_per_tok)
    topk_ids, topk_weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    block.native.run(
        step.native,
        cache.native,
        x.data_ptr(),
        residual.data_ptr(),
        hidden.data_ptr(),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
    )
    return BlockOutput(residual, hidden, topk_ids, topk_weights)


def route(block: BoundAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.route(ops, block.weights, x)


def combine(
    residual: Tensor,
    hidden: Tensor,
    routed: Tensor | None,
    ffn: tuple[PackedWeight, PackedWeight, PackedWeight] | None,
) -> Tensor:
    shape = (residual.shape[0], residual.shape[1])
    for name, tensor in (("residual", residual), ("hidden", hidden), ("routed", routed)):
        if tensor is not None:
            check_tensor(f"combine: {name}", tensor, torch.float32, shape)
    out = torch.empty_like(residual)
    _cpu.combine(
        None if ffn is None else tuple(weight.native for weight in ffn),
        residual.data_ptr(),
        hidden.data_ptr(),
        0 if routed is None else routed.data_ptr(),
        *shape,
        out.data_ptr(),
    )
    return out
