"""Routed experts, wherever their weights live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glmlocal import kernels

Route = Callable[[], tuple[Tensor, Tensor]]  # int32 topk_ids and fp32 topk_weights, [tokens, top_k]


class Pending(Protocol):
    """Routed experts at work."""

    @property
    def is_done(self) -> bool:
        """``wait`` has nothing to wait for; else the caller does other work first."""
        ...

    def wait(self) -> Tensor:
        """Their weighted sum, fp32 [tokens, hidden]."""
        ...


class Experts(Protocol):
    """Routed experts of one MoE layer. Where the weights live is not the caller's business."""

    @property
    def nbytes(self) -> int:
        """Held in memory."""
        ...

    def foresee(self, num_tokens: int, route: Route) -> None:
        """Told while the layer before computes its FFN; ``route`` guesses what the router will choose."""
        ...

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        """Begin; the caller calls ``wait`` before this layer's experts are used again, whatever happens."""
        ...


@dataclass(frozen=True, slots=True)
class _Done:
    out: Tensor
    is_done: bool = True

    def wait(self) -> Tensor:
        return self.out


@dataclass(frozen=True, slots=True)
class ResidentExperts:
    """All experts of the layer in memory."""

    weights: kernels.ExpertWeights

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def foresee(self, num_tokens: int, route: Route) -> None:
        """Nothing is to be fetched."""

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        return _Done(kernels.experts_ffn(x, topk_ids, topk_weights, self.weights))
