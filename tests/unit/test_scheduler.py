from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmlocal.engine.batch import Batch, SampledToken, prefill_shares
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.request import FinishReason, Request, SamplingParams, TokenLogprob
from glmlocal.engine.scheduler import SCORED_CHUNK, Scheduler
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
    # It is counted once, and what it finds again of its own was not cached before it came:
    counters = scheduler.counters
    assert (counters.num_preempted, counters.num_queried_tokens, counters.num_hit_tokens) == (1, 16, 0)
    (output,) = scheduler.update(Batch((item,)), {"young": SampledToken(7)})
    assert output.num_cached_tokens == 0


def test_min_tokens_are_enough_when_they_are_there() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, min_tokens=2))
    assert finish(scheduler, scheduler.schedule(), EOS) == {"a": None}
    assert finish(scheduler, scheduler.schedule(), EOS) == {"a": FinishReason.STOP}


def test_cached_blocks_that_nobody_holds_are_no_room_beside_the_free_ones() -> None:
    scheduler = make(num_blocks=4, block_size=4, context=16, budget=100)
    scheduler.add(request("a", 8, max_tokens=1))
    finish(scheduler, scheduler.schedule())  # two blocks are cached and free
    scheduler.add(request("b", 6))
    finish(scheduler, scheduler.schedule())
    scheduler.add(Request("c", (*request("a", 8).prompt_token_ids, 1), SamplingParams(), frozenset({EOS})))
    batch = scheduler.schedule()  # c needs three blocks, and two are free, whatever they hold
    assert [item.request.request_id for item in batch.requests] == ["b"]
    assert (len(scheduler.waiting), scheduler.counters.num_preempted) == (1, 0)


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


def prompt(name: str, token_ids: list[int], client_id: str = "", **params: object) -> Request:
    return Request(name, tuple(token_ids), SamplingParams.from_dict(params), frozenset({EOS}), client_id)


def spans(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(item.request.request_id, item.start, len(item.token_ids)) for item in batch.requests]


def run(scheduler: Scheduler) -> list[list[tuple[str, int, int]]]:
    """Every step until nothing is left."""
    steps = []
    while (batch := scheduler.schedule()) is not None:
        steps.append(spans(batch))
        finish(scheduler, batch)
        scheduler.check_integrity()
    return steps


def test_a_prompt_that_was_seen_is_computed_from_its_first_new_block_on() -> None:
    scheduler = make(budget=100)
    tokens = list(range(100, 115))
    scheduler.add(prompt("first", tokens, max_tokens=1))
    assert run(scheduler) == [[("first", 0, 15)]]
    scheduler.add(prompt("same", tokens, max_tokens=1))
    scheduler.add(prompt("longer", [*tokens, 1, 2, 3], max_tokens=1))
    scheduler.add(prompt("differs", [*tokens[:5], 0, *tokens[6:]], max_tokens=1))
    assert run(scheduler) == [[("same", 12, 3), ("longer", 12, 6), ("differs", 4, 11)]]
    assert (scheduler.counters.num_queried_tokens, scheduler.counters.num_hit_tokens) == (15 + 15 + 18 + 15, 28)


def test_the_block_with_the_last_token_is_always_computed() -> None:
    scheduler = make(budget=100)
    for name in "ab":
        scheduler.add(prompt(name, list(range(100, 108)), max_tokens=1))
        steps = run(scheduler)
    assert steps == [[("b", 4, 4)]]


def test_the_answer_is_cached_too_so_that_the_next_turn_of_a_chat_hits() -> None:
    scheduler = make(budget=100)
    scheduler.add(prompt("turn 1", [1, 2, 3], max_tokens=10))
    run(scheduler)
    scheduler.add(prompt("turn 2", [1, 2, 3, *[7] * 10, 4, 5], max_tokens=1))
    batch = scheduler.schedule()
    assert spans(batch) == [("turn 2", 12, 3)]
    (output,) = scheduler.update(batch, {"turn 2": SampledToken(7)})
    assert output.num_cached_tokens == 12


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    scheduler = make(budget=8)
    tokens = list(range(100, 118))
    for name in "abc":
        scheduler.add(prompt(name, tokens, max_tokens=1))
    steps = run(scheduler)
    assert sum(length for step in steps for _, _, length in step) == 18 + 2 + 2  # the last two are each one's own
    assert steps[:2] == [[("a", 0, 8)], [("a", 8, 8)]]


