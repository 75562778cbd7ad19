from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmlocal.engine.batch import Batch, SampledToken
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.request import FinishReason, Request, SamplingParams
from glmlocal.engine.scheduler import Scheduler
from glmlocal.errors import RequestError

EOS = 9


def make(
    *, num_blocks: int = 16, block_size: int = 4, context: int = 32, max_batch: int = 4, budget: int = 8
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, block_size), context=context, max_batch=max_batch, max_num_batched_tokens=budget
    )


def request(name: str, num_tokens: int, **params: object) -> Request:
    first = 10 + 1000 * (sum(name.encode()) % 97)  # prompts of different names share no prefix
    return Request(name, tuple(range(first, first + num_tokens)), SamplingParams.from_dict(params), frozenset({EOS}))


def finish(scheduler: Scheduler, batch: Batch, token: int = 7) -> dict[str, FinishReason | None]:
    sampled = {item.request.request_id: SampledToken(token) for item in batch.requests if item.needs_sample}
    return {out.request_id: out.finish_reason for out in scheduler.update(batch, sampled)}


def test_prompt_is_computed_in_chunks_of_the_budget_and_sampled_once_at_its_end() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("a", 19, max_tokens=2))
    spans = []
    while (batch := scheduler.schedule()) is not None:
        (item,) = batch.requests
        spans.append((item.start, len(item.token_ids), item.needs_sample))
        finish(scheduler, batch)
        scheduler.check_integrity()
    assert spans == [(0, 8, False), (8, 8, False), (16, 3, True), (19, 1, True)]
    assert scheduler.block_pool.num_free_blocks == 16


def test_decode_goes_before_the_prefill_of_newcomers() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("a", 4))
    finish(scheduler, scheduler.schedule())
    scheduler.add(request("b", 20))
    batch = scheduler.schedule()
    assert [(item.request.request_id, len(item.token_ids)) for item in batch.requests] == [("a", 1), ("b", 7)]


def test_max_batch_limits_the_running_requests() -> None:
    scheduler = make(max_batch=2, budget=100)
    for name in "abc":
        scheduler.add(request(name, 2))
    assert [item.request.request_id for item in scheduler.schedule().requests] == ["a", "b"]
    assert len(scheduler.waiting) == 1


def test_stop_token_eos_length_and_context_end_a_request() -> None:
    scheduler = make(budget=100, context=12, num_blocks=32)
    scheduler.add(request("eos", 3))
    scheduler.add(request("ignores", 3, ignore_eos=True, max_tokens=1))
    scheduler.add(request("stop", 3, stop_token_ids=[EOS], ignore_eos=True))
    scheduler.add(request("min", 3, min_tokens=2))
    assert finish(scheduler, scheduler.schedule(), EOS) == {
        "eos": FinishReason.STOP,
        "ignores": FinishReason.LENGTH,
        "stop": FinishReason.STOP,
        "min": None,
    }
    scheduler.abort("min")
    scheduler.add(request("full", 11))
    assert finish(scheduler, scheduler.schedule()) == {"full": FinishReason.LENGTH}
    assert scheduler.block_pool.num_free_blocks == 32


def test_the_youngest_is_preempted_and_recomputed_when_blocks_run_out() -> None:
    scheduler = make(num_blocks=4, block_size=4, context=16, budget=100)
    scheduler.add(request("old", 8))
    scheduler.add(request("young", 8))
    finish(scheduler, scheduler.schedule())
    batch = scheduler.schedule()  # both want a third block, none is left
    assert [item.request.request_id for item in batch.requests] == ["old"]
    finish(scheduler, batch)
    scheduler.check_integrity()
    scheduler.abort("old")
    (item,) = scheduler.schedule().requests
    # The prefix cache still has its first block; the second went to the old one. Prompt and its first output:
    assert (item.request.request_id, item.start, item.token_ids[-1], len(item.token_ids)) == ("young", 4, 7, 5)


def test_abort_frees_blocks_while_waiting_and_while_running() -> None:
    scheduler = make(max_batch=1)
    scheduler.add(request("running", 5))
    scheduler.add(request("waiting", 5))
    batch = scheduler.schedule()
    assert scheduler.abort("waiting").finish_reason is FinishReason.ABORT
    assert scheduler.abort("running").finish_reason is FinishReason.ABORT
    assert scheduler.abort("running") is None
    assert finish(scheduler, batch) == {}  # the step it was in reports nothing of it
    assert scheduler.block_pool.num_free_blocks == 16
    assert not scheduler.has_work


@pytest.mark.parametrize(("num_tokens", "words"), [(0, "empty"), (32, "32 tokens but the context holds 32")])
def test_impossible_requests_are_refused(num_tokens: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make().add(request("a", num_tokens))


def test_a_request_id_cannot_be_used_twice() -> None:
    scheduler = make()
    scheduler.add(request("a", 2))
    with pytest.raises(RequestError, match="already in use"):
        scheduler.add(request("a", 2))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 20)), min_size=1, max_size=8),
    num_blocks=st.integers(4, 12),
    budget=st.integers(1, 9),
    max_batch=st.integers(1, 4),
    aborts=st.sets(st.integers(0, 60), max_size=3),
)
def test_every_request_is_served_exactly_once_whatever_the_budget(
    lengths: list[tuple[int, int]], num_blocks: int, budget: int, max_batch: int, aborts: set[int]
) -> None:
    scheduler = make(num_blocks=num_blocks, block_size=4, context=16, max_batch=max_batch, budget=budget)
    for i, (num_tokens, max_tokens) in enumerate(lengths):
        scheduler.add(request(str(i), num_tokens, max_tokens=max_tokens))
    computed: dict[str, int] = {}
    ended: list[str] = []
    for step in range(2000):
        if step in aborts and scheduler.running:
            ended.append(scheduler.abort(scheduler.running[0].request.request_id).request_id)
        batch = scheduler.schedule()
        if batch is None:
            break
        assert 0 < batch.num_tokens <= budget
        assert len(batch.requests) <= max_batch
        for item in batch.requests:
            name = item.request.request_id
            # Continues; after preemption it starts again, at most where the cache ends.
            assert item.start == computed.get(name, 0) or (item.start % 4 == 0 and scheduler.counters.num_preempted)
            computed[name] = item.start + len(item.token_ids)
            assert len(item.block_ids) * 4 >= computed[name]
        ended += [name for name, reason in finish(scheduler, batch).items() if reason]
        scheduler.check_integrity()
    assert sorted(ended) == sorted(str(i) for i in range(len(lengths)))
    assert scheduler.block_pool.num_free_blocks == num_blocks


def test_freeing_a_block_twice_is_an_error() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    assert pool.allocate(3) is None
    assert pool.num_free_blocks == 2
    pool.free(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.free(blocks)
