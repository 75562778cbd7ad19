"""Engine: schedule → run → sample → update. One step at a time, on the caller's thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.placing import Offloads
from glmlocal.engine.request import Request, RequestOutput, SamplingParams
from glmlocal.engine.sampler import Sampler
from glmlocal.engine.scheduler import Batch, ScheduledRequest, Scheduler
from glmlocal.errors import RequestError


class Engine:
    """Several requests over one model. Not thread-safe: one thread owns it."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, offloads: Offloads) -> None:
        self.runner, self.scheduler, self.offloads = runner, scheduler, offloads
        self.sampler = Sampler(runner.model.config.vocab_size)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that cannot run or names tokens that do not exist."""
        check_token_ids(request.prompt_token_ids, self.runner.model.config.vocab_size)
        self.scheduler.check(request)

    def add(self, request: Request) -> None:
        """Queue a request that passes ``check``."""
        check_token_ids(request.prompt_token_ids, self.runner.model.config.vocab_size)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Cancel a request between steps; None when it has already ended."""
        self.sampler.forget(request_id)
        return self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Compute one batch and report on each of its requests; an empty list when there is nothing to do."""
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        logits = self.runner.run(batch)
        sampled = self.sampler.sample(logits, [item for item in batch.requests if item.needs_sample])
        outputs = self.scheduler.update(batch, sampled)
        for output in outputs:
            if output.finish_reason is not None:
                self.sampler.forget(output.request_id)
        return outputs

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a text, fp32 [tokens, vocab], computed in chunks beside the running requests.

        Raises RequestError when the text is empty, longer than the context or finds too few free KV blocks.
        """
        vocab_size = self.runner.model.config.vocab_size
        check_token_ids(token_ids, vocab_size)
        if not 0 < len(token_ids) <= self.scheduler.context:
            raise RequestError(
                f"the text has {len(token_ids)} tokens, wanted 1 to {self.scheduler.context} (the context); "
                "shorten it or start with a larger context"
            )
        pool = self.scheduler.block_pool
        blocks = pool.allocate(pool.blocks_for(len(token_ids)))
        if blocks is None:
            raise RequestError("too few free KV blocks for this text: wait for the running requests to end")
        try:
            request = Request("logits", tuple(token_ids), SamplingParams())
            chunk_size = self.scheduler.max_num_batched_tokens
            out = torch.empty(len(token_ids), vocab_size)
            for start in range(0, len(token_ids), chunk_size):
                chunk = request.prompt_token_ids[start : start + chunk_size]
                item = ScheduledRequest(request, chunk, start, tuple(blocks), (), needs_sample=False)
                out[start : start + len(chunk)] = self.runner.run_all_logits(Batch((item,)))
            return out
        finally:
            pool.free(blocks)


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for the first id that is not an integer of 0 … vocab_size - 1."""
    for position, token in enumerate(token_ids):
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"token {position} is {token!r}, wanted an integer from 0 to {vocab_size - 1} (the vocabulary)"
            )
