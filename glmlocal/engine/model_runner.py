"""ModelRunner: a Batch of plain ints → tensors → hidden states and logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.batch import Batch
from glmlocal.layers.context import ForwardContext, never
from glmlocal.layers.kv_cache import KVCache
from glmlocal.models.glm4_moe import Glm4MoeForCausalLM


class ModelRunner:
    """Runs the model over the KV cache; knows nothing of queues or sampling."""

    def __init__(self, model: Glm4MoeForCausalLM, kv_cache: KVCache) -> None:
        self.model, self.kv_cache = model, kv_cache

    @torch.inference_mode()
    def run(self, batch: Batch, is_cancelled: Callable[[], bool] = never) -> Tensor:
        """Compute the batch; logits fp32 [sum of num_logits, vocab], in batch order. Raises StepCancelled."""
        hidden_states = self._forward(batch, is_cancelled)
        ends = accumulate(len(scheduled.token_ids) for scheduled in batch.requests)
        spans = [(end - item.num_logits, end) for end, item in zip(ends, batch.requests, strict=True)]
        rows = [row for start, end in spans for row in range(start, end)]
        if len(rows) == len(hidden_states):  # all decode: nothing to pick
            return self.model.compute_logits(hidden_states)
        return self.model.compute_logits(hidden_states[rows])

    @torch.inference_mode()
    def run_all_logits(self, batch: Batch) -> Tensor:
        """Compute the batch; logits of every token, fp32 [tokens, vocab]."""
        return self.model.compute_logits(self._forward(batch, never))

    def _forward(self, batch: Batch, is_cancelled: Callable[[], bool]) -> Tensor:
        token_ids = [token for scheduled in batch.requests for token in scheduled.token_ids]
        return self.model(torch.tensor(token_ids), forward_context(batch, self.kv_cache, is_cancelled))


def forward_context(batch: Batch, kv_cache: KVCache, is_cancelled: Callable[[], bool] = never) -> ForwardContext:
    """Where each new token stands and where its keys and values go."""
    requests, block_size = batch.requests, kv_cache.block_size
    block_tables = np.zeros((len(requests), max(len(item.block_ids) for item in requests)), np.int32)
    for row, item in zip(block_tables, requests, strict=True):
        row[: len(item.block_ids)] = item.block_ids
    counts = np.array([len(item.token_ids) for item in requests])
    ends = counts.cumsum()
    starts = np.array([item.start for item in requests])
    owners = np.arange(len(requests)).repeat(counts)
    positions = np.arange(ends[-1]) + (starts - ends + counts).repeat(counts)
    slots = block_tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    query_start_loc = np.zeros(len(requests) + 1, np.int32)
    query_start_loc[1:] = ends
    step = kernels.StepIndex(
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        block_tables=torch.from_numpy(block_tables),
        query_start_loc=torch.from_numpy(query_start_loc),
        seq_lens=torch.from_numpy((starts + counts).astype(np.int32)),
    )
    return ForwardContext(kernels.bind_step(step), kv_cache, is_cancelled)
