"""What goes wrong with a disk fails one request with a clear line; the process lives, and the next answer is right."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_client
import packed
import tiny
from glmlocal.engine.engine import Engine
from glmlocal.engine.stats import EngineStats
from glmlocal.errors import CheckpointError, EngineError, PlanError
from glmlocal.formats.expert_pack import PACK_FILE, ExpertPack, Record, read_pack
from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

from glmlocal import LLM
from glmlocal.kernels.cpu import _cpu
from glmlocal.offload import host, nvme, runtime
from glmlocal.offload.nvme import Reader, open_reader

TEXT = [5, 9, 200, 31, 77, 140, 6, 8]


class Failing:
    """A reader whose n-th read fails with an errno; ``count`` of them in a row."""

    def __init__(self, inner: Reader, nth: int, code: int, count: int = 1) -> None:
        self._inner, self._fails, self._code = inner, range(nth, nth + count), code
        self.num_reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def breaks(self) -> None:
        self._fails = range(1 << 30)

    def mends(self) -> None:
        self._fails = range(0)

    def next(self, timeout_s: float) -> tuple[int, int] | None:
        found = self._inner.next(timeout_s)
        if found is None:
            return None
        self.num_reads += 1
        return (found[0], self._code) if self.num_reads - 1 in self._fails else found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    return packed.pack(tiny.save(tiny.build_model(4), root / "source"), root / "packed", "int4")


@pytest.fixture(scope="module")
def answer(model: Path) -> torch.Tensor:
    return packed.engine_with(model, None).logits(TEXT)


@pytest.fixture
def directory(model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "packed"))


def failing(nth: int, code: int, count: int = 1) -> Callable[[ExpertPack, int], Reader]:
    def wrapped(pack: ExpertPack, most: int) -> Reader:
        return Failing(open_reader(pack, most), nth, code, count)

    return wrapped


def problem(engine: Engine) -> str | None:
    """What the engine says instead of an answer."""
    try:
        engine.logits(TEXT)
    except CheckpointError as error:
        return str(error)
    return None


def check_answers(engine: Engine, answer: torch.Tensor) -> None:
    assert torch.equal(engine.logits(TEXT), answer)
    for offload in engine.offloads.all:
        offload.store.drain()
        assert (offload.store.num_leased, offload.store.num_pending) == (0, 0)


def test_an_error_at_the_nth_read_fails_the_request_until_a_run_has_none(model: Path, answer: torch.Tensor) -> None:
    """As SQLite is tested: fail the first read, then the second, … until nothing fails."""
    for nth in range(200):
        engine = packed.engine_with(model, 4, failing(nth, errno.EIO))
        message = problem(engine)
        if message is None:
            assert nth > 4
            return
        assert "expert" in message
        assert "EIO" in message
        assert "\n" not in message
        check_answers(engine, answer)
    pytest.fail("a run of one text never got through")


def test_a_disk_that_stays_broken_fails_every_request_and_never_hangs(model: Path) -> None:
    engine = packed.engine_with(model, 4, failing(0, errno.EIO, count=10_000))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="check the disk"):
            engine.logits(TEXT)


def test_a_file_that_became_shorter_is_named(directory: Path, answer: torch.Tensor) -> None:
    engine = packed.engine_with(directory, 4)
    check_answers(engine, answer)
    size = (directory / PACK_FILE).stat().st_size
    kept = (directory / PACK_FILE).read_bytes()
    os.truncate(directory / PACK_FILE, size // 2 // 4096 * 4096)
    with pytest.raises(CheckpointError, match=r"become shorter|was changed"):
        engine.logits(TEXT)
    (directory / PACK_FILE).write_bytes(kept)
    engine = packed.engine_with(directory, 4)
    check_answers(engine, answer)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_at_the_first_touch(directory: Path, where: str) -> None:
    pack = read_pack(directory / PACK_FILE)
    layer = pack.layers()[-1]
    with open(directory / PACK_FILE, "r+b") as file:
        for expert in range(pack.num_experts):
            record = pack.record(layer, expert)
            at = record.offset + (0 if where == "first" else record.nbytes - 1)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
    engine = packed.engine_with(directory, 4)
    with pytest.raises(CheckpointError, match=f"layer {layer}, expert [0-7] is damaged"):
        engine.logits(TEXT)


def test_a_pack_overwritten_while_it_is_used_is_not_trusted(directory: Path, answer: torch.Tensor) -> None:
    engine = packed.engine_with(directory, 4)
    check_answers(engine, answer)
    with open(directory / PACK_FILE, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\1" * 4096)
    with pytest.raises(CheckpointError, match="was changed while it is in use"):
        engine.logits(TEXT)


def test_a_pack_replaced_by_another_file_is_no_matter(directory: Path, answer: torch.Tensor) -> None:
    """The old file lives on as long as it is open."""
    engine = packed.engine_with(directory, 4)
    other = directory / "other"
    other.write_bytes(b"\0" * 4096)
    os.replace(other, directory / PACK_FILE)
    check_answers(engine, answer)


def test_an_answer_after_a_failure_through_the_api(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(nvme, "open_reader", failing(6, errno.EIO))
    checkpoint_plan = packed.engine_with(model, None)  # what is right
    right = checkpoint_plan.logits(TEXT)[-1].argmax().item()
    from glmlocal.engine.planning import plan_here
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.planner.plan import Wants

    checkpoint = open_checkpoint(model)
    plan = packed.offloaded(plan_here(checkpoint, "keep", Wants()), checkpoint, 4)
    with LLM(model, plan=plan) as llm:
        with pytest.raises(EngineError, match="EIO"):
            llm.generate(TEXT, max_tokens=3, temperature=0.0)
        completion = llm.generate(TEXT, max_tokens=1, temperature=0.0)
        assert list(completion.token_ids) == [right]
        stats = llm.offload_stats
        assert stats is not None
        assert stats.nvme()["read_bytes"] == stats.read_bytes > 0
    assert list((tmp_path / "home").rglob("*.json")), "the route trace is kept"
    monkeypatch.setattr(nvme, "open_reader", open_reader)
    with LLM(model, plan=plan) as llm:
        warm = llm.offload_stats
        assert warm is not None
        assert warm.store.prefetched == 4, "the hottest experts of the earlier run are in the slots at the start"
        assert list(llm.generate(TEXT, max_tokens=1, temperature=0.0).token_ids) == [right]
        after = llm.offload_stats
        assert after is not None
        assert after.store.prefetch_hits > 0


def test_a_read_error_fails_the_requests_of_its_step_and_the_client_answers_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the server sees it: two requests of one batch end with the error, the one after them with its answer."""
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path))

    readers: list[Failing] = []

    def reader(pack: ExpertPack, most: int) -> Reader:
        readers.append(Failing(open_reader(pack, most), 0, errno.EIO, count=0))
        return readers[-1]

    async def ask() -> tuple[list[str], list[int], EngineStats]:
        async with engine_client.running(packed.engine_with(model, 4, reader)) as client:
            streams = [client.submit(engine_client.request(name, TEXT, max_tokens=400)) for name in ("a", "b")]
            for stream in streams:
                await anext(stream)  # both are in the batch
            readers[0].breaks()
            errors = []
            for stream in streams:
                with pytest.raises(EngineError) as caught:
                    async for _ in stream:
                        pass
                errors.append(str(caught.value))
            readers[0].mends()
            after = await engine_client.answer(client, engine_client.request("after", TEXT, max_tokens=3))
            return errors, after.token_ids, client.stats()

    async def healthy() -> list[int]:
        async with engine_client.running(packed.engine_with(model, None)) as client:
            return (await engine_client.answer(client, engine_client.request("a", TEXT, max_tokens=3))).token_ids

    errors, after, stats = asyncio.run(ask())
    assert errors[0] == errors[1]
    assert "EIO" in errors[0]
    assert after == asyncio.run(healthy())
    assert (stats.num_failed, stats.num_finished, stats.num_running) == (2, 1, 0)
    shown = stats.as_dict()
    assert [tier["tier"] for tier in shown["tiers"]] == ["ram", "nvme"]
    assert shown["nvme"]["read_bytes"] > 0
    assert list(tmp_path.rglob("*.json")), "the route trace is kept when the client closes"


