"""KVCache: the keys and values of all layers, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer K and V, fp32 [blocks, block_size, kv_heads, head_dim], both views of another memory order."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> KVCache:
        """Address space for all blocks; the system gives memory to those that are written.

        In memory a block's keys lie [kv_heads, head_dim, block_size] and its values [kv_heads, block_size, head_dim]:
        the orders in which attention reads them (decode at 4K context: 1.25 times as fast as in the shape's own order).
        """
        keys = [torch.empty(num_blocks, num_kv_heads, head_dim, block_size) for _ in range(num_layers)]
        values = [torch.empty(num_blocks, num_kv_heads, block_size, head_dim) for _ in range(num_layers)]
        return cls(tuple(key.permute(0, 3, 1, 2) for key in keys), tuple(value.transpose(1, 2) for value in values))

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
