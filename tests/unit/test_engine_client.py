from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_client import Answer, answer, request, running, until
from glmlocal.engine.client import ClientOptions, LocalEngineClient
from glmlocal.engine.engine import Engine
from glmlocal.engine.request import FinishReason, Request
from glmlocal.errors import EngineError, QueueFull, RequestError
from glmlocal.formats.index import open_checkpoint
from loading import load_engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(**tiny.CONFIGS["glm45"]), tmp_path_factory.mktemp("client"))


@pytest.fixture
def engine(directory: Path) -> Engine:
    return load_engine(open_checkpoint(directory), context=256)


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(380), k=count)


def everything_is_free(engine: Engine) -> bool:
    engine.scheduler.check_integrity()
    pool = engine.scheduler.block_pool
    return pool.num_free_blocks == pool.num_blocks and not engine.has_work


class Gate:
    """Holds the engine's thread between two layers of a step, until opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.num_layers = 0
        run = engine.runner.run

        def gated(batch: Any, is_cancelled: Callable[[], bool]) -> torch.Tensor:
            def asked() -> bool:
                self.num_layers += 1
                if self.num_layers == 2:
                    self.reached.set()
                    assert self.opened.wait(60)
                return is_cancelled()

            return run(batch, asked)

        monkeypatch.setattr(engine.runner, "run", gated)


def test_eight_requests_at_odd_times_answer_as_each_alone(engine: Engine, directory: Path) -> None:
    prompts = {str(i): tokens(i, 1 + 23 * i) for i in range(8)}
    prompts["7"] = prompts["6"][:100] + tokens(7, 30)  # and one shares a prefix with another
    engine.scheduler.max_num_batched_tokens, engine.scheduler.chunk_beside_decode = 48, 20

    async def alone() -> dict[str, list[int]]:
        async with running(load_engine(open_checkpoint(directory), context=256)) as client:
            return {name: (await answer(client, request(name, ids))).token_ids for name, ids in prompts.items()}

    async def late(client: LocalEngineClient, name: str, delay_s: float) -> Answer:
        await asyncio.sleep(delay_s)
        return await answer(client, request(name, prompts[name]))

    async def together() -> dict[str, list[int]]:
        delays = random.Random(5)
        async with running(engine) as client:
            answers = await asyncio.gather(*(late(client, name, delays.uniform(0, 0.05)) for name in prompts))
        return {name: each.token_ids for name, each in zip(prompts, answers, strict=True)}

    assert asyncio.run(together()) == asyncio.run(alone())
    assert everything_is_free(engine)


def test_an_abort_between_two_layers_ends_the_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        gate = Gate(engine, monkeypatch)
        async with running(engine) as client:
            stream = client.submit(request("a", tokens(1, 100)))
            await asyncio.to_thread(gate.reached.wait, 60)
            client.abort("a")
            gate.opened.set()
            outputs = [output async for output in stream]
            assert [output.finish_reason for output in outputs] == [FinishReason.ABORT]
            assert outputs[0].num_computed_tokens == 0
            assert gate.num_layers == 2 < engine.runner.model.config.num_hidden_layers
            assert everything_is_free(engine)
            assert client.stats().num_aborted == 1

    asyncio.run(main())


def drive(engine: Engine, *wanted: Request) -> dict[str, list[int]]:
    """The engine's loop without a thread."""
    for each in wanted:
        engine.add(each)
    generated: dict[str, list[int]] = {each.request_id: [] for each in wanted}
    while engine.has_work:
        for output in engine.step():
            generated[output.request_id] += output.token_ids
        engine.scheduler.check_integrity()
    return generated


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_an_interrupted_step_changes_nothing_for_the_others_in_it(
    engine: Engine, directory: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    kept, dropped = request("kept", tokens(2, 40)), request("dropped", tokens(3, 100))
    expected = drive(load_engine(open_checkpoint(directory), context=256), kept)
    run, layers = engine.runner.run, itertools.count()

    def interrupting(batch: Any, is_cancelled: Callable[[], bool]) -> torch.Tensor:
        def asked() -> bool:
            if next(layers) == layer:
                assert len(batch.requests) == 2
                engine.interrupt("dropped")
            return is_cancelled()

        return run(batch, asked)

    monkeypatch.setattr(engine.runner, "run", interrupting)
    engine.add(kept)
    engine.add(dropped)
    assert engine.step() == []
    assert next(layers) == layer + 1  # it ended there
    assert engine.abort("dropped") is not None
    engine.scheduler.check_integrity()
    generated: list[int] = []
    while engine.has_work:
        generated += [token for output in engine.step() for token in output.token_ids]
    assert generated == expected["kept"]
    assert everything_is_free(engine)


def test_a_step_is_finished_when_most_of_it_is_still_wanted(engine: Engine) -> None:
    engine._step_tokens = {"kept": 1, "dropped": 1}
    engine.interrupt("dropped")
    assert not engine._is_cancelled()
    engine._step_tokens = {"kept": 1, "dropped": 2}
    assert engine._is_cancelled()
    engine.abort("dropped")
    assert not engine._is_cancelled()


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
def test_a_reader_that_goes_away_frees_its_place(engine: Engine, how: str) -> None:
    async def main() -> None:
        async with running(engine) as client:
            stream = client.submit(request("a", tokens(1, 20), max_tokens=200))
            await anext(stream)
            if how == "close":
                await stream.aclose()
            elif how == "drop":
                del stream
                gc.collect()
            else:
                task = asyncio.create_task(answer(client, request("b", tokens(1, 20), max_tokens=200)))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await stream.aclose()
                del task
                gc.collect()
            await until(lambda: client.stats().num_aborted == 1 + (how == "cancel") and not engine.has_work)
            assert everything_is_free(engine)

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_again(directory: Path) -> None:
    engine = load_engine(open_checkpoint(directory), context=256, max_batch=1)

    async def main() -> None:
        async with running(engine, ClientOptions(max_waiting=2)) as client:
            streams = [client.submit(request(str(i), tokens(i, 30), max_tokens=20)) for i in range(3)]
            with pytest.raises(QueueFull, match="2 requests wait already") as refused:
                client.submit(request("3", tokens(3, 30)))
            assert 1 <= refused.value.retry_after_s <= 120
            for stream in streams:
                assert [output async for output in stream][-1].finish_reason is FinishReason.LENGTH
            await answer(client, request("3", tokens(3, 30)))  # there is room again
            stats = client.stats()
            assert (stats.num_submitted, stats.num_finished, stats.num_refused) == (4, 4, 1)

    asyncio.run(main())


def test_one_client_cannot_take_all_places(directory: Path) -> None:
    engine = load_engine(open_checkpoint(directory), context=256, max_batch=1)

    async def main() -> None:
        async with running(engine, ClientOptions(max_waiting=4)) as client:
            flood = [client.submit(request(f"flood {i}", tokens(i, 9), client_id="flood")) for i in range(3)]
            with pytest.raises(QueueFull, match="3 requests of this client"):
                client.submit(request("flood 3", tokens(3, 9), client_id="flood"))
            polite = client.submit(request("polite", tokens(4, 9), client_id="polite"))
            order = []

            async def read(name: str, stream: Any) -> None:
                async for _ in stream:
                    pass
                order.append(name)

            await asyncio.gather(*(read(f"flood {i}", each) for i, each in enumerate(flood)), read("polite", polite))
            assert order.index("polite") < order.index("flood 2")

    asyncio.run(main())


def test_bad_requests_are_refused_by_the_call(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as client:
            for token_ids, words in (([], "empty"), ([999], "token 0 is 999"), (tokens(0, 256), "context holds 256")):
                with pytest.raises(RequestError, match=words):
                    client.submit(request("bad", token_ids))
            last = engine.runner.model.config.vocab_size - 1
            with pytest.raises(RequestError, match=f"logit_bias names token {last + 1}; the vocabulary ends at {last}"):
                client.submit(request("bad", [1], logit_bias={5: 1.0, last + 1: 1.0}))
            await client.submit(request("biased", [1], logit_bias={last: 1.0})).aclose()
            stream = client.submit(request("a", [1]))
            with pytest.raises(RequestError, match="already in use"):
                client.submit(request("a", [1]))
            await stream.aclose()
        with pytest.raises(EngineError, match="not running"):
            client.submit(request("late", [1]))

    asyncio.run(main())


def test_a_step_that_raises_fails_its_requests_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = engine.runner.run

    def broken(batch: Any, is_cancelled: Any) -> torch.Tensor:
        if any(item.request.request_id == "bad" for item in batch.requests):
            raise MemoryError("no room for the hidden states")
        return run(batch, is_cancelled)

    async def main() -> None:
        async with running(engine) as client:
            before = await answer(client, request("before", tokens(1, 50)))
            monkeypatch.setattr(engine.runner, "run", broken)
            with pytest.raises(EngineError, match="no room for the hidden states"):
                await answer(client, request("bad", tokens(2, 50)))
            after = await answer(client, request("after", tokens(1, 50)))
            assert after.token_ids == before.token_ids
            assert client.stats().num_failed == 1

    asyncio.run(main())
    assert everything_is_free(engine)


def test_a_token_that_cannot_be_chosen_fails_one_request_of_the_batch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = engine.sampler.sample

    def broken(logits: torch.Tensor, item: Any) -> Any:
        if item.request.request_id == "bad":
            raise ZeroDivisionError
        return sample(logits, item)

    async def main() -> None:
        monkeypatch.setattr(engine.sampler, "sample", broken)
        async with running(engine) as client:
            good = asyncio.create_task(answer(client, request("good", tokens(1, 50))))
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await answer(client, request("bad", tokens(2, 50), temperature=1))
            assert len((await good).token_ids) == 12

    asyncio.run(main())
    assert everything_is_free(engine)


def test_a_failure_of_the_engine_itself_empties_it_and_it_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, failures = engine.scheduler.schedule, iter([True])

    def broken() -> Any:
        if next(failures, False):
            raise AssertionError("a bug")
        return schedule()

    async def main() -> None:
        monkeypatch.setattr(engine.scheduler, "schedule", broken)
        async with running(engine) as client:
            with pytest.raises(EngineError, match="a bug"):
                await answer(client, request("a", tokens(1, 5)))
            assert len((await answer(client, request("b", tokens(1, 5)))).token_ids) == 12

    asyncio.run(main())
    assert everything_is_free(engine)


def test_closing_ends_streams_with_abort_and_the_thread(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as client:
            streams = [client.submit(request(str(i), tokens(i, 30), max_tokens=200)) for i in range(12)]
            await anext(streams[0])
            await client.aclose()
            for stream in streams:
                assert [output async for output in stream][-1].finish_reason is FinishReason.ABORT
            assert not any(thread.name == "engine" for thread in threading.enumerate())

    asyncio.run(main())
    assert everything_is_free(engine)


def test_an_idle_engine_sleeps(engine: Engine) -> None:
    async def main() -> None:
        async with running(engine) as client:
            await answer(client, request("a", tokens(1, 5)))
            before = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - before < 0.1
            assert client.stats().num_running == 0

    asyncio.run(main())


def test_stats_count_what_happened(engine: Engine) -> None:
    async def main() -> dict[str, Any]:
        async with running(engine) as client:
            for name in "ab":
                await answer(client, request(name, tokens(1, 100), max_tokens=4))
            return client.stats().as_dict()

    stats = asyncio.run(main())
    assert stats["queue"] == {"running": 0, "waiting": 0, "max_batch": 8, "max_waiting": 64}
    assert stats["prefix_cache"] == {"queried_tokens": 200, "hit_tokens": 96}
    assert stats["kv"] == {"used_tokens": 0, "cached_tokens": 96, "capacity_tokens": 2048}
    assert stats["totals"]["prefilled_tokens"] == 104
    assert stats["totals"]["decoded_tokens"] == 6
    assert stats["speed"]["decode_tokens_per_s"] > 0
    assert stats["kv_snapshots"] is None


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_prompts_logprobs_are_those_of_its_logits(engine: Engine, max_tokens: int) -> None:
    """In several steps, beside others, whether the prompt is in the cache or not."""
    prompt = tokens(1, 150)
    expected = engine.logits(prompt).log_softmax(-1)
    wanted: dict[str, Any] = {"prompt_logprobs": 2, "max_tokens": max_tokens, "temperature": 0}

    async def scored(client: LocalEngineClient, name: str) -> list[Any]:
        return [output async for output in client.submit(request(name, prompt, **wanted))]

    async def main() -> list[list[Any]]:
        async with running(engine) as client:
            plain = await answer(client, request("plain", prompt))  # fills the cache
            beside = asyncio.create_task(answer(client, request("beside", tokens(2, 9), max_tokens=40)))
            found = [await scored(client, "a"), *await asyncio.gather(scored(client, "b"), scored(client, "c"))]
            alone = (await answer(client, request("alone", tokens(2, 9), max_tokens=40))).token_ids
            assert (await beside).token_ids == alone
            if max_tokens:
                assert [t for output in found[0] for t in output.token_ids] == plain.token_ids[:max_tokens]
            return found

    for outputs in asyncio.run(main()):
        entries = [entry for output in outputs for entry in output.prompt_logprobs]
        assert [entry.token_id for entry in entries] == prompt[1:]
        for position, entry in enumerate(entries):
            row = expected[position]
            assert entry.logprob == float(row[entry.token_id])
            assert entry.top == tuple(zip(row.topk(2).indices.tolist(), row.topk(2).values.tolist(), strict=True))
        assert sum(len(output.token_ids) for output in outputs) == max_tokens
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert outputs[-1].num_cached_tokens == 0
    assert everything_is_free(engine)
