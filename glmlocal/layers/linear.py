"""Linear: a packed weight and its bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glmlocal import kernels


@dataclass(frozen=True, slots=True)
class Linear:
    """x fp32 [tokens, in] → fp32 [tokens, out]."""

    weight: kernels.Weight
    bias: Tensor | None = None  # fp32 [out]

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)
