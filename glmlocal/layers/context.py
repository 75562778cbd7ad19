"""ForwardContext: what a step's layers need to know besides the hidden states. Passed as an argument, never global."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glmlocal.layers.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """New tokens of all requests lie one after another ("ragged"): request r owns query_start_loc[r] … [r+1]."""

    positions: Tensor  # int64 [tokens]
    slot_mapping: Tensor  # int64 [tokens] = block · block_size + offset
    block_tables: Tensor  # int32 [requests, max_blocks]
    query_start_loc: Tensor  # int32 [requests + 1]
    seq_lens: Tensor  # int32 [requests], new tokens included
    kv_cache: KVCache
