"""Scheduler: which tokens of which requests the next step computes. Torch-free; a Batch is plain ints.

There are no phases. Every request knows some tokens and has computed some of them; a step closes that gap as far as
the token budget and the free KV blocks allow. Prefill, chunked prefill, decode and what a prefix cache saves are the
same subtraction.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from glmlocal.engine.batch import Batch, SampledToken, ScheduledRequest, prefill_shares
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from glmlocal.engine.sequence import Sequence
from glmlocal.engine.waiting import WaitingQueue
from glmlocal.errors import RequestError

SCORED_CHUNK = 64  # tokens of a prompt per step whose logits are all wanted: 40 MB of GLM's vocabulary
CHUNK_BESIDE_DECODE = 256  # prompt tokens per step while others decode; benchmarks/serve_engine.py measures it


class Restore(Protocol):
    """Blocks that another thread is filling from the disk."""

    @property
    def is_done(self) -> bool: ...

    @property
    def num_restored(self) -> int:
        """Of the blocks, in order: how many are right. Final once it is done."""
        ...

    def cancel(self) -> None:
        """Ask it to end soon; the blocks are its own until it is done."""
        ...


class BlockStore(Protocol):
    """KV blocks on disk, by name."""

    def num_stored(self, names: collections.abc.Sequence[bytes]) -> int:
        """How many of the first of these are there."""
        ...

    def restore(self, names: collections.abc.Sequence[bytes], blocks: collections.abc.Sequence[int]) -> Restore: ...


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Only the scheduler counts; reading one is safe from any thread."""

    num_queried_tokens: int = 0  # prompt tokens of the requests admitted
    num_hit_tokens: int = 0  # of these, found in the prefix cache
    num_restored_tokens: int = 0  # of these, read from the disk
    num_preempted: int = 0


