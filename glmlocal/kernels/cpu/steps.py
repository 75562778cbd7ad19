"""Norms, rotation and storing, choosing experts: arguments as in ``kernels/reference.py``, checked before addresses are
taken; a tensor of another shape, dtype, device or layout is a ValueError."""

from __future__ import annotations

import torch
from torch import Tensor

from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.attention import check_cache
from glmlocal.kernels.cpu.linear import check_rows, check_tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    features = x.shape[-1]
    check_tensor("rms_norm: x", x, torch.float32, tuple(x.shape))
    check_tensor("rms_norm: weight", weight, torch.float32, (features,))
    out = torch.empty_like(x)
    _cpu.rms_norm(x.data_ptr(), x.numel() // features, features, weight.data_ptr(), eps, out.data_ptr())
    return out


def rope_store_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    tokens, heads, head_dim = q.shape
    blocks, block_size, kv_heads, _ = k_cache.shape
    rotary_dim = cos_sin.shape[1]
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"rope_store_: cos_sin has {rotary_dim} columns, wanted an even number up to {head_dim}")
    check_tensor("rope_store_: q", q, torch.float32, (tokens, heads, head_dim))
    check_rows("rope_store_: cos_sin", cos_sin, rotary_dim)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(f"rope_store_: {name}", tensor, torch.float32, (tokens, kv_heads, head_dim))
    shape = (blocks, block_size, kv_heads, head_dim)
    cache_type, k_scales_ptr, v_scales_ptr = check_cache("rope_store_", k_cache, v_cache, k_scales, v_scales, shape)
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        check_tensor(f"rope_store_: {name}", index, torch.int64, (tokens,))
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(f"rope_store_: {name}", norm, torch.float32, (head_dim,))
    _cpu.rope_store(
        q.data_ptr(),
        tokens,
        heads,
        k.data_ptr(),
        v.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        eps,
        cos_sin.data_ptr(),
        cos_sin.shape[0],
        rotary_dim,
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        cache_type,
        k_cache.data_ptr(),
        k_cache.stride(),
        k_scales_ptr,
        v_cache.data_ptr(),
        v_cache.stride(),
        v_scales_ptr,
        shape,
    )


def router_topk(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    rows, experts = logits.shape
    check_rows("router_topk: logits", logits, experts)
    check_tensor("router_topk: correction_bias", correction_bias, torch.float32, (experts,))
    topk_ids, topk_weights = torch.empty((rows, top_k), dtype=torch.int32), torch.empty((rows, top_k))
    _cpu.router_topk(
        logits.data_ptr(),
        rows,
        experts,
        correction_bias.data_ptr(),
        top_k,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
    )
    return topk_ids, topk_weights
