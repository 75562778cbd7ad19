"""Attention over the paged cache. Arguments as in ``kernels/reference.py``, checked before addresses are taken.

The caches may lie in memory in another order than their shape says, as views: keys as [blocks, kv_heads, head_dim,
block_size] and values as [blocks, kv_heads, block_size, head_dim] are read fastest. The order never changes a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmlocal.kernels import reference
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.linear import check_tensor

_LANES = 16  # keys that the kernels take at a time


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    tokens, heads, head_dim = q.shape
    shape = k_cache.shape
    requests, max_blocks = block_tables.shape
    check_tensor("paged_attention: q", q, torch.float32, (tokens, heads, head_dim))
    check_tensor("paged_attention: block_tables", block_tables, torch.int32, (requests, max_blocks))
    check_tensor("paged_attention: query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_tensor("paged_attention: seq_lens", seq_lens, torch.int32, (requests,))
    k_strides, v_strides = k_cache.stride(), v_cache.stride()
    if (
        k_cache.dtype is not torch.float32
        or v_cache.dtype is not torch.float32
        or not (k_cache.is_cpu and v_cache.is_cpu)
        or len(shape) != 4
        or v_cache.shape != shape
        or shape[3] != head_dim
        or shape[1] == 0
    ):
        raise ValueError(
            f"paged_attention: caches wanted fp32 [blocks, block_size, kv_heads, {head_dim}] on the CPU, "
            f"found {k_cache.dtype} {list(shape)} and {v_cache.dtype} {list(v_cache.shape)}"
        )
    if v_strides[3] != 1 or (k_strides[3] != 1 and (k_strides[1] != 1 or shape[1] % _LANES)):
        raise ValueError(
            f"paged_attention: caches wanted features next to each other, or of keys the slots of a block of a "
            f"multiple of {_LANES}, found strides {list(k_strides)} and {list(v_strides)}, block size {shape[1]}"
        )
    if head_dim == 0 or shape[2] == 0 or heads % shape[2]:
        raise ValueError(
            f"paged_attention: wanted a head_dim and equally many query heads per kv head, "
            f"found head_dim {head_dim} and {heads} heads for {shape[2]}"
        )
    if head_dim % 8:  # no released model: not worth a code path of its own
        return reference.paged_attention(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale)
    out = torch.empty_like(q)
    _cpu.paged_attention(
        q.data_ptr(),
        tokens,
        heads,
        k_cache.data_ptr(),
        k_strides,
        v_cache.data_ptr(),
        v_strides,
        shape,
        block_tables.data_ptr(),
        max_blocks,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        requests,
        scale,
        out.data_ptr(),
    )
    return out
