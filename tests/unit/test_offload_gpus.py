"""GPUs that hold experts: which there are, what the plan gives them, and what a model that runs with them says."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import packed
import tiny
from glmlocal.cli.bench import _about_experts, _offload
from glmlocal.cli.chat_render import Answer, footer
from glmlocal.completion import Completion, Timings, Usage
from glmlocal.engine.planning import plan_here
from glmlocal.errors import ConfigError, EngineError, PlanError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.offload.dispatch import Costs, dispatch
from glmlocal.offload.stats import GpuStats, OffloadStats, merged, since
from glmlocal.offload.store import StoreStats
from glmlocal.offload.tiers import ExpertKey, Residency
from glmlocal.planner.demand import EXPERT_STAGING
from glmlocal.planner.gpus import described
from glmlocal.planner.machine import ExpertGpu, Machine, Nvme
from glmlocal.planner.plan import CPU, Plan, Wants
from glmlocal.planner.solve import plan
from glmlocal.units import GIB, MIB
from planned import air, machine

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

from glmlocal import LLM
from glmlocal.offload import devices, fake_gpu
from glmlocal.offload.fake_gpu import FakeGpu
from glmlocal.offload.gpu_pool import GpuPool, GpuShare
from glmlocal.offload.torch_gpu import TorchGpu

AIR = air("int4 group 32", 4.5, quant="int4")
EXPERT_BYTES = -(-AIR.layers[1].expert.nbytes // 4096) * 4096  # type: ignore[union-attr]


def with_gpus(there: Machine, *free_gib: float) -> Machine:
    gpus = tuple(ExpertGpu(described(int(gib * GIB), 900), int(gib * GIB)) for gib in free_gib)
    return replace(there, expert_gpus=gpus)


def slots_by_gpu(found: Plan) -> dict[int, int]:
    assert found.placement is not None
    sums: dict[int, int] = {}
    for device, slots in zip(found.placement.slot_device, found.placement.gpu_slots, strict=True):
        sums[device] = sums.get(device, 0) + slots
    return sums


def test_slots_fill_the_memory_that_is_free_and_no_more() -> None:
    found = plan(AIR, with_gpus(machine(ram_gib=96), 8, 4), Wants())
    assert found.fits
    assert found.placement is not None
    assert set(found.placement.layer_device) == {CPU}
    gpus = [device for device in found.devices if device.kind == "gpu"]
    for number, (device, gib) in enumerate(zip(gpus, (8, 4), strict=True)):
        assert device.capacity_bytes == gib * GIB
        assert device.used_bytes == (slots_by_gpu(found)[number] + 2) * EXPERT_BYTES
        assert 0 <= device.capacity_bytes - device.used_bytes < EXPERT_BYTES
    assert list(found.placement.slot_device) == sorted(found.placement.slot_device)  # ranges; the dense layer first


def test_everything_else_is_planned_as_without_them() -> None:
    for there in (machine(ram_gib=96), machine(ram_gib=24, nvme=Nvme(10**12, 5))):
        alone, beside = (plan(AIR, each, Wants()) for each in (there, with_gpus(there, 8)))
        assert beside.resolved == alone.resolved
        assert beside.placement is not None
        assert replace(beside.placement, slot_device=(), gpu_slots=()) == alone.placement
        assert [device for device in beside.devices if device.kind != "gpu"] == list(alone.devices)


def test_limits_of_the_gpus_are_kept() -> None:
    there = with_gpus(machine(ram_gib=96), 80)
    everything = slots_by_gpu(plan(AIR, there, Wants()))[0]
    assert everything == 45 * 128
    vram = slots_by_gpu(plan(AIR, there, Wants(vram_bytes=2 * GIB)))[0]
    assert vram == 2 * GIB // EXPERT_BYTES - 2
    offloaded = slots_by_gpu(plan(AIR, there, Wants(cpu_offload_bytes=16 * GIB)))[0]
    assert 0 <= everything * EXPERT_BYTES - 16 * GIB - offloaded * EXPERT_BYTES < EXPERT_BYTES
    assert plan(AIR, with_gpus(machine(ram_gib=96), 0.01), Wants()).placement.gpu_slots == ()  # type: ignore[union-attr]


ANSWER = Answer(2, Completion("a", "", (5, 6), "stop", Usage(3, 2, 0), Timings(1.0, 0.1, 9.0, 8.0, 2.0), None))
COSTS = Costs(cpu_read_s=1.0, cpu_token_s=0.5, upload_s=2.0, gpu_token_s=0.001)


@pytest.mark.parametrize(
    ("tokens", "streamed"),
    [
        ({}, ()),
        ({0: 1, 1: 1, 2: 1}, ()),  # a decode step: the CPU reads as fast as an upload does
        ({0: 2, 1: 2}, ()),
        ({0: 3}, ()),  # 1.5 s here, 2 s there
        ({0: 100}, (0,)),
        ({0: 8, 1: 8}, (0,)),  # 4 s on the CPU beside an upload of 2 s
        ({0: 10, 1: 20, 2: 30}, (2, 1)),  # 5 s against 4 s: all three would take 6 s
        ({0: 100, 1: 1, 2: 100}, (0, 2)),
    ],
)
def test_dispatch_ends_both_sides_soonest(tokens: dict[int, int], streamed: tuple[int, ...]) -> None:
    found = dispatch(tokens, COSTS)
    assert found.streamed == streamed
    assert found.on_cpu == tuple(sorted(set(tokens) - set(streamed)))


def test_fake_gpus_are_what_the_variable_says() -> None:
    found = devices.found({devices.FAKE_VARIABLE: "2x1GiB,1x512MiB@100"})
    assert [each.free_bytes for each in found] == [GIB, GIB, 512 * MIB]
    assert found[2].gpu.read_gb_per_s == 100
    for bad in ("none", "0x1GiB", "1GiB@0", "moose", "1GiB,,"):
        with pytest.raises(ConfigError, match=r"GLMLOCAL_FAKE_GPU is .* for example 2x1GiB"):
            devices.found({devices.FAKE_VARIABLE: bad})
    if not torch.cuda.is_available():
        assert devices.found({}) == ()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(5), tmp_path_factory.mktemp("gpus") / "source")


@pytest.fixture(scope="module")
def directory(source: Path) -> Path:
    return packed.pack(source, source.parent / "packed", "int4")


def test_a_model_runs_with_the_gpus_that_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.FAKE_VARIABLE, "2x1GiB")
    text = list(range(3, 40))
    with LLM(directory, gpus="none") as llm:
        assert llm.offload_stats is None
        wanted = llm.logits(text)
    for words, count in ({}, 2), ({"gpus": "1GiB@60"}, 1), ({"vram_bytes": 32 * 4096}, 2):
        with LLM(directory, **words) as llm:  # type: ignore[arg-type]
            assert len(slots_by_gpu(llm.plan).keys() - {CPU}) == count
            for _ in range(3):
                assert torch.equal(llm.logits(text), wanted)
            stats = llm.offload_stats
            assert stats is not None
            assert stats.gpu is not None
            assert stats.gpu.slots == sum(llm.plan.placement.gpu_slots)  # type: ignore[union-attr]
            assert stats.gpu.lookups > 0
            on_gpus, others = _about_experts(_offload(llm))  # type: ignore[arg-type]
            assert on_gpus.startswith(f"experts: {stats.gpu.hit_rate:.0%} found in")
            assert others.startswith(f"experts: {stats.hit_rate:.0%} found in")


def test_what_was_hot_is_on_the_gpu_at_the_next_start(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.FAKE_VARIABLE, "1x1GiB")
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path))
    hit_rates = []
    for _ in range(2):
        with LLM(directory) as llm:
            llm.logits([7])
            assert llm.offload_stats is not None
            assert llm.offload_stats.gpu is not None
            hit_rates.append(llm.offload_stats.gpu.hit_rate)
    assert hit_rates == [0.0, 1.0]


def test_what_cannot_be_is_refused_in_one_line(source: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.FAKE_VARIABLE, "1x1GiB")
    plain, pack = open_checkpoint(source), open_checkpoint(directory)
    assert plan_here(plain, "keep", Wants()).machine.expert_gpus == ()  # nobody asked
    with pytest.raises(PlanError, match="packed models only in this version: `glmlocal pack` it"):
        plan_here(plain, "keep", Wants(), gpus="1GiB@60")
    with pytest.raises(ConfigError, match="torch finds 1GiB@60"):
        plan_here(pack, "keep", Wants(), gpus="2x1GiB@60")
    with pytest.raises(ConfigError, match="torch finds 1GiB@60"):
        plan_here(pack, "keep", Wants(), gpus="1xH100")
    made = plan_here(pack, "keep", Wants())
    monkeypatch.setenv(devices.FAKE_VARIABLE, "1x2GiB")
    with pytest.raises(PlanError, match="uses GPU 0, a 1GiB@60; this machine has: 2GiB@60; plan again"):
        LLM(directory, plan=made)
    monkeypatch.setenv(devices.FAKE_VARIABLE, "1x1GiB")
    small = replace(made.machine.expert_gpus[0], free_bytes=MIB // 64)
    with pytest.raises(PlanError, match=r"fake:0 has .* left"):
        LLM(directory, plan=replace(made, machine=replace(made.machine, expert_gpus=(small,))))


def test_torch_computes_what_the_cpu_does_but_for_rounding(directory: Path) -> None:
    """The code that real GPUs run, on torch's CPU device: hits, uploads and streams."""
    resident = packed.engine_with(directory, None)
    for streams in (False, True):
        engine = packed.engine_with(
            directory, 6, None, (5,), lambda number, gpu: TorchGpu(torch.device("cpu")), streams
        )
        for length in (30, 1, 1, 1, 7, 30):
            text = list(range(3, 3 + length))
            found, wanted = engine.logits(text), resident.logits(text)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        stats = engine.offloads.stats()
        assert stats is not None
        assert stats.gpu is not None
        assert (stats.gpu.streamed > 0) is streams
        assert stats.gpu.hits > 0