def test_prompts_get_a_smaller_chunk_while_others_decode() -> None:
    scheduler = make(budget=16, num_blocks=32, context=64)
    scheduler.chunk_beside_decode = 4
    scheduler.add(prompt("stream", [1, 2], max_tokens=3))
    finish(scheduler, scheduler.schedule())
    scheduler.add(prompt("long", list(range(100, 130)), max_tokens=1))
    assert run(scheduler) == [
        [("stream", 2, 1), ("long", 0, 4)],
        [("stream", 3, 1), ("long", 4, 4)],
        [("long", 8, 16)],
        [("long", 24, 6)],
    ]


def test_prompts_share_the_budget_and_short_ones_leave_theirs_to_the_others() -> None:
    assert prefill_shares([100, 100], 10, 4) == [5, 5]
    assert prefill_shares([100, 3, 100], 15, 4) == [6, 3, 6]
    assert prefill_shares([2, 3], 100, 4) == [2, 3]
    assert prefill_shares([100, 100, 100], 8, 4) == [4, 4, 0]  # no share below 4: the oldest two
    assert prefill_shares([100, 1], 3, 4) == [3, 0]
    assert prefill_shares([], 8, 4) == []


def test_clients_take_turns_where_they_wait() -> None:
    scheduler = make(max_batch=1, budget=100, context=32)
    for i in range(3):
        scheduler.add(prompt(f"flood {i}", [i], "flood", max_tokens=1))
    scheduler.add(prompt("other 0", [1, 1], "other", max_tokens=1))
    scheduler.add(prompt("other 1", [2, 1], "other", max_tokens=1))
    order = [name for step in run(scheduler) for name, _, _ in step]
    assert order == ["flood 0", "other 0", "flood 1", "other 1", "flood 2"]


def test_a_newcomer_waits_until_its_whole_prompt_has_room_beside_those_that_run() -> None:
    scheduler = make(num_blocks=6, block_size=4, context=24, budget=4)
    scheduler.add(prompt("first", list(range(100, 116)), max_tokens=1))  # four blocks, one after the other
    finish(scheduler, scheduler.schedule())
    scheduler.add(prompt("second", list(range(200, 212)), max_tokens=1))  # three: too many
    finish(scheduler, scheduler.schedule())
    assert len(scheduler.waiting) == 1
    steps = run(scheduler)
    assert [name for step in steps for name, _, _ in step] == ["first"] * 2 + ["second"] * 3
    assert scheduler.counters.num_preempted == 0


class Store:
    """Blocks on a disk that a test plays."""

    class Job:
        def __init__(self, blocks: list[int]) -> None:
            self.blocks, self.is_done, self.num_restored, self.is_cancelled = blocks, False, 0, False

        def cancel(self) -> None:
            self.is_cancelled = True

    def __init__(self, limit: int) -> None:
        self.limit, self.jobs = limit, []

    def num_stored(self, names: list[bytes]) -> int:
        return min(self.limit, len(names))

    def restore(self, names: list[bytes], blocks: list[int]) -> Store.Job:
        self.jobs.append(Store.Job(list(blocks)))
        return self.jobs[-1]


def test_blocks_from_the_disk_are_not_computed_and_nobody_waits_for_them() -> None:
    scheduler = make(budget=100)
    scheduler.store = store = Store(3)
    scheduler.add(prompt("stored", list(range(100, 118)), max_tokens=1))
    assert scheduler.schedule() is None  # it is being read
    store.limit = 0
    scheduler.add(prompt("other", [1, 2, 3], max_tokens=2))
    batch = scheduler.schedule()
    assert spans(batch) == [("other", 0, 3)]
    finish(scheduler, batch)
    scheduler.check_integrity()
    (job,) = store.jobs
    job.num_restored, job.is_done = 2, True  # the third was damaged
    batch = scheduler.schedule()
    assert spans(batch) == [("other", 3, 1), ("stored", 8, 10)]
    assert list(batch.requests[1].block_ids)[:2] == job.blocks[:2]
    outputs = scheduler.update(batch, {"other": SampledToken(7), "stored": SampledToken(7)})
    assert [output.num_cached_tokens for output in outputs] == [0, 8]
    scheduler.check_integrity()
    assert scheduler.block_pool.num_free_blocks == 16
    assert scheduler.counters.num_restored_tokens == 8