TWO = """
import sys
from glmlocal import LLM
from glmlocal.engine.planning import plan_here
from glmlocal.formats.index import open_checkpoint
from glmlocal.planner.plan import Wants
import packed
checkpoint = open_checkpoint(sys.argv[1])
plan = packed.offloaded(plan_here(checkpoint, "keep", Wants()), checkpoint, 3)
with LLM(sys.argv[1], plan=plan) as llm:
    print("ready", flush=True)
    for line in sys.stdin:
        answer = llm.generate([int(word) for word in line.split()], max_tokens=4, temperature=0.0, ignore_eos=True)
        print(list(answer.token_ids), flush=True)
"""


def test_two_processes_share_a_pack_and_keep_one_trace(model: Path, tmp_path: Path) -> None:
    """Both at once, one of which is killed; the other answers on, and what is kept of the routing can be read."""
    environment = {
        "GLMLOCAL_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(packed.__file__).parent),
    }
    command = [sys.executable, "-c", TWO, str(model)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) for _ in range(2)]

    def ask(process: subprocess.Popen[str], text: list[int]) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(" ".join(map(str, text)) + "\n")
        process.stdin.flush()
        return process.stdout.readline()

    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        answers = [ask(process, TEXT) for _ in range(3) for process in running]
        assert len(set(answers)) == 1
        assert answers[0].startswith("[")
        running[0].kill()
        running[0].wait()
        assert ask(running[1], TEXT) == answers[0]
        running[1].communicate()
        assert running[1].returncode == 0
        (kept,) = tmp_path.rglob("*.json")
        assert json.loads(kept.read_text())["num_tokens"] > 0
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_a_plan_for_nvme_needs_a_pack(model: Path) -> None:
    source = model.parent / "source"
    from glmlocal.engine.loader import load_engine
    from glmlocal.engine.planning import plan_here
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.planner.plan import Wants

    packed_checkpoint, checkpoint = open_checkpoint(model), open_checkpoint(source)
    plan = packed.offloaded(plan_here(packed_checkpoint, "keep", Wants()), packed_checkpoint, 4)
    with pytest.raises(PlanError, match="make one with `glmlocal pack`"):
        load_engine(checkpoint, plan)


