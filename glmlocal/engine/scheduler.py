"""Scheduler: which tokens of which requests the next step computes. Torch-free; a Batch is plain ints.

There are no phases. Every request knows some tokens and has computed some of them; a step closes that gap as far as
the token budget and the free KV blocks allow. Prefill, chunked prefill and decode are the same subtraction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from glmlocal.errors import RequestError


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """The part of one request that a step computes."""

    request: Request
    token_ids: tuple[int, ...]  # to compute now
    start: int  # position of the first of them = num_computed_tokens before this step
    block_ids: tuple[int, ...]  # all blocks of the request, in order
    output_token_ids: tuple[int, ...]  # generated so far, for the penalties
    needs_sample: bool  # the last token known is among token_ids, so its logits choose the next one


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: at least one request, at least one token."""

    requests: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(scheduled.token_ids) for scheduled in self.requests)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The sampler's choice for one request."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class _Sequence:
    """A request in flight. Only the scheduler changes it."""

    request: Request
    token_ids: list[int]  # prompt and output
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.prompt_token_ids) :])


class Scheduler:
    """Owns the waiting and running requests and their KV blocks.

    Invariants: a request is in one queue; only running requests hold blocks; when none is left all blocks are free.
    When blocks run out the youngest running request is preempted: it loses its blocks and is recomputed later.
    """

    def __init__(self, block_pool: BlockPool, *, context: int, max_batch: int, max_num_batched_tokens: int) -> None:
        self.block_pool = block_pool
        self.context, self.max_batch, self.max_num_batched_tokens = context, max_batch, max_num_batched_tokens
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that can never run."""
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty: wanted at least one token")
        if num_prompt_tokens >= self.context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens but the context holds {self.context}, the answer included; "
                "shorten it or start with a larger --context"
            )
        if any(sequence.request.request_id == request.request_id for sequence in (*self.waiting, *self.running)):
            raise RequestError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> None:
        """Queue a request that passes ``check``."""
        self.check(request)
        self.waiting.append(_Sequence(request, list(request.prompt_token_ids)))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Drop a request and free its blocks; None when it is not here (any more)."""
        for sequence in (*self.waiting, *self.running):
            if sequence.request.request_id == request_id:
                self._remove(sequence)
                return self._output(sequence, (), FinishReason.ABORT)
        return None

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is nothing to do. Running requests go first, oldest first."""
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledRequest] = []
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence in self.running and self._reserve(sequence, budget):
                scheduled.append(self._take(sequence, budget))
                budget -= len(scheduled[-1].token_ids)
        while self.waiting and budget and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            if not self._grow(sequence, budget):
                break  # first come, first served: nobody overtakes the one that waits for blocks
            self.running.append(self.waiting.popleft())
            scheduled.append(self._take(sequence, budget))
            budget -= len(scheduled[-1].token_ids)
        return Batch(tuple(scheduled)) if scheduled else None

    def update(self, batch: Batch, sampled: Mapping[str, SampledToken]) -> list[RequestOutput]:
        """Record what a step computed and chose; finished requests leave and free their blocks."""
        by_id = {sequence.request.request_id: sequence for sequence in self.running}
        outputs = []
        for scheduled in batch.requests:
            sequence = by_id.get(scheduled.request.request_id)
            if sequence is None:
                continue  # aborted while the step ran
            sequence.num_computed_tokens += len(scheduled.token_ids)
            token = sampled.get(scheduled.request.request_id)
            if token is None:
                outputs.append(self._output(sequence, ()))
                continue
            sequence.token_ids.append(token.token_id)
            finish_reason = self._finish_reason(sequence, token.token_id)
            if finish_reason is not None:
                self._remove(sequence)
            outputs.append(self._output(sequence, (token,), finish_reason))
        return outputs

    def check_integrity(self) -> None:
        """Assert the invariants; cheap enough for tests to call after every step."""
        held = [block for sequence in self.running for block in sequence.block_ids]
        assert len(held) == len(set(held)), "a block has two owners"
        assert len(held) + self.block_pool.num_free_blocks == self.block_pool.num_blocks, "blocks leaked"
        assert not any(sequence.block_ids for sequence in self.waiting), "a waiting request holds blocks"

    def _grow(self, sequence: _Sequence, budget: int) -> bool:
        """Give the request the blocks that its next tokens need; False, changing nothing, when there are too few."""
        num_new = min(budget, len(sequence.token_ids) - sequence.num_computed_tokens)
        wanted = self.block_pool.blocks_for(sequence.num_computed_tokens + num_new) - len(sequence.block_ids)
        blocks = self.block_pool.allocate(max(0, wanted))
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        return True

    def _reserve(self, sequence: _Sequence, budget: int) -> bool:
        """``_grow``, taking blocks from the youngest request while there are too few; False if that was this one."""
        while not self._grow(sequence, budget):
            youngest = self.running[-1]
            self._remove(youngest)
            youngest.num_computed_tokens = 0
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _take(self, sequence: _Sequence, budget: int) -> ScheduledRequest:
        start = sequence.num_computed_tokens
        token_ids = tuple(sequence.token_ids[start : start + budget])
        return ScheduledRequest(
            sequence.request,
            token_ids,
            start,
            tuple(sequence.block_ids),
            sequence.output_token_ids,
            start + len(token_ids) == len(sequence.token_ids),
        )

    def _remove(self, sequence: _Sequence) -> None:
        self.block_pool.free(sequence.block_ids)
        sequence.block_ids = []
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _finish_reason(self, sequence: _Sequence, token_id: int) -> FinishReason | None:
        request, params = sequence.request, sequence.request.params
        num_output_tokens = len(sequence.token_ids) - len(request.prompt_token_ids)
        if num_output_tokens >= params.min_tokens and (
            token_id in params.stop_token_ids or (token_id in request.eos_token_ids and not params.ignore_eos)
        ):
            return FinishReason.STOP
        full = len(sequence.token_ids) >= self.context
        if full or (params.max_tokens is not None and num_output_tokens >= params.max_tokens):
            return FinishReason.LENGTH
        return None

    def _output(
        self, sequence: _Sequence, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None = None
    ) -> RequestOutput:
        return RequestOutput(
            sequence.request.request_id,
            tuple(token.token_id for token in tokens),
            len(sequence.request.prompt_token_ids),
            sequence.num_computed_tokens,
            finish_reason,
            tokens[-1].token_id if tokens and finish_reason is FinishReason.STOP else None,
            tuple(token.logprob for token in tokens if token.logprob is not None),
        )
