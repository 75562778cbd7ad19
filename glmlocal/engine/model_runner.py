"""ModelRunner: a Batch of plain ints → tensors → hidden states and logits."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.scheduler import Batch
from glmlocal.layers.context import ForwardContext
from glmlocal.layers.kv_cache import KVCache
from glmlocal.models.glm4_moe import Glm4MoeForCausalLM


class ModelRunner:
    """Runs the model over the KV cache; knows nothing of queues or sampling."""

    def __init__(self, model: Glm4MoeForCausalLM, kv_cache: KVCache) -> None:
        self.model, self.kv_cache = model, kv_cache

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute the batch; logits fp32 [requests that need a sample, vocab], in batch order."""
        hidden_states = self._forward(batch)
        ends = accumulate(len(scheduled.token_ids) for scheduled in batch.requests)
        rows = [end - 1 for end, scheduled in zip(ends, batch.requests, strict=True) if scheduled.needs_sample]
        return self.model.compute_logits(hidden_states[rows])

    @torch.inference_mode()
    def run_all_logits(self, batch: Batch) -> Tensor:
        """Compute the batch; logits of every token, fp32 [tokens, vocab]."""
        return self.model.compute_logits(self._forward(batch))

    def _forward(self, batch: Batch) -> Tensor:
        token_ids = [token for scheduled in batch.requests for token in scheduled.token_ids]
        return self.model(torch.tensor(token_ids), forward_context(batch, self.kv_cache))


def forward_context(batch: Batch, kv_cache: KVCache) -> ForwardContext:
    """Where each new token stands and where its keys and values go."""
    requests, block_size = batch.requests, kv_cache.block_size
    spans = [(item, range(item.start, item.start + len(item.token_ids))) for item in requests]
    max_blocks = max(len(item.block_ids) for item in requests)
    step = kernels.StepIndex(
        positions=torch.tensor([position for _, span in spans for position in span]),
        slot_mapping=torch.tensor(
            [item.block_ids[p // block_size] * block_size + p % block_size for item, span in spans for p in span]
        ),
        block_tables=torch.tensor(
            [(*item.block_ids, *[0] * (max_blocks - len(item.block_ids))) for item in requests], dtype=torch.int32
        ),
        query_start_loc=torch.tensor([0, *accumulate(len(span) for _, span in spans)], dtype=torch.int32),
        seq_lens=torch.tensor([span.stop for _, span in spans], dtype=torch.int32),
    )
    return ForwardContext(kernels.bind_step(step), kv_cache)
