"""RMSNorm over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glmlocal import kernels


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x fp32 [..., features] → the same shape."""

    weight: Tensor  # fp32 [features]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)
