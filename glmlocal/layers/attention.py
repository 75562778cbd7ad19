"""Grouped-query attention of the GLM-4.x family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glmlocal import kernels
from glmlocal.layers.context import ForwardContext
from glmlocal.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Attention:
    """q/k/v projections with optional bias, optional per-head RMSNorm before RoPE, paged attention, o_proj."""

    layer_idx: int
    head_dim: int
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Tensor | None  # fp32 [head_dim]
    k_norm: Tensor | None
    norm_eps: float
    cos_sin: Tensor  # fp32 [max_positions, rotary_dim]

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x fp32 [tokens, hidden] → fp32 [tokens, hidden]; writes this layer's keys and values to the cache."""
        num_tokens = x.shape[0]
        q = self.q_proj(x).view(num_tokens, -1, self.head_dim)
        k = self.k_proj(x).view(num_tokens, -1, self.head_dim)
        v = self.v_proj(x).view(num_tokens, -1, self.head_dim)
        cache = context.kv_cache
        k_cache, v_cache = cache.keys[self.layer_idx], cache.values[self.layer_idx]
        k_scales, v_scales = cache.key_scales[self.layer_idx], cache.value_scales[self.layer_idx]
        kernels.rope_store_(
            q,
            k,
            v,
            self.q_norm,
            self.k_norm,
            self.norm_eps,
            self.cos_sin,
            context.positions,
            k_cache,
            v_cache,
            context.slot_mapping,
            k_scales,
            v_scales,
        )
        out = kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            context.block_tables,
            context.query_start_loc,
            context.seq_lens,
            self.head_dim**-0.5,
            k_scales,
            v_scales,
        )
        return self.o_proj(out.view(num_tokens, -1))