def test_without_o_direct_it_reads_through_the_page_cache_and_says_so(
    model: Path, answer: torch.Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = _cpu.NvmeReader
    monkeypatch.setattr(_cpu, "NvmeReader", lambda *args: native(*args[:4], False))
    with caplog.at_level(logging.WARNING):
        engine = packed.engine_with(model, 4)
    assert "refuses O_DIRECT" in caplog.text
    stats = engine.offloads.stats()
    assert stats is not None
    assert not stats.direct
    check_answers(engine, answer)


def test_slots_are_given_back_when_memory_runs_short_and_taken_when_it_is_back(
    model: Path, answer: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    engine = packed.engine_with(model, 12)
    (offload,) = engine.offloads.all
    check_answers(engine, answer)  # which fills the slots
    left = [host.PRESSURE_BYTES // 2]
    offload._available_bytes, offload._next_check_s = (lambda: left[0]), 0.0
    with caplog.at_level(logging.WARNING):
        check_answers(engine, answer)
    assert "expert slots were given back" in caplog.text
    assert offload.store.num_slots < 12
    for slot in offload.store._retired:
        assert not offload._pool.view(slot).any(), "its memory is the system's again"
    left[0], offload._next_check_s = 100 * host.RELIEF_BYTES, 0.0
    check_answers(engine, answer)
    assert offload.store.num_slots == 12


def test_a_file_that_changed_before_it_was_used_is_refused(directory: Path) -> None:
    pack = read_pack(directory / PACK_FILE)
    with open(directory / PACK_FILE, "ab") as file:
        file.write(bytes(4096))
    pool = host.HostPool(1, pack.layout(pack.layers()[0]).record_bytes)
    with pytest.raises(CheckpointError, match="changed while it was opened"):
        nvme.PackSource(pack, pool, open_reader(pack, 1))


def test_a_record_is_checked_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, checked = packed.engine_with(model, 2), list[tuple[int, int]]()
    check = ExpertPack.check

    def noted(self: ExpertPack, record: Record, data: Any) -> None:
        checked.append((record.layer, record.expert))
        check(self, record, data)

    monkeypatch.setattr(ExpertPack, "check", noted)
    for _ in range(3):
        engine.logits(TEXT)
    stats = engine.offloads.stats()
    assert stats is not None
    assert stats.store.lookups - stats.store.hits > len(checked), "they were read more than once"
    assert len(checked) == len(set(checked)) > 0


def test_how_many_slots_come_and_go_with_the_memory_that_is_left() -> None:
    pressure, relief, slot = host.PRESSURE_BYTES, host.RELIEF_BYTES, 10 << 20
    assert host.slots_to_release(pressure, slot) == 0
    assert host.slots_to_release(pressure - 1, slot) == -(-(relief - pressure + 1) // slot)
    assert host.slots_to_release(0, relief) == 1
    assert host.slots_to_regain(2 * relief - 1, slot) == 0
    assert host.slots_to_regain(2 * relief + 6 * slot, slot) == 3


def test_stats_of_several_stores_add_up(model: Path) -> None:
    from glmlocal.offload.stats import OffloadStats, bottleneck, merged, since
    from glmlocal.offload.store import StoreStats

    one = OffloadStats(StoreStats(10, 4, 3, 2, 1, 1.5, 100), 5, 5000, 6000, 2.0, True)
    two = replace(one, read_bytes=1000, direct=False)
    both = merged([one, two])
    assert merged([]) is None
    assert both is not None
    assert (both.store.lookups, both.store.hits, both.store.num_tokens) == (20, 8, 100)
    assert (both.read_bytes, both.slots, both.slot_bytes, both.direct) == (7000, 10, 10000, False)
    assert both.hit_rate == 0.4
    assert both.read_bytes_per_token == 70.0
    assert both.read_bytes_per_s == 1750.0
    lately = since(both, one)
    assert (lately.read_bytes, lately.read_s, lately.store.lookups, lately.store.stall_s) == (1000, 2.0, 10, 1.5)
    assert "60% of the time" in bottleneck(one, 2.5, 20)
    assert "--ram" in bottleneck(one, 2.5, 20)


def test_a_slow_disk_is_warned_of_once_with_advice(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_WARN_AFTER_S", 0.0)
    monkeypatch.setattr(runtime, "STALL_WARNS_ABOVE", -1.0)
    engine = packed.engine_with(model, 2)
    (offload,) = engine.offloads.all
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            offload._next_check_s = 0.0
            engine.logits(TEXT)
    assert caplog.text.count("NVMe is the bottleneck") == 1
    assert "more --ram would help" in caplog.text


def test_a_fast_disk_is_not_warned_of(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_WARN_AFTER_S", 0.0)
    monkeypatch.setattr(runtime, "STALL_WARNS_ABOVE", 1.0)  # no disk is waited for longer than the time that goes by
    engine = packed.engine_with(model, 2)
    (offload,) = engine.offloads.all
    for _ in range(3):
        offload._next_check_s = 0.0
        engine.logits(TEXT)
    assert "bottleneck" not in caplog.text
