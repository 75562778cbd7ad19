"""Linear: a packed weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glmlocal import kernels


@dataclass(frozen=True, slots=True)
class Linear:
    """x fp32 [tokens, in] → fp32 [tokens, out]."""

    weight: kernels.Weight

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)
