"""The table of rotation angles."""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin_table(max_positions: int, rotary_dim: int, rope_theta: float) -> Tensor:
    """cos | sin of position · θ^(−2j / rotary_dim), j < rotary_dim / 2; fp32 [max_positions, rotary_dim].

    The exponent's divisor is the rotary width, not head_dim (transformers ``Glm4MoeRotaryEmbedding``). Angles are
    formed in fp32 as there, so that long positions round the same way.
    """
    inverse_frequency = 1.0 / rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
    angles = torch.arange(max_positions).float()[:, None] * inverse_frequency
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
