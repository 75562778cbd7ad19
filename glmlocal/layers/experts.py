"""Routed experts, wherever their weights live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glmlocal import kernels


class Pending(Protocol):
    """Routed experts at work."""

    def wait(self) -> Tensor:
        """Their weighted sum, fp32 [tokens, hidden]."""
        ...


class Experts(Protocol):
    """Routed experts of one MoE layer. Where the weights live is not the caller's business."""

    @property
    def nbytes(self) -> int:
        """Held in memory."""
        ...

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

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        return _Done(kernels.experts_ffn(x, topk_ids, topk_weights, self.weights))
