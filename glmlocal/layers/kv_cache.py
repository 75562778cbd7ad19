"""KVCache: the keys and values of all layers, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer one K and one V tensor, fp32 [blocks, block_size, kv_heads, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> KVCache:
        """Address space for all blocks; the system gives memory to those that are written."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return cls(
            tuple(torch.empty(shape) for _ in range(num_layers)), tuple(torch.empty(shape) for _ in range(num_layers))
        )

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