@dataclass(frozen=True, slots=True, eq=False)
class Broken:
    """What was begun ends, and badly."""

    inner: Any

    def is_done(self) -> bool:
        return bool(self.inner.is_done())

    def wait(self) -> None:
        self.inner.wait()
        raise RuntimeError("CUDA error: an illegal address\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("which", "at_once"), [(fake_gpu._Experts, True), (fake_gpu._Experts, False), (fake_gpu._Memory, False)]
)
def test_a_gpu_that_fails_costs_a_request_at_the_most_and_is_not_used_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, which: type, at_once: bool, streams: bool
) -> None:
    """A product that does not begin, one that does not end, an upload that does not end."""
    resident = packed.engine_with(directory, None)
    engine = packed.engine_with(directory, 6, None, (5,), lambda number, gpu: FakeGpu("fake:0", 1 << 30), streams)
    text = [list(range(start, start + 30)) for start in (3, 40, 90, 160)]
    for each in text[:2]:
        assert torch.equal(engine.logits(each), resident.logits(each))
    name = "rows" if which is fake_gpu._Experts else "upload"
    original = getattr(which, name)

    def breaks(*args: object, **named: object) -> Broken:
        if at_once:
            raise RuntimeError("CUDA out of memory\nTried to allocate")
        return Broken(original(*args, **named))

    monkeypatch.setattr(which, name, breaks)
    errors: list[str] = []
    for each in text * 3:
        try:
            found = engine.logits(each)
        except EngineError as error:
            errors.append(str(error))
        else:
            assert torch.equal(found, resident.logits(each))
    (offload,) = engine.offloads.all
    (gpu,) = offload._gpus
    assert gpu.is_lost
    assert len(errors) == 1 if name == "rows" else len(errors) <= 1
    assert all(re.match(r"fake:0 failed \(CUDA [^\n]*\) and is not used any more", error) for error in errors)
    monkeypatch.setattr(which, name, None)  # nobody calls it
    assert torch.equal(engine.logits(text[0]), resident.logits(text[0]))
    offload.drain()
    assert all(store.num_leased == store.num_pending == 0 for store in offload.stores)


