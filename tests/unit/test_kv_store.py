"""KV snapshots: what a conversation's keys and values outlive."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from engine_client import Answer, answer, request, running, until
from glmlocal.engine.block_pool import block_hash
from glmlocal.engine.client import ClientOptions
from glmlocal.engine.engine import Engine
from glmlocal.engine.identity import model_identity
from glmlocal.engine.kv_files import BlockFiles
from glmlocal.engine.kv_store import KVStore, KVStoreOptions
from glmlocal.engine.request import FinishReason
from glmlocal.engine.stats import EngineStats, SnapshotStats
from glmlocal.formats.index import open_checkpoint
from loading import load_engine

PROMPT = random.Random(1).choices(range(380), k=150)  # four blocks of 32, and 22 tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(**tiny.CONFIGS["glm45"]), tmp_path_factory.mktemp("snapshots"))


def loaded(directory: Path, kv_dtype: str = "auto") -> Engine:
    return load_engine(open_checkpoint(directory), context=256, max_batch=1, kv_dtype=kv_dtype)  # eight blocks


def options(kv_dir: Path, identity: str = "model", **others: int) -> ClientOptions:
    return ClientOptions(kv_store=KVStoreOptions(kv_dir, identity, **{"min_tokens": 64, **others}))


def session(engine: Engine, wanted: ClientOptions, *prompts: list[int]) -> tuple[list[Answer], EngineStats]:
    """A server's life: answers, one after the other, and what it counted before it ended."""

    async def main() -> tuple[list[Answer], EngineStats]:
        async with running(engine, wanted) as client:
            answers = [await answer(client, request(str(i), each)) for i, each in enumerate(prompts)]
            return answers, client.stats()

    result = asyncio.run(main())
    engine.scheduler.check_integrity()
    return result


def snapshots(stats: EngineStats) -> SnapshotStats:
    assert stats.snapshots is not None
    return stats.snapshots


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp8", "int8"])
def test_a_restarted_server_does_not_compute_the_prompt_again(directory: Path, tmp_path: Path, kv_dtype: str) -> None:
    (before,), stats = session(loaded(directory, kv_dtype), options(tmp_path), PROMPT)
    assert stats.num_prefilled_tokens == 150
    (after,), stats = session(loaded(directory, kv_dtype), options(tmp_path), PROMPT)
    assert after.token_ids == before.token_ids
    assert stats.num_prefilled_tokens == 150 - 128
    assert after.last.num_cached_tokens == 128
    assert snapshots(stats).restored_tokens == 128


def test_the_next_turn_finds_the_answer_too(directory: Path, tmp_path: Path) -> None:
    (turn,), _ = session(loaded(directory), options(tmp_path), PROMPT)
    _, stats = session(loaded(directory), options(tmp_path), [*PROMPT, *turn.token_ids, *PROMPT[:20]])
    assert stats.num_prefilled_tokens == 150 + 12 + 20 - 160


def test_what_is_evicted_from_memory_comes_back(directory: Path, tmp_path: Path) -> None:
    engine = loaded(directory)
    other = [(token + 7) % 380 for token in PROMPT]

    async def main() -> None:
        async with running(engine, options(tmp_path)) as client:
            first = await answer(client, request("first", PROMPT))
            await answer(client, request("other", [*other, *other[:80]]))  # takes the whole memory
            await until(lambda: snapshots(client.stats()).saved_tokens == 5 * 32)  # of the answer, too
            computed = client.stats().num_prefilled_tokens
            again = await answer(client, request("again", PROMPT))
            assert again.token_ids == first.token_ids
            assert client.stats().num_prefilled_tokens - computed == 22

    asyncio.run(main())


def test_short_conversations_are_not_kept(directory: Path, tmp_path: Path) -> None:
    session(loaded(directory), options(tmp_path, min_tokens=200), PROMPT)
    assert list(tmp_path.glob("*/*")) == []


def test_the_limit_holds_and_what_is_left_is_a_beginning(directory: Path, tmp_path: Path) -> None:
    session(loaded(directory), options(tmp_path), PROMPT)
    (size,) = {path.stat().st_size for path in tmp_path.glob("*/*")}
    _, stats = session(loaded(directory), options(tmp_path, limit_bytes=2 * size), PROMPT)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 2 * size
    _, stats = session(loaded(directory), options(tmp_path, limit_bytes=2 * size), PROMPT)
    assert snapshots(stats).restored_tokens == 64


@pytest.mark.parametrize("what", ["identity", "kv_dtype", "version"])
def test_snapshots_of_something_else_are_not_used(directory: Path, tmp_path: Path, what: str) -> None:
    session(loaded(directory, "fp32"), options(tmp_path), PROMPT)
    if what == "version":
        for path in tmp_path.glob("*/*"):
            content = bytearray(path.read_bytes())
            content[6] += 1
            path.write_bytes(content)
    engine = loaded(directory, "bf16" if what == "kv_dtype" else "fp32")
    (_,), stats = session(engine, options(tmp_path, "another" if what == "identity" else "model"), PROMPT)
    assert stats.num_prefilled_tokens == 150


def test_a_damaged_block_is_computed_and_those_before_it_are_not(directory: Path, tmp_path: Path) -> None:
    engine = loaded(directory)
    (before,), _ = session(engine, options(tmp_path), PROMPT)
    name = b""
    for start in (0, 32, 64):
        name = block_hash(name, PROMPT[start : start + 32])
    (path,) = tmp_path.glob(f"*/{name.hex()}.kv")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (after,), stats = session(loaded(directory), options(tmp_path), PROMPT)
    assert after.token_ids == before.token_ids
    assert stats.num_prefilled_tokens == 150 - 64
    assert snapshots(stats).ignored_files == 1
    (_,), stats = session(loaded(directory), options(tmp_path), PROMPT)
    assert stats.num_prefilled_tokens == 150 - 128  # it was written anew


