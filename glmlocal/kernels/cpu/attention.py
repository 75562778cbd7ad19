"""Attention over the paged cache. Arguments as in ``kernels/reference.py``, checked before addresses are taken.

The caches may lie in memory in another order than their shape says, as views: keys as [blocks, kv_heads, head_dim,
block_size] and values as [blocks, kv_heads, block_size, head_dim] are read fastest. The order never changes a result.

Where the cache is not fp32, AMD's CPUs with AVX512_BF16 round queries and probabilities to bf16, and others with
AVX-512 VNNI multiply integers over a scale of each row's own (docs/design/008); sums over tiles are fp32 always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmlocal.kernels import reference
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.linear import check_tensor

_LANES = 16  # keys that the kernels take at a time
_CACHE_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.int8: "i8"}


def check_cache(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    shape: tuple[int, int, int, int],
) -> tuple[str, int, int]:
    """The name of the element type and the addresses of the scales (0: none). Raises ValueError; strides are free."""
    name = _CACHE_TYPES.get(k_cache.dtype, "")
    for cache in (k_cache, v_cache):
        if not name or cache.dtype is not k_cache.dtype or cache.shape != shape or not cache.is_cpu:
            raise ValueError(
                f"{op}: caches wanted fp32, bf16, fp8 (e4m3fn) or int8 {list(shape)} on the CPU, "
                f"found {k_cache.dtype} {list(k_cache.shape)} and {v_cache.dtype} {list(v_cache.shape)}"
            )
    if name != "i8":
        if k_scales is not None or v_scales is not None:
            raise ValueError(f"{op}: scales belong to int8 caches, found {k_cache.dtype}")
        return name, 0, 0
    if k_scales is None or v_scales is None:
        raise ValueError(f"{op}: int8 caches wanted k_scales and v_scales")
    blocks, block_size, kv_heads, _ = shape
    check_tensor(f"{op}: k_scales", k_scales, torch.float32, (blocks, kv_heads, block_size))
    check_tensor(f"{op}: v_scales", v_scales, torch.float32, (blocks, kv_heads, block_size))
    return name, k_scales.data_ptr(), v_scales.data_ptr()


def check_cache_order(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises ValueError for an order in memory that attention cannot read."""
    k_strides, v_strides, block_size = k_cache.stride(), v_cache.stride(), k_cache.shape[1]
    if v_strides[3] != 1 or (k_strides[3] != 1 and (k_strides[1] != 1 or block_size % _LANES)):
        raise ValueError(
            f"{op}: caches wanted features next to each other, or of keys the slots of a block of a "
            f"multiple of {_LANES}, found strides {list(k_strides)} and {list(v_strides)}, block size {block_size}"
        )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    tokens, heads, head_dim = q.shape
    shape = k_cache.shape
    requests, max_blocks = block_tables.shape
    check_tensor("paged_attention: q", q, torch.float32, (tokens, heads, head_dim))
    check_tensor("paged_attention: block_tables", block_tables, torch.int32, (requests, max_blocks))
    check_tensor("paged_attention: query_start_loc", query_start_loc, torch.int32, (requests + 1,))
    check_tensor("paged_attention: seq_lens", seq_lens, torch.int32, (requests,))
    if len(shape) != 4 or shape[1] == 0:
        raise ValueError(
            f"paged_attention: caches wanted [blocks, block_size, kv_heads, {head_dim}], found {list(shape)}"
        )
    cache_shape = shape[0], shape[1], shape[2], head_dim
    cache_type, k_scales_ptr, v_scales_ptr = check_cache(
        "paged_attention", k_cache, v_cache, k_scales, v_scales, cache_shape
    )
    check_cache_order("paged_attention", k_cache, v_cache)
    if head_dim == 0 or shape[2] == 0 or heads % shape[2]:
        raise ValueError(
            f"paged_attention: wanted a head_dim and equally many query heads per kv head, "
            f"found head_dim {head_dim} and {heads} heads for {shape[2]}"
        )
    if head_dim % 8:  # no released model: not worth a code path of its own
        return reference.paged_attention(
            q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale, k_scales, v_scales
        )
    out = torch.empty_like(q)
    _cpu.paged_attention(
        q.data_ptr(),
        tokens,
        heads,
        cache_type,
        k_cache.data_ptr(),
        k_cache.stride(),
        k_scales_ptr,
        v_cache.data_ptr(),
        v_cache.stride(),
        v_scales_ptr,
        cache_shape,
        block_tables.data_ptr(),
        max_blocks,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        requests,
        scale,
        out.data_ptr(),
    )
    return out