class Scheduler:
    """Owns the waiting and running requests and their KV blocks.

    Invariants: a request is in one queue; only running requests hold blocks; when none is left all blocks are free.
    When blocks run out the youngest running request is preempted: it loses its blocks and is recomputed later, but for
    what the prefix cache still has of it.
    """

    def __init__(self, block_pool: BlockPool, *, context: int, max_batch: int, max_num_batched_tokens: int) -> None:
        self.block_pool = block_pool
        self.context, self.max_batch, self.max_num_batched_tokens = context, max_batch, max_num_batched_tokens
        self.chunk_beside_decode = CHUNK_BESIDE_DECODE
        self.store: BlockStore | None = None
        self.min_stored_tokens = 0  # prefixes of at least that many are marked as long
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._by_id: dict[str, Sequence] = {}
        self._restores: dict[Sequence, tuple[Restore, list[int], list[bytes]]] = {}  # with blocks and their names
        self._abandoned: list[tuple[Restore, list[int]]] = []  # of requests that are gone, while a thread writes there

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._abandoned or len(self.waiting))

    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._by_id)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that can never run. Safe from any thread."""
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty: wanted at least one token")
        if num_prompt_tokens >= self.context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens but the context holds {self.context}, the answer included; "
                "shorten it or start with a larger --context"
            )
        if request.request_id in self._by_id:
            raise RequestError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> None:
        """Queue a request that passes ``check``."""
        self.check(request)
        sequence = Sequence(request, list(request.prompt_token_ids))
        self._by_id[request.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Drop a request and free its blocks; None when it is not here (any more)."""
        return self._drop(request_id, FinishReason.ABORT, None)

    def fail(self, request_id: str, error: str) -> RequestOutput | None:
        """Drop a request that could not be computed."""
        return self._drop(request_id, FinishReason.ERROR, error)

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is nothing to do (yet: blocks may be on their way from the disk).

        Running requests that decode go first, oldest first; then prompts share what is left of the budget, or less of
        it, so that those that decode do not wait long for this step.
        """
        self._collect_restores()
        budget = self.max_num_batched_tokens
        scheduled: dict[Sequence, ScheduledRequest] = {}
        decoding = [each for each in self.running if self._is_ready(each) and each.num_missing_tokens == 1]
        for sequence in decoding:
            if budget and sequence in self.running and self._reserve(sequence, 1, scheduled):
                scheduled[sequence] = _take(sequence, 1)
                budget -= 1
        if scheduled:
            budget = min(budget, self.chunk_beside_decode)
        if budget:
            self._admit()
            prompts = self._prompts(decoding)
            shares = prefill_shares([_chunk(each) for each in prompts], budget, self.block_pool.block_size)
            for sequence, share in zip(prompts, shares, strict=True):
                if share and sequence in self.running and self._reserve(sequence, share, scheduled):
                    scheduled[sequence] = _take(sequence, share)
        return Batch(tuple(scheduled.values())) if scheduled else None

    def update(
        self,
        batch: Batch,
        sampled: Mapping[str, SampledToken],
        scored: Mapping[str, tuple[TokenLogprob, ...]] = MappingProxyType({}),
    ) -> list[RequestOutput]:
        """Record what a step computed and chose; finished requests leave and free their blocks. ``scored``: logprobs of
        the prompt tokens after those that were computed."""
        outputs = []
        for scheduled in batch.requests:
            sequence = self._by_id.get(scheduled.request.request_id)
            if sequence is None or sequence.request is not scheduled.request:
                continue  # aborted while the step ran
            self._computed(sequence, len(scheduled.token_ids))
            token = sampled.get(scheduled.request.request_id)
            scores = _news(sequence, scheduled.start, scored.get(scheduled.request.request_id, ()))
            if token is None:
                is_over = scheduled.request.params.max_tokens == 0 and sequence.num_missing_tokens == 0
                finish_reason, stop_token_id = FinishReason.LENGTH if is_over else None, None
            else:
                sequence.token_ids.append(token.token_id)
                finish_reason, stop_token_id = self._finish(sequence, token)
            if finish_reason is not None:
                self._leave(sequence)
            tokens = () if token is None else (token,)
            outputs.append(_output(sequence, tokens, finish_reason, stop_token_id, prompt_logprobs=scores))
        return outputs

    def check_integrity(self) -> None:
        """Assert the invariants; cheap enough for tests to call after every step."""
        pool = self.block_pool
        held: dict[int, int] = {}
        for blocks in (*(each.block_ids for each in self.running), *(blocks for _, blocks in self._abandoned)):
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        assert all(pool.find(pool.name(block) or b"") == block for block, n in held.items() if n > 1), "a shared block"
        assert held == pool.holders(), "blocks leaked, or are held by others than the pool believes"
        assert len(held) + pool.num_free_blocks == pool.num_blocks, "blocks leaked"
        assert not any(sequence.block_ids for sequence in self.waiting), "a waiting request holds blocks"
        assert len(self._by_id) == len(self.running) + len(self.waiting), "a request is in no queue, or in two"

    # --- admission

    def _admit(self) -> None:
        while len(self.waiting) and len(self.running) < self.max_batch:
            sequence = self.waiting.first()
            if not self._has_room(sequence):
                return  # nobody overtakes the one that waits for blocks
            self.running.append(self.waiting.pop_first())
            if not sequence.was_preempted:
                self.counters.num_queried_tokens += len(sequence.request.prompt_token_ids)
            self._adopt(sequence)
            self._start_restore(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Are there blocks for all its tokens beside those that the prompts admitted before it still need?"""
        pool = self.block_pool
        if not self.running:
            return True
        wanted, size = pool.blocks_for(len(sequence.token_ids)), pool.block_size
        for index in range((len(sequence.token_ids) - 1) // size if sequence.uses_cache else 0):
            block = pool.find(sequence.block_name(index, size))
            if block is None:
                break
            wanted -= pool.is_held(block)  # a cached block that nobody holds takes one of the free ones
        promised = sum(max(0, pool.blocks_for(len(each.token_ids)) - len(each.block_ids)) for each in self.running)
        return wanted + promised <= pool.num_free_blocks

    def _prompts(self, decoding: collections.abc.Sequence[Sequence]) -> list[Sequence]:
        """Those with a gap to close, oldest first, without the ones whose next block another is computing right now:
        they take it over in the next step."""
        prompts, being_computed = [], set()
        for sequence in self.running:
            if sequence in decoding or not self._is_ready(sequence):
                continue
            self._adopt(sequence)
            name = sequence.next_name(self.block_pool.block_size)
            if name is None or name not in being_computed:
                prompts.append(sequence)
            being_computed.add(name)
        return prompts

    def _adopt(self, sequence: Sequence) -> None:
        """Share cached blocks for as long as there is one of the next block's name."""
        pool, size = self.block_pool, self.block_pool.block_size
        while sequence.num_computed_tokens % size == 0 and (name := sequence.next_name(size)) is not None:
            block = pool.find(name)
            if block is None:
                return
            pool.share(block)
            index = sequence.num_computed_tokens // size
            if index < len(sequence.block_ids):  # it was given one, to compute this itself
                pool.free([sequence.block_ids[index]])
                sequence.block_ids[index] = block
            else:
                sequence.block_ids.append(block)
            sequence.num_computed_tokens += size
            self._count_hit(sequence, size)

    def _count_hit(self, sequence: Sequence, num_tokens: int) -> None:
        if not sequence.was_preempted and sequence.num_computed_tokens <= len(sequence.request.prompt_token_ids):
            sequence.num_cached_tokens += num_tokens
            self.counters.num_hit_tokens += num_tokens

    # --- blocks on disk

    def _is_ready(self, sequence: Sequence) -> bool:
        return sequence not in self._restores

    def _start_restore(self, sequence: Sequence) -> None:
        """Have the blocks that follow read from the disk, where they are there and memory has them not."""
        if self.store is None or not sequence.uses_cache:
            return
        size, first = self.block_pool.block_size, len(sequence.block_ids)
        names = [sequence.block_name(i, size) for i in range(first, (len(sequence.token_ids) - 1) // size)]
        names = names[: self.store.num_stored(names)]
        if not names or any(names[0] == others[0] for _, _, others in self._restores.values()):
            return  # another request reads the same: what it brings is adopted
        blocks = self.block_pool.allocate(len(names))
        if blocks is not None:
            sequence.block_ids += blocks
            self._restores[sequence] = self.store.restore(names, blocks), blocks, names

    def _collect_restores(self) -> None:
        size = self.block_pool.block_size
        for sequence, (restore, blocks, names) in list(self._restores.items()):
            if restore.is_done:
                del self._restores[sequence]
                for block, name in list(zip(blocks, names, strict=True))[: restore.num_restored]:
                    self.block_pool.register(block, name)
                    sequence.num_computed_tokens += size
                    self.counters.num_restored_tokens += size
                    self._count_hit(sequence, size)
        for restore, blocks in [each for each in self._abandoned if each[0].is_done]:
            self._abandoned.remove((restore, blocks))
            self.block_pool.free(blocks)

    # --- blocks

    def _reserve(self, sequence: Sequence, num_new: int, scheduled: Mapping[Sequence, object]) -> bool:
        """``_grow``, taking blocks from the youngest request that is not in this step while there are too few; False
        if that was this one."""
        while not self._grow(sequence, num_new):
            youngest = next(each for each in reversed(self.running) if each not in scheduled and self._is_ready(each))
            self._release(youngest)
            self.running.remove(youngest)
            youngest.num_computed_tokens, youngest.was_preempted = 0, True
            self.counters.num_preempted += 1
            self.waiting.resume(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, num_new: int) -> bool:
        """Give the request the blocks that its next tokens need; False, changing nothing, when there are too few."""
        wanted = self.block_pool.blocks_for(sequence.num_computed_tokens + num_new) - len(sequence.block_ids)
        blocks = self.block_pool.allocate(max(0, wanted))
        if blocks is None:
            return False
        sequence.block_ids += blocks
        return True

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Full blocks get their names: from now on others share them."""
        size = self.block_pool.block_size
        full = sequence.num_computed_tokens // size
        sequence.num_computed_tokens += num_tokens
        for index in range(full, sequence.num_computed_tokens // size):
            self.block_pool.register(sequence.block_ids[index], sequence.block_name(index, size))

    def _release(self, sequence: Sequence) -> None:
        """Free its blocks, those that a thread is writing to when it is done."""
        if self.store is not None and sequence.num_computed_tokens >= self.min_stored_tokens:
            self.block_pool.mark_long(sequence.block_ids)
        blocks, sequence.block_ids = sequence.block_ids, []
        restored = self._restores.pop(sequence, None)
        if restored is not None:
            restore, being_written, _ = restored
            restore.cancel()
            self._abandoned.append((restore, being_written))
            blocks = blocks[: -len(being_written)]
        self.block_pool.free(blocks)

    # --- ends

    def _drop(self, request_id: str, reason: FinishReason, error: str | None) -> RequestOutput | None:
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._leave(sequence)
        return _output(sequence, (), reason, error=error)

    def _leave(self, sequence: Sequence) -> None:
        self._release(sequence)
        del self._by_id[sequence.request.request_id]
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _finish(self, sequence: Sequence, token: SampledToken) -> tuple[FinishReason | None, int | None]:
        """Why the request ends with this token, if it does, and the token if it is one that stops."""
        request, params, token_id = sequence.request, sequence.request.params, token.token_id
        if sequence.num_output_tokens >= params.min_tokens and (
            token_id in params.stop_token_ids or (token_id in request.eos_token_ids and not params.ignore_eos)
        ):
            return FinishReason.STOP, token_id
        if token.ends:
            return FinishReason.STOP, None
        full = len(sequence.token_ids) >= self.context
        if full or (params.max_tokens is not None and sequence.num_output_tokens >= params.max_tokens):
            return FinishReason.LENGTH, None
        return None, None


def _chunk(sequence: Sequence) -> int:
    """The most of its tokens that a step computes."""
    missing = sequence.num_missing_tokens
    return missing if sequence.uses_cache else min(missing, SCORED_CHUNK)


def _news(sequence: Sequence, start: int, scored: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
    """Of the logprobs of prompt tokens from ``start`` + 1 on, those that were not reported before a preemption."""
    news = scored[max(0, sequence.num_scored_tokens - start) :]
    sequence.num_scored_tokens += len(news)
    return news


def _take(sequence: Sequence, num_tokens: int) -> ScheduledRequest:
    start = sequence.num_computed_tokens
    request = sequence.request
    token_ids = tuple(sequence.token_ids[start : start + num_tokens])
    return ScheduledRequest(
        request,
        token_ids,
        start,
        sequence.block_ids,
        sequence.output_token_ids if request.params.looks_back else (),
        start + len(token_ids) == len(sequence.token_ids) and request.params.max_tokens != 0,
        not sequence.uses_cache and start + 1 < len(request.prompt_token_ids),
    )


def _output(
    sequence: Sequence,
    tokens: tuple[SampledToken, ...],
    finish_reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    error: str | None = None,
    prompt_logprobs: tuple[TokenLogprob, ...] = (),
) -> RequestOutput:
    return RequestOutput(
        sequence.request.request_id,
        tuple(token.token_id for token in tokens),
        len(sequence.request.prompt_token_ids),
        sequence.num_computed_tokens,
        finish_reason,
        stop_token_id,
        tuple(token.logprob for token in tokens if token.logprob is not None),
        sequence.num_cached_tokens,
        error,
        prompt_logprobs,
    )