def test_a_full_disk_fails_no_request(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: BlockFiles, name: bytes, payload: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlockFiles, "write", full)
    others = [[(token + shift) % 380 for token in PROMPT] for shift in (0, 7, 14, 21)]
    answers, _ = session(loaded(directory), options(tmp_path), *others)
    assert [len(each.token_ids) for each in answers] == [12] * 4
    assert caplog.text.count("No space left on device") == 1  # said once, not per block


def test_what_the_disk_is_too_slow_for_is_dropped(directory: Path, tmp_path: Path) -> None:
    others = [[(token + shift) % 380 for token in PROMPT] for shift in (0, 7, 14, 21)]
    _, stats = session(loaded(directory), options(tmp_path, max_pending_bytes=0), *others)
    assert snapshots(stats).dropped_tokens > 0
    assert snapshots(stats).saved_tokens == 0


def test_an_abort_while_blocks_are_read_leaves_a_sound_engine(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(loaded(directory), options(tmp_path), PROMPT)
    engine, reached, go_on = loaded(directory), threading.Event(), threading.Event()
    read = BlockFiles.read

    def slow(self: BlockFiles, name: bytes, into: memoryview) -> bool:
        reached.set()
        assert go_on.wait(60)
        return read(self, name, into)

    async def main() -> None:
        monkeypatch.setattr(BlockFiles, "read", slow)
        async with running(engine, options(tmp_path)) as client:
            stream = client.submit(request("a", PROMPT))
            await asyncio.to_thread(reached.wait, 60)
            client.abort("a")
            assert [output.finish_reason async for output in stream] == [FinishReason.ABORT]
            pool = engine.scheduler.block_pool
            assert pool.num_free_blocks == pool.num_blocks - 4  # the reading thread may still write there
            go_on.set()
            await until(lambda: pool.num_free_blocks == pool.num_blocks)
            assert len((await answer(client, request("b", PROMPT))).token_ids) == 12

    asyncio.run(main())
    engine.scheduler.check_integrity()


def test_a_model_is_known_by_its_weights_and_by_how_it_is_computed(directory: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model = tiny.build_model(**tiny.CONFIGS["glm45"])
        model.model.layers[1].self_attn.q_proj.weight += 0.01
    tuned = open_checkpoint(tiny.save(model, tmp_path))
    original = open_checkpoint(directory)
    names = {
        model_identity(original, "keep", "fp32"),
        model_identity(original, "keep", "int8"),
        model_identity(tuned, "keep", "fp32"),
        model_identity(replace(original, config={**original.config, "rope_theta": 5}), "keep", "fp32"),
    }
    assert len(names) == 4
    assert model_identity(open_checkpoint(directory), "keep", "fp32") in names


def block_bytes(store: KVStore) -> int:
    return sum(raw.shape[1] for raw in store._raw)


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_written_or_could_not_be_makes_room_for_the_next(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """One block may wait for the disk: a second one beside it is dropped, one after it is not."""
    engine, go_on, write = loaded(directory), threading.Event(), BlockFiles.write

    def slow(self: BlockFiles, name: bytes, payload: memoryview) -> None:
        assert go_on.wait(30)
        if fails and name == bytes([0] * 16):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, payload)

    monkeypatch.setattr(BlockFiles, "write", slow)
    cache = engine.runner.kv_cache
    size = block_bytes(KVStore(KVStoreOptions(tmp_path / "sized", "model"), cache))
    store = KVStore(KVStoreOptions(tmp_path, "model", max_pending_bytes=size), cache)
    store.save(0, bytes([0] * 16))
    store.save(1, bytes([1] * 16))
    assert store.stats().dropped_tokens == 32
    go_on.set()
    wait(lambda: store.stats().saved_tokens + store.stats().dropped_tokens == 64)
    for number in (2, 3):  # each finds the room that the one before it gave back
        store.save(number, bytes([number] * 16))
        wait(lambda number=number: store.stats().saved_tokens == (number - 1 if fails else number) * 32)  # type: ignore[misc]
    store.close(engine.scheduler.block_pool)
    assert store.num_stored([bytes([number] * 16) for number in (2, 3)]) == 2
    assert store.num_stored([bytes([1] * 16)]) == 0


def test_a_cancelled_restore_reads_no_further(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read, seen = loaded(directory), BlockFiles.read, []
    store = KVStore(KVStoreOptions(tmp_path, "model"), engine.runner.kv_cache)
    names = [bytes([number] * 16) for number in range(4)]
    for block, name in enumerate(names):
        store.save(block, name)
    wait(lambda: store.num_stored(names) == 4)
    reached, go_on = threading.Event(), threading.Event()

    def slow(self: BlockFiles, name: bytes, into: memoryview) -> bool:
        seen.append(name)
        reached.set()
        assert go_on.wait(30)
        return read(self, name, into)

    monkeypatch.setattr(BlockFiles, "read", slow)
    job = store.restore(names, [4, 5, 6, 7])
    assert reached.wait(30)
    job.cancel()
    go_on.set()
    wait(lambda: job.is_done)
    assert (seen, job.num_restored) == (names[:1], 1)
    store.close(engine.scheduler.block_pool)