def test_equal_prompts_are_read_from_the_disk_once() -> None:
    scheduler = make(budget=100)
    scheduler.store = store = Store(4)
    for name in "ab":
        scheduler.add(prompt(name, list(range(100, 118)), max_tokens=1))
    scheduler.schedule()
    assert len(store.jobs) == 1
    store.jobs[0].num_restored, store.jobs[0].is_done = 4, True
    steps = run(scheduler)
    assert steps[-1][-1][1] == 16


def test_blocks_that_a_thread_writes_to_are_free_only_when_it_is_done() -> None:
    scheduler = make(budget=100)
    scheduler.store = store = Store(3)
    scheduler.add(prompt("a", list(range(100, 118)), max_tokens=1))
    scheduler.schedule()
    scheduler.abort("a")
    (job,) = store.jobs
    assert job.is_cancelled
    assert scheduler.has_work
    assert scheduler.block_pool.num_free_blocks == 13
    scheduler.check_integrity()
    job.is_done = True
    assert scheduler.schedule() is None
    assert not scheduler.has_work
    assert scheduler.block_pool.num_free_blocks == 16


def scored(batch: Batch) -> dict[str, tuple[TokenLogprob, ...]]:
    """What an engine would say of the prompt tokens after those that were computed."""
    found = {}
    for item in batch.requests:
        if item.needs_all_logits:
            following = item.request.prompt_token_ids[item.start + 1 : item.start + 1 + item.num_logits]
            found[item.request.request_id] = tuple(TokenLogprob(token, -1.0) for token in following)
    return found


def test_logprobs_of_a_prompt_are_reported_once_although_it_is_computed_twice() -> None:
    scheduler = make(num_blocks=4, block_size=4, context=16, budget=100)
    young = request("young", 8, prompt_logprobs=0)
    scheduler.add(request("old", 8))
    scheduler.add(young)
    reported: list[int] = []
    batch = scheduler.schedule()
    assert batch is not None
    assert [(item.num_logits, item.needs_all_logits) for item in batch.requests] == [(1, False), (8, True)]
    sampled = {"old": SampledToken(7), "young": SampledToken(7)}
    for output in scheduler.update(batch, sampled, scored(batch)):
        reported += [entry.token_id for entry in output.prompt_logprobs]
    finish(scheduler, scheduler.schedule())  # preempts the young one
    scheduler.abort("old")
    batch = scheduler.schedule()
    assert batch is not None
    (item,) = batch.requests
    assert (item.start, len(item.token_ids), item.needs_all_logits) == (0, 9, True), "nothing is taken from the cache"
    (output,) = scheduler.update(batch, {"young": SampledToken(7)}, scored(batch))
    assert output.prompt_logprobs == ()
    assert reported == list(young.prompt_token_ids[1:])
    (item,) = scheduler.schedule().requests  # type: ignore[union-attr]
    assert (item.num_logits, item.needs_all_logits) == (1, False)


def test_a_prompt_that_is_scored_goes_in_small_chunks_and_may_have_no_answer() -> None:
    scheduler = make(num_blocks=100, context=400, budget=300)
    scheduler.add(request("seen", 150, max_tokens=1))
    run(scheduler)
    for name in ("a", "b"):  # equal prompts, of which neither waits for the other, nor takes what is cached
        scheduler.add(
            Request(name, request("seen", 150).prompt_token_ids, SamplingParams(max_tokens=0, prompt_logprobs=1))
        )
    sizes, ends = [], []
    while (batch := scheduler.schedule()) is not None:
        sizes.append([(item.request.request_id, item.start, len(item.token_ids)) for item in batch.requests])
        assert not any(item.needs_sample for item in batch.requests)
        ends += [output.finish_reason for output in scheduler.update(batch, {}, scored(batch)) if output.finish_reason]
        scheduler.check_integrity()
    assert sizes == [
        [(name, start, size) for name in ("a", "b")]
        for start, size in ((0, SCORED_CHUNK), (64, SCORED_CHUNK), (128, 22))
    ]
    assert ends == [FinishReason.LENGTH] * 2
    assert scheduler.block_pool.num_free_blocks == 100