def test_torch_says_that_an_upload_failed_to_those_who_wait() -> None:
    memory = TorchGpu(torch.device("cpu")).allocate(1, 4096)
    event = memory.upload(0, np.zeros(8192, np.uint8))
    with pytest.raises(RuntimeError, match="size"):
        event.wait()
    assert event.is_done()
    with pytest.raises(PlanError, match=r"cpu does not give the .*; give less with --vram"):
        TorchGpu(torch.device("cpu")).allocate(1 << 30, 1 << 30)


def test_a_driver_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise RuntimeError("CUDA unknown error\nand much more")

    monkeypatch.delenv(devices.FAKE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    with pytest.raises(ConfigError, match=r"^the GPUs cannot be used \(CUDA unknown error\); see .*$"):
        devices.found()


def test_the_footer_says_where_experts_were_found() -> None:
    store = StoreStats(lookups=40, hits=30, num_tokens=10)
    gpu = GpuStats(lookups=100, hits=60, slots=4, slot_bytes=4096, uploaded_bytes=8192, streamed=1)
    stats = OffloadStats(store, 8, 8192, 40960, 0.5, True, gpu)
    assert [tier["tier"] for tier in stats.tiers()] == ["gpu", "ram", "nvme"]
    assert [tier["hit_rate"] for tier in stats.tiers()] == [0.6, 0.75, 1.0]
    line = footer(ANSWER, 100, stats)
    assert "60% of experts on GPU, 75% of the others in RAM · 4 KiB read per token" in line
    assert "on GPU" not in footer(ANSWER, 100, replace(stats, gpu=None))
    assert merged([stats, stats]) == OffloadStats(
        StoreStats(lookups=80, hits=60, num_tokens=10),
        16,
        16384,
        81920,
        1.0,
        True,
        GpuStats(200, 120, 8, 8192, 16384, 2),
    )
    assert since(stats, stats).gpu == GpuStats(0, 0, 4, 4096, 0, 0)


# What waits for what, on a device that does nothing until it is told to.


@dataclass(eq=False)
class Held:
    """An event that ends when the test says so."""

    fails: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def is_done(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> None:
        assert self.ended.wait(10)
        if self.fails:
            raise OSError("the device is gone")


@dataclass
class Recorder:
    """A device, its memory and its experts, which note what they are asked for."""

    name: str = "recorder"
    uploads: list[tuple[int, object, Held]] = field(default_factory=list)  # slot, after, event
    products: list[tuple[int, list[object], Held]] = field(default_factory=list)  # expert, after, event

    def allocate(self, num_slots: int, slot_bytes: int) -> Any:
        return self

    def bind(self, *args: object) -> Any:
        return self

    def upload(self, slot: int, source: np.ndarray[Any, Any], after: object = None) -> Held:
        self.uploads.append((slot, after, Held()))
        return self.uploads[-1][2]

    def rows(self, memory: object, x: object, ids: object, placed: Any, out: object, after: Any = ()) -> Held:
        self.products.append((placed[0][0], list(after), Held()))
        return self.products[-1][2]


class Host:
    """A host's store that has these experts, hot as it is said."""

    def __init__(self, *experts: int) -> None:
        self.experts, self.pinned = experts, [0] * 9

    def lookup(self, key: ExpertKey) -> Residency:
        return Residency.HIT if key.expert in self.experts else Residency.MISS

    def pin(self, key: ExpertKey) -> int | None:
        if key.expert not in self.experts:
            return None
        self.pinned[key.expert] += 1
        return key.expert

    def unpin(self, slot: int) -> None:
        self.pinned[slot] -= 1


def pool_over(host: Host, device: Recorder) -> GpuPool:
    def view(slot: int) -> Any:
        return np.zeros(8, np.uint8)

    share = GpuShare(device, (0,), 4, Costs(1, 1, 1, 1))  # type: ignore[arg-type]
    layouts: Any = {0: "layout"}
    return GpuPool(share, layouts, 8, 8, host, view, top_k=2, activations="int8")  # type: ignore[arg-type]


def test_streaming_waits_for_the_product_that_used_the_slot_and_for_the_upload() -> None:
    device = Recorder()
    pool, nothing = pool_over(Host(), device), torch.zeros(1)
    record = np.zeros(8, np.uint8)
    done = pool.stream(0, [(expert, record) for expert in range(5)], nothing, nothing, nothing)
    staging = EXPERT_STAGING
    for turn, (slot, after, there) in enumerate(device.uploads):
        assert slot == 4 + turn % staging
        assert after is (device.products[turn - staging][2] if turn >= staging else None)
        assert device.products[turn][1] == [there]
    for _, _, product in device.products[:-1]:
        product.ended.set()
    assert not done.is_done()
    device.products[-1][2].ended.set()
    assert done.is_done()
    done.wait()
    pool.stream(0, [(1, record)], nothing, nothing, nothing)
    assert device.uploads[-1][1] is None, "what was waited for is not held on to"


def test_a_fake_upload_begins_after_what_it_has_to_wait_for() -> None:
    memory, before = FakeGpu("fake", 1 << 20, lambda: 0.0).allocate(1, 4096), Held()
    memory.upload(0, np.full(4096, 1, np.uint8)).wait()
    second = memory.upload(0, np.full(4096, 2, np.uint8), before)  # type: ignore[arg-type]
    time.sleep(0.05)
    assert not second.is_done()
    assert memory.pool.view(0).tolist() == [1] * 4096, "it is still in use"  # type: ignore[attr-defined]
    before.ended.set()
    second.wait()
    assert memory.pool.view(0).tolist() == [2] * 4096  # type: ignore[attr-defined]


@pytest.mark.parametrize("fails", [False, True])
def test_a_host_slot_is_pinned_while_it_is_uploaded(fails: bool) -> None:
    device, host = Recorder(), Host(3)
    uploads = pool_over(host, device)._uploads
    assert not uploads.start(ExpertKey(0, 5), 0), "the host has it not"
    assert uploads.start(ExpertKey(0, 3), 0)
    assert host.pinned[3] == 1
    assert uploads.arrival(0.0) is None, "a step waits for no upload"
    assert host.pinned[3] == 1
    event = device.uploads[0][2]
    event.fails = fails
    event.ended.set()
    arrival = uploads.arrival(0.0)
    assert arrival is not None
    assert (arrival.error is not None) == fails
    assert host.pinned[3] == 0


def test_what_rises_is_hot_and_in_ram() -> None:
    device = Recorder()
    pool = pool_over(Host(1, 2, 3), device)
    for expert, times in ((1, 2), (2, 1), (5, 9), (6, 8)):
        for _ in range(times):
            pool.store.touch(0, {expert: 1.0}, 0)
    pool.rise(0, [1, 2, 3, 5, 6])
    assert [slot for slot, _, _ in device.uploads] == [0]
    assert pool.store.lookup(ExpertKey(0, 1)) is Residency.PENDING, "the hottest are not in RAM, 2 was used once"
    device.uploads[0][2].ended.set()
    pool.store.drain()
