"""KVCache: the keys and values of all layers, in blocks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal import kernels

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer K and V [blocks, block_size, kv_heads, head_dim], both views of another memory order.

    fp8 is unscaled; int8 has a scale per token and kv head, fp32 [blocks, kv_heads, block_size] (None for the others).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_scales: tuple[Tensor | None, ...]
    value_scales: tuple[Tensor | None, ...]
    layers: tuple[kernels.BoundCache, ...]  # the same, as attention takes them

    @classmethod
    def allocate(
        cls, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, kv_dtype: str
    ) -> KVCache:
        """Address space for all blocks; the system gives memory to those that are written.

        In memory a block's keys lie [kv_heads, head_dim, block_size] and its values [kv_heads, block_size, head_dim]:
        the orders in which attention reads them (decode at 4K context: 1.25 times as fast as in the shape's own order).
        """
        dtype, layers = TORCH_DTYPE[kv_dtype], range(num_layers)
        keys = [torch.empty(num_blocks, num_kv_heads, head_dim, block_size, dtype=dtype) for _ in layers]
        values = [torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype) for _ in layers]

        def scales() -> tuple[Tensor | None, ...]:
            return tuple(
                torch.empty(num_blocks, num_kv_heads, block_size) if kv_dtype == "int8" else None for _ in layers
            )

        tensors = (
            tuple(key.permute(0, 3, 1, 2) for key in keys),
            tuple(value.transpose(1, 2) for value in values),
            scales(),
            scales(),
        )
        bound = tuple(kernels.bind_cache(kernels.LayerCache(*layer)) for layer in zip(*tensors, strict=True))
        return cls(*tensors, bound)

    def raw_blocks(self) -> tuple[Tensor, ...]:
        """The memory itself: per tensor uint8 [blocks, bytes of a block], views; keys, values and scales by layer."""
        ordered = (
            *(keys.permute(0, 2, 3, 1) for keys in self.keys),
            *(values.transpose(1, 2) for values in self.values),
            *(scales for scales in (*self.key_scales, *self.value_scales) if scales is not None),
        )
        return tuple(tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in ordered)

    def layout_digest(self, model: str) -> str:
        """32 hex digits for a model's name and for what a block of its cache looks like in ``raw_blocks``."""
        shape = [len(self.keys), *self.keys[0].shape[1:], str(self.keys[0].dtype), "heads-dim-tokens/heads-tokens-dim"]
        return hashlib.blake2b(json.dumps([model, shape]).encode(), digest_size=16).hexdigest()

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        tensors = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
