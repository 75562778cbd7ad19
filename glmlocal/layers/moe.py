"""Feed-forward blocks: dense, and the mixture of experts with its router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glmlocal import kernels


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """down(silu(gate(x)) · up(x)): a dense layer's FFN, and the shared experts."""

    gate_proj: kernels.Weight
    up_proj: kernels.Weight
    down_proj: kernels.Weight

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.swiglu_ffn(x, self.gate_proj, self.up_proj, self.down_proj)


@dataclass(frozen=True, slots=True)
class Router:
    """Sigmoid scores in fp32; the correction bias chooses, the plain scores weigh (glm-4.5's noaux_tc)."""

    weight: kernels.Weight  # fp32 [experts, hidden]: the whole product is in fp32
    e_score_correction_bias: Tensor  # fp32 [experts]
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x fp32 [tokens, hidden] → topk_ids int32 and topk_weights fp32, both [tokens, num_experts_per_tok]."""
        return kernels.router_topk(
            kernels.linear(x, self.weight),
            self.e_score_correction_bias,
            top_k=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )


class Pending(Protocol):
    """Routed experts at work."""

    def wait(self) -> Tensor:
        """Their weighted sum, fp32 [tokens, hidden]."""
        ...


class Experts(Protocol):
    """Routed experts of one MoE layer. Where the weights live is not the caller's business."""

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending: ...


@dataclass(frozen=True, slots=True)
class _Done:
    out: Tensor

    def wait(self) -> Tensor:
        return self.out


@dataclass(frozen=True, slots=True)
class ResidentExperts:
    """All experts of the layer in memory."""

    weights: kernels.ExpertWeights

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        return _Done(kernels.experts_ffn(x, topk_ids, topk_weights, self.weights))


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts plus the shared experts, which are added unscaled."""

    router: Router
    experts: Experts
    shared_experts: SwiGLU | None

    def __call__(self, x: Tensor) -> Tensor:
        pending = self.experts.submit(x, *self.router(x))
        if self.shared_experts is None:
            return pending.wait()
        return self.shared_experts(x) + pending.wait()
