"""Engine: schedule → run → sample → update. One step at a time, on its owner's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from glmlocal.engine.batch import Batch, SampledToken, ScheduledRequest
from glmlocal.engine.grammar import Constraint, GrammarCompiler
from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.placing import ALL_IN_RAM, Offloads
from glmlocal.engine.rates import StepRates
from glmlocal.engine.request import Request, RequestOutput, SamplingParams, TokenLogprob
from glmlocal.engine.sampler import Sampler, prompt_logprobs
from glmlocal.engine.scheduler import Scheduler
from glmlocal.errors import GlmlocalError, RequestError
from glmlocal.layers.context import StepCancelled

log = logging.getLogger(__name__)


class Engine:
    """Several requests over one model. Not thread-safe: one thread owns it, but for ``check``, ``constraint_for`` and
    ``interrupt``."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, offloads: Offloads = ALL_IN_RAM) -> None:
        self.runner, self.scheduler, self.offloads = runner, scheduler, offloads
        self.sampler = Sampler(runner.model.config.vocab_size)
        self.grammars: GrammarCompiler | None = None  # whoever has a tokenizer sets it
        self.rates = StepRates()
        self._interrupted: set[str] = set()
        self._step_tokens: dict[str, int] = {}  # of the step that runs

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that cannot run or names tokens that do not exist."""
        vocab_size = self.runner.model.config.vocab_size
        check_token_ids(request.prompt_token_ids, vocab_size)
        if request.params.logit_bias and (last := max(request.params.logit_bias)) >= vocab_size:
            raise RequestError(f"logit_bias names token {last}; the vocabulary ends at {vocab_size - 1}")
        self.scheduler.check(request)
        if request.params.grammar is not None and self.grammars is None:
            raise RequestError("this model has no tokenizer, so an answer cannot be held to a grammar; drop it")

    def constraint_for(self, request: Request) -> Constraint | None:
        """The request's grammar, compiled; this may take a while. Raises RequestError."""
        grammar = request.params.grammar
        return None if grammar is None or self.grammars is None else self.grammars.compile(grammar)

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queue a request that passes ``check``, with its ``constraint_for``."""
        self.check(request)
        self.scheduler.add(request)
        if constraint is not None:
            self.sampler.constrain(request.request_id, constraint)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Cancel a request between steps; None when it has already ended."""
        self.sampler.forget(request_id)
        self._interrupted.discard(request_id)
        return self.scheduler.abort(request_id)

    def fail_all(self, error: str) -> list[RequestOutput]:
        """Drop every request, after a failure that is nobody's in particular."""
        outputs = [self.scheduler.fail(request_id, error) for request_id in self.scheduler.request_ids()]
        for output in outputs:
            if output is not None:
                self.sampler.forget(output.request_id)
        return [output for output in outputs if output is not None]

    def interrupt(self, request_id: str) -> None:
        """From any thread: the request is about to be aborted. A running step that mostly serves such requests ends
        between two layers; what it computed for the others is computed again."""
        self._interrupted.add(request_id)

    def step(self) -> list[RequestOutput]:
        """Compute one batch and report on each of its requests; an empty list when there is nothing to do, or when the
        step was interrupted. A request whose computation raises is reported with ``FinishReason.ERROR``."""
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        start_s = time.perf_counter()
        self._step_tokens = {item.request.request_id: len(item.token_ids) for item in batch.requests}
        try:
            outputs = self._run(batch)
        except StepCancelled:
            return []
        finally:
            self._step_tokens = {}
        self.rates.add(start_s, time.perf_counter(), batch)
        for output in outputs:
            if output.finish_reason is not None:
                self.sampler.forget(output.request_id)
        return outputs

    def _run(self, batch: Batch) -> list[RequestOutput]:
        try:
            logits = self.runner.run(batch, self._is_cancelled)
        except StepCancelled:
            raise
        except Exception as error:
            known = isinstance(error, GlmlocalError)  # a fault of the disk, say: no bug of ours
            log.error("a step of %d requests failed: %s", len(batch.requests), error, exc_info=not known)
            return [output for item in batch.requests if (output := self._fail(item, error)) is not None]
        scored, logits = _scored(batch, logits)
        sampled, failed = self._sample(logits, [item for item in batch.requests if item.needs_sample])
        return [*self.scheduler.update(batch, sampled, scored), *failed]

    def _sample(
        self, logits: Tensor, items: Sequence[ScheduledRequest]
    ) -> tuple[dict[str, SampledToken], list[RequestOutput]]:
        """logits fp32 [items, vocab] → a token of each, and the ends of those for which that failed."""
        tokens = self.sampler.greedy(logits, items)
        if tokens is not None:
            return {item.request.request_id: token for item, token in zip(items, tokens, strict=True)}, []
        sampled: dict[str, SampledToken] = {}
        failed: list[RequestOutput] = []
        for row, item in zip(logits, items, strict=True):
            try:
                sampled[item.request.request_id] = self.sampler.sample(row, item)
            except Exception as error:
                log.exception("choosing a token for request %s failed", item.request.request_id)
                output = self._fail(item, error)
                failed += [] if output is None else [output]
        return sampled, failed

    def _fail(self, item: ScheduledRequest, error: Exception) -> RequestOutput | None:
        message = str(error).strip() or type(error).__name__
        return self.scheduler.fail(item.request.request_id, f"computing the answer failed: {message}"[:500])

    def _is_cancelled(self) -> bool:
        if not self._interrupted:
            return False
        tokens = self._step_tokens
        unwanted = sum(tokens.get(request_id, 0) for request_id in tuple(self._interrupted))
        return 2 * unwanted > sum(tokens.values())

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
                item = ScheduledRequest(request, chunk, start, blocks, (), needs_sample=False)
                out[start : start + len(chunk)] = self.runner.run_all_logits(Batch((item,)))
            return out
        finally:
            pool.free(blocks)


def _scored(batch: Batch, logits: Tensor) -> tuple[dict[str, tuple[TokenLogprob, ...]], Tensor]:
    """logits fp32 [sum of num_logits, vocab] → how likely prompts were, and the rows that choose a token."""
    if not any(item.needs_all_logits for item in batch.requests):
        return {}, logits
    scored, chosen, end = {}, [], 0
    for item in batch.requests:
        start, end = end, end + item.num_logits
        if item.needs_all_logits:
            scored[item.request.request_id] = prompt_logprobs(logits[start:end], item)
        if item.needs_sample:
            chosen.append(end - 1)
    return scored, logits[chosen]


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for the first id that is not an integer of 0 … vocab_size - 1."""
    if not token_ids or (set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return  # 100,000 of them in 3 ms
    for position, token in enumerate(token_ids):
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"token {position} is {token!r}, wanted an integer from 0 to {vocab_size - 1} (the vocabulary)"
            )
