"""Placement never changes a logit: whatever is resident, in whatever order experts arrive, the bits are the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packed
import tiny
from glmlocal import kernels
from glmlocal.engine.engine import Engine
from glmlocal.formats.expert_pack import ExpertPack
from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

from glmlocal.offload.fake_gpu import FakeGpu
from glmlocal.offload.nvme import Reader, open_reader
from glmlocal.offload.stats import since
from glmlocal.planner.machine import ExpertGpu

NUM_EXPERTS, TOP_K, MOE_LAYERS = 8, 2, 2
SLOTS = {"all": NUM_EXPERTS * MOE_LAYERS, "50 %": 8, "10 %": 2, "top-k": TOP_K, "one": 1}
GPU_SLOTS = [(1,), (2,), (5,), (NUM_EXPERTS * MOE_LAYERS,), (NUM_EXPERTS, NUM_EXPERTS), (3, 1), (0, 4)]


class Shuffled:
    """A reader whose records arrive in another order than they were asked for."""

    def __init__(self, inner: Reader, seed: int) -> None:
        self._inner, self._random = inner, random.Random(seed)
        self._done: list[tuple[int, int]] = []
        self._under_way = 0

    @property
    def direct(self) -> bool:
        return self._inner.direct

    @property
    def descriptor(self) -> int:
        return self._inner.descriptor

    @property
    def bytes_read(self) -> int:
        return self._inner.bytes_read

    @property
    def busy_s(self) -> float:
        return self._inner.busy_s

    def submit(self, token: int, offset: int, num_bytes: int, destination: int, urgent: bool) -> bool:
        taken = self._inner.submit(token, offset, num_bytes, destination, urgent)
        self._under_way += taken
        return taken

    def hurry(self, token: int) -> bool:
        return self._inner.hurry(token)

    def cancel(self, token: int) -> bool:
        return self._inner.cancel(token)

    def next(self, timeout_s: float) -> tuple[int, int] | None:
        while self._under_way and (found := self._inner.next(1.0 if not self._done else 0.0)):
            self._done.append(found)
            self._under_way -= 1
        if not self._done:
            return None
        return self._done.pop(self._random.randrange(len(self._done)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    return packed.pack(tiny.save(tiny.build_model(3), root / "source"), root / "packed", "int4")


@pytest.fixture(scope="module")
def resident(directory: Path) -> Engine:
    return packed.engine_with(directory, None)


def texts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 384) for _ in range(length)] for length in lengths]


@settings(max_examples=40, deadline=None)
@given(
    slots=st.sampled_from(sorted(SLOTS.values())) | st.integers(1, NUM_EXPERTS * MOE_LAYERS + 3),
    seed=st.integers(0, 999),
    lengths=st.lists(st.sampled_from([1, 2, 7, 40]), min_size=1, max_size=4),
)
def test_logits_are_those_of_the_all_resident_run(
    directory: Path, resident: Engine, slots: int, seed: int, lengths: list[int]
) -> None:
    def reader(pack: ExpertPack, most: int) -> Reader:
        return Shuffled(open_reader(pack, most), seed)

    engine = packed.engine_with(directory, slots, reader)
    stats = engine.offloads.stats()
    assert stats is not None
    assert stats.slots == min(slots, NUM_EXPERTS * MOE_LAYERS)
    for text in texts(seed, lengths):  # later ones find the slots as earlier ones left them
        assert torch.equal(engine.logits(text), resident.logits(text))
    _nothing_is_leased(engine)


@settings(max_examples=20, deadline=None)
@given(
    slots=st.none() | st.sampled_from(sorted(SLOTS.values())),
    gpu_slots=st.sampled_from(GPU_SLOTS),
    streams=st.booleans(),
    seed=st.integers(0, 999),
    lengths=st.lists(st.sampled_from([1, 2, 7, 40]), min_size=2, max_size=6),
)
def test_gpus_do_not_change_a_bit(
    directory: Path,
    resident: Engine,
    slots: int | None,
    gpu_slots: tuple[int, ...],
    streams: bool,
    seed: int,
    lengths: list[int],
) -> None:
    """All experts in RAM (None) or some, and above them GPUs whose copies are late and poisoned until they are done."""
    late = random.Random(seed)

    def device(number: int, gpu: ExpertGpu) -> FakeGpu:
        return FakeGpu(f"fake:{number}", gpu.free_bytes, lambda: late.choice([0.0, 0.0, 0.001, 0.004]))

    engine = packed.engine_with(directory, slots, None, gpu_slots, device, streams)
    for text in texts(seed, lengths):
        assert torch.equal(engine.logits(text), resident.logits(text))
    stats = engine.offloads.stats()
    assert stats is not None
    assert stats.gpu is not None
    assert stats.gpu.slots <= sum(gpu_slots)
    assert not stats.gpu.streamed or streams
    assert stats.gpu.streamed or not streams or lengths[0] < 7  # of so many tokens, two share an expert
    _nothing_is_leased(engine)


def _nothing_is_leased(engine: Engine) -> None:
    for offload in engine.offloads.all:
        offload.drain()
        for store in offload.stores:
            assert store.num_leased == 0


def test_hot_experts_rise_and_are_then_computed_on_the_gpu(directory: Path, resident: Engine) -> None:
    engine = packed.engine_with(
        directory, None, None, (NUM_EXPERTS * MOE_LAYERS,), lambda number, gpu: FakeGpu("fake", gpu.free_bytes)
    )
    text = texts(4, [1])[0]
    for _ in range(12):
        assert torch.equal(engine.logits(text), resident.logits(text))
        for offload in engine.offloads.all:
            offload.drain()
    first = engine.offloads.stats()
    engine.logits(text)
    then = engine.offloads.stats()
    assert first is not None
    assert then is not None
    lately = since(then, first)
    assert lately.gpu is not None
    assert lately.gpu.hits == lately.gpu.lookups == MOE_LAYERS * TOP_K
    assert lately.store.lookups == lately.gpu.uploaded_bytes == 0
    assert [tier["tier"] for tier in lately.tiers()] == ["gpu", "ram", "nvme"]
    assert lately.tiers()[0]["hit_rate"] == 1.0


def test_a_resident_plan_has_no_slots_and_an_offloaded_one_reads(directory: Path, resident: Engine) -> None:
    assert resident.offloads.stats() is None
    engine = packed.engine_with(directory, 4)
    engine.logits(texts(1, [20])[0])
    stats = engine.offloads.stats()
    assert stats is not None
    record_bytes = stats.slot_bytes // stats.slots
    assert stats.read_bytes == record_bytes * (stats.store.lookups - stats.store.hits)
    assert stats.store.stall_s > 0
    assert stats.store.num_tokens == 20
    ram, nvme = stats.tiers()
    assert ram["lookups"] == ram["hits"] + nvme["lookups"]


def test_with_all_slots_each_expert_is_read_once(directory: Path) -> None:
    engine = packed.engine_with(directory, SLOTS["all"])
    for text in texts(2, [60, 60]):
        engine.logits(text)
    stats = engine.offloads.stats()
    assert stats is not None
    assert stats.read_bytes <= stats.slot_bytes
    assert stats.store.evictions == 0


def test_shared_experts_are_computed_while_others_are_read(
    directory: Path, resident: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = packed.engine_with(directory, SLOTS["top-k"])
    text = texts(5, [7])[0]
    original, leased = kernels.swiglu_ffn, []

    def swiglu_ffn(x: torch.Tensor, *weights: kernels.Weight) -> torch.Tensor:
        leased.append(sum(offload.store.num_leased for offload in engine.offloads.all))
        return original(x, *weights)

    monkeypatch.setattr(kernels, "swiglu_ffn", swiglu_ffn)
    assert torch.equal(engine.logits(text), resident.logits(text))
    assert len(leased) == MOE_LAYERS
    assert min(leased) > 0, "reads were begun before"
    _nothing_is_leased(engine)


def test_what_fails_beside_the_reads_leaves_nothing_leased(
    directory: Path, resident: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = packed.engine_with(directory, SLOTS["top-k"])
    text = texts(6, [3])[0]

    def fails(x: torch.Tensor, *weights: kernels.Weight) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "swiglu_ffn", fails)
        with pytest.raises(MemoryError):
            engine.logits(text)
    _nothing_is_leased(engine)
    assert torch.equal(engine.logits(text), resident.logits(text))
