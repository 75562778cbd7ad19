"""ExpertStore as a state machine: leases, evictions, waves, prefetches, failures, shrinking, and a GPU above, in any
order."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.offload.eviction import LFRU, LRU
from glmlocal.offload.gpu_pool import UploadSource
from glmlocal.offload.store import Arrival, ExpertStore, Lease
from glmlocal.offload.tiers import ExpertKey, Residency

LAYERS, EXPERTS = (3, 4), 6
IO_ERROR = CheckpointError("cannot read")


class Disk:
    """A source in memory: reads end when and in the order in which the test says."""

    def __init__(self, num_slots: int, most: int = 16) -> None:
        self.slots: list[ExpertKey | None] = [None] * num_slots  # what was read last
        self.under_way: deque[tuple[ExpertKey, int]] = deque()
        self.fail_next = 0
        self.most = most
        self.is_stuck = False
        self.num_started = 0
        self.cancelled: set[int] = set()  # slots
        self.unhurried: set[int] = set()  # slots
        self.is_deaf = False  # cancelling comes too late

    def start(self, key: ExpertKey, slot: int, *, urgent: bool = True) -> bool:
        if len(self.under_way) >= self.most:
            return False
        assert slot not in [other for _, other in self.under_way]
        self.slots[slot] = None  # torn
        self.under_way.append((key, slot))
        self.num_started += 1
        if not urgent:
            self.unhurried.add(slot)
        return True

    def hurry(self, slot: int) -> None:
        assert slot in [other for _, other in self.under_way]
        self.unhurried.remove(slot)

    def cancel(self, slot: int) -> None:
        assert slot in [other for _, other in self.under_way]
        if not self.is_deaf:
            self.cancelled.add(slot)

    def arrival(self, timeout_s: float) -> Arrival | None:
        if not self.under_way or (self.is_stuck and timeout_s == 0.0):
            return None
        key, slot = self.under_way.popleft()
        self.unhurried.discard(slot)
        if slot in self.cancelled:
            self.cancelled.discard(slot)
            return Arrival(slot, is_cancelled=True)
        if self.fail_next:
            self.fail_next -= 1
            return Arrival(slot, IO_ERROR)
        self.slots[slot] = key
        return Arrival(slot)

    def shuffle(self, seed: int) -> None:
        items = list(self.under_way)
        random.Random(seed).shuffle(items)
        self.under_way = deque(items)


@dataclass(eq=False)
class Copy:
    """Ends when the test says; reads its source then and not before, as a copy may."""

    memory: GpuMemory
    slot: int
    source: int  # slot of the disk
    fails: bool
    done: bool = False

    def end(self) -> None:
        if not self.done and not self.fails:
            self.memory.slots[self.slot] = self.memory.disk.slots[self.source]
        self.done = True

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.end()
        if self.fails:
            raise OSError("the device is gone")


@dataclass
class GpuMemory:
    disk: Disk
    slots: dict[int, ExpertKey | None] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    fail_next: bool = False

    def upload(self, slot: int, source: NDArray[np.uint8], after: object = None) -> Copy:
        self.slots[slot] = None  # torn
        self.copies.append(Copy(self, slot, int(source[0]), self.fail_next))
        self.fail_next = False
        return self.copies[-1]


def uses(*experts: int) -> dict[int, float]:
    return dict.fromkeys(experts, 1.0)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.num_slots = 4
        self.others: list[CheckpointError] = []  # errors that no disk gave
        self.disk = Disk(self.num_slots)
        self.store = ExpertStore(LAYERS, EXPERTS, self.num_slots, self.disk, LFRU(boost_tokens=2), most_reads=3)
        self.leases: list[tuple[int, Lease, list[int], list[tuple[int, int]]]] = []  # layer, lease, left, wave
        self.memory = GpuMemory(self.disk)
        uploads = UploadSource(self.memory, self.store, lambda slot: np.array([slot], np.uint8))
        self.gpu = ExpertStore(LAYERS, EXPERTS, 3, uploads, LFRU(boost_tokens=2), most_reads=3)

    @rule(layer=st.sampled_from(LAYERS), experts=st.sets(st.integers(0, EXPERTS - 1), min_size=1))
    def acquire(self, layer: int, experts: set[int]) -> None:
        self.leases.append((layer, self.store.acquire(layer, uses(*experts)), sorted(experts), []))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9))
    def take(self, which: int) -> None:
        layer, lease, left, _ = self.leases.pop(which % len(self.leases))
        try:
            wave = lease.take()
        except CheckpointError as error:
            self.others = [each for each in (error,) if each is not IO_ERROR]
            lease.close()
            return
        except RuntimeError:
            assert self.leases, "a lease alone always gets its slots"
            lease.close()
            return
        assert bool(wave) == bool(left), "a wave is empty when, and only when, all have been had"
        for expert, _ in wave:
            left.remove(expert)
        if wave:
            self.leases.append((layer, lease, left, wave))
        else:
            lease.close()

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        _, lease, _, _ = self.leases.pop(which % len(self.leases))
        with lease:
            pass

    @rule(layer=st.sampled_from(LAYERS), experts=st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True))
    def prefetch(self, layer: int, experts: list[int]) -> None:
        self.store.prefetch([ExpertKey(layer, expert) for expert in experts])

    @rule(
        layer=st.sampled_from(LAYERS),
        experts=st.lists(st.integers(0, EXPERTS - 1), max_size=4, unique=True),
        most=st.integers(0, 3),
    )
    def expect(self, layer: int, experts: list[int], most: int) -> None:
        there = {key for key in self.store.resident() if key.layer == layer and key.expert in experts}
        begun = self.store.expect(layer, experts, most)
        assert begun <= most
        assert there <= self.store.resident(), "an expert that is expected left for another"

    @rule(seed=st.integers(0, 99), stuck=st.booleans(), deaf=st.booleans(), failures=st.integers(0, 1))
    def weather(self, seed: int, stuck: bool, deaf: bool, failures: int) -> None:
        self.disk.shuffle(seed)
        self.disk.is_stuck, self.disk.is_deaf, self.disk.fail_next = stuck, deaf, failures

    @rule(count=st.integers(1, 2))
    def shrink(self, count: int) -> None:
        for slot in self.store.shrink(count):
            self.disk.slots[slot] = None

    @rule(count=st.integers(1, 2))
    def grow(self, count: int) -> None:
        self.store.grow(count)

    @rule(layer=st.sampled_from(LAYERS), experts=st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True))
    def rise(self, layer: int, experts: list[int]) -> None:
        self.gpu.touch(layer, uses(*experts), 1)
        self.gpu.prefetch([ExpertKey(layer, expert) for expert in experts])

    @precondition(lambda self: self.memory.copies)
    @rule(which=st.integers(0, 9), fails_next=st.booleans())
    def an_upload_ends(self, which: int, fails_next: bool) -> None:
        self.memory.copies.pop(which % len(self.memory.copies)).end()
        self.memory.fail_next = fails_next

    @rule(layer=st.sampled_from(LAYERS), experts=st.sets(st.integers(0, EXPERTS - 1), min_size=1))
    def use_the_gpu(self, layer: int, experts: set[int]) -> None:
        with self.gpu.acquire_present(layer, uses(*experts)) as lease:
            here = lease.take()
            assert {expert for expert, _ in here} <= experts
            for expert, slot in here:
                assert self.memory.slots[slot] == ExpertKey(layer, expert), "it had not arrived"
            assert self.gpu.num_leased == len(here)
            assert not lease.take()
        assert not any(copy.done for copy in self.memory.copies), "a step waited for an upload"

    @invariant()
    def the_gpu_has_what_it_says(self) -> None:
        assert self.gpu.resident() <= {key for key in self.memory.slots.values() if key is not None}

    @invariant()
    def errors_are_the_disks(self) -> None:
        assert not self.others

    @invariant()
    def leased_experts_stay_whole(self) -> None:
        for layer, _, _, wave in self.leases:
            for expert, slot in wave:
                assert self.disk.slots[slot] == ExpertKey(layer, expert)

    @invariant()
    def what_is_resident_was_read(self) -> None:
        resident = self.store.resident()
        assert len(resident) + self.store.num_pending <= self.store.num_slots <= self.num_slots
        assert resident <= set(self.disk.slots)
        assert self.store.num_pending == len(self.disk.under_way)
        for key in resident:
            assert self.store.lookup(key) is Residency.HIT
        for key, slot in self.disk.under_way:
            assert self.store.lookup(key) is Residency.PENDING
            assert not (slot in self.disk.unhurried and self.store._leases[slot]), "it is waited for"

    def teardown(self) -> None:
        for _, lease, _, _ in self.leases:
            lease.close()
        self.gpu.drain()
        assert self.gpu.num_leased == self.gpu.num_pending == 0
        self.store.drain()
        assert self.store.num_leased == self.store.num_pending == 0
        self.store.grow(self.num_slots)
        with self.store.acquire(LAYERS[0], uses(*range(EXPERTS))) as lease:  # more than the slots: waves
            self.disk.fail_next = 0
            had = [expert for wave in lease.waves() for expert, _ in wave]
        assert sorted(had) == list(range(EXPERTS))


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase


def store_of(num_slots: int, *, most_reads: int = 16, policy: LRU | LFRU | None = None) -> tuple[ExpertStore, Disk]:
    disk = Disk(num_slots)
    return ExpertStore(LAYERS, EXPERTS, num_slots, disk, policy or LRU(), most_reads=most_reads), disk


def everyone(store: ExpertStore, layer: int, *experts: int) -> list[int]:
    return sorted(expert for wave in run(store, layer, *experts) for expert in wave)


def run(store: ExpertStore, layer: int, *experts: int) -> list[list[int]]:
    with store.acquire(layer, uses(*experts)) as lease:
        return [[expert for expert, _ in wave] for wave in lease.waves()]


def test_hits_come_first_while_misses_are_read() -> None:
    store, disk = store_of(4)
    assert run(store, 3, 0, 1) == [[0, 1]]
    disk.is_stuck = True
    with store.acquire(3, uses(0, 1, 2)) as lease:
        assert [expert for expert, _ in lease.take()] == [0, 1]
        assert len(disk.under_way) == 1, "the miss is on its way while the hits are computed"
        assert [expert for expert, _ in lease.take()] == [2]
        assert lease.take() == []
    stats = store.stats()
    assert (stats.lookups, stats.hits, stats.evictions) == (5, 2, 0)


def test_a_step_of_more_experts_than_slots_runs_in_waves_and_evicts_what_it_has_used() -> None:
    store, _ = store_of(2)
    waves = run(store, 3, 0, 1, 2, 3, 4)
    assert sorted(expert for wave in waves for expert in wave) == [0, 1, 2, 3, 4]
    assert max(map(len, waves)) <= 2
    assert store.stats().evictions == 3


def test_the_least_worth_leaves() -> None:
    store, _ = store_of(2)
    run(store, 3, 0)
    run(store, 3, 1)
    run(store, 3, 0)
    run(store, 3, 2)
    assert store.resident() == {ExpertKey(3, 0), ExpertKey(3, 2)}


def test_layers_share_the_slots() -> None:
    store, _ = store_of(2)
    run(store, 3, 5)
    run(store, 4, 5)
    assert store.resident() == {ExpertKey(3, 5), ExpertKey(4, 5)}


def test_a_failed_read_fails_the_lease_and_nothing_else() -> None:
    store, disk = store_of(3)
    disk.fail_next = 1
    with pytest.raises(CheckpointError, match="cannot read"), store.acquire(3, uses(0, 1)) as lease:
        list(lease.waves())
    store.drain()
    assert store.lookup(ExpertKey(3, 0)) is Residency.MISS
    assert store.num_leased == 0
    assert everyone(store, 3, 0, 1) == [0, 1]


def test_a_long_step_passes_through_few_slots_and_leaves_the_others() -> None:
    """A prompt uses every expert once: it must not cost the ones that answers use."""
    store, _ = store_of(7, most_reads=2, policy=LFRU(2.0))
    for _ in range(8):
        run(store, 3, 0, 1, 2)
    with store.acquire(4, dict.fromkeys(range(EXPERTS), 0.1), num_tokens=2) as lease:
        list(lease.waves())
    assert {ExpertKey(3, 0), ExpertKey(3, 1), ExpertKey(3, 2)} <= store.resident()


def test_prefetch_waits_for_an_idle_disk_and_spares_what_is_worth_more() -> None:
    store, disk = store_of(2)
    run(store, 3, 0, 1)
    assert store.prefetch([ExpertKey(3, 5)]) == 0, "never used: worth less than what would leave"
    run(store, 4, 2)  # evicts one
    store.touch(4, uses(3), 1)
    assert store.prefetch([ExpertKey(4, 3)]) == 1
    assert store.prefetch([ExpertKey(4, 3)]) == 0, "it is on its way"
    store.drain()
    run(store, 4, 3)
    assert (store.stats().prefetched, store.stats().prefetch_hits) == (1, 1)
    disk.is_stuck = True
    lease = store.acquire(3, uses(4))
    store.touch(4, uses(5), 1)
    assert store.prefetch([ExpertKey(4, 5)]) == 0, "the disk is busy"
    list(lease.waves())
    lease.close()


def test_expected_experts_are_read_in_time_and_those_in_vain_are_given_up() -> None:
    store, disk = store_of(4)
    run(store, 3, 0, 1)
    disk.is_stuck = True
    assert store.expect(3, [1, 4, 5, 2], most=2) == 2, "the likeliest that are missing"
    assert [key.expert for key, _ in disk.under_way] == [4, 5]
    assert store.expect(3, [3], most=2) == 0, "two are on their way"
    assert disk.unhurried == {slot for _, slot in disk.under_way}
    with store.acquire(3, uses(0, 1, 4)) as lease:
        assert disk.cancelled == {slot for key, slot in disk.under_way if key.expert == 5}
        assert disk.unhurried == disk.cancelled, "what is asked for is urgent now"
        assert sorted(expert for wave in lease.waves() for expert, _ in wave) == [0, 1, 4]
    store.drain()
    assert store.resident() == {ExpertKey(3, expert) for expert in (0, 1, 4)}
    stats = store.stats()
    assert (stats.lookups, stats.hits, stats.prefetched, stats.prefetch_hits) == (5, 2, 2, 1)


def test_expected_experts_are_read_behind_what_is_asked_for() -> None:
    store, disk = store_of(5, most_reads=2)
    disk.is_stuck = True
    with store.acquire(3, uses(0, 1)) as lease:
        assert store.expect(4, [0, 1, 2, 3], most=9) == 2, "no more than may be under way of those asked for"
        assert disk.unhurried == {slot for key, slot in disk.under_way if key.layer == 4}
        assert sorted(expert for wave in lease.waves() for expert, _ in wave) == [0, 1]


def test_reads_ahead_leave_those_asked_for_their_places() -> None:
    store, disk = store_of(5, most_reads=2)
    disk.is_stuck = True
    assert store.expect(3, [0, 1], most=2) == 2
    with store.acquire(3, uses(4, 5)):
        assert sum(slot not in disk.unhurried for _, slot in disk.under_way) == 2


def test_what_is_asked_for_no_longer_counts_as_read_ahead() -> None:
    store, disk = store_of(5, most_reads=2)
    disk.is_stuck = True
    assert store.expect(3, [4, 5], most=2) == 2
    with store.acquire(3, uses(4, 5)):
        assert store.expect(4, [0, 1], most=2) == 2
        assert sum(slot in disk.unhurried for _, slot in disk.under_way) == 2


def test_nothing_is_read_ahead_while_a_step_waits_for_slots() -> None:
    store, disk = store_of(3, most_reads=2)
    disk.is_stuck = True
    with store.acquire(3, uses(0, 1, 2, 4)) as lease:
        assert store.expect(4, [0], most=1) == 0
        assert sorted(expert for wave in lease.waves() for expert, _ in wave) == [0, 1, 2, 4]
    assert store.expect(4, [0], most=1) == 1


def test_an_expected_expert_that_another_lease_waits_for_is_not_given_up() -> None:
    store, disk = store_of(4)
    disk.is_stuck = True
    assert store.expect(3, [5], most=1) == 1
    with store.acquire(3, uses(5)) as lease:
        store.acquire(3, uses(0)).close()
        assert not disk.cancelled
        assert [expert for expert, _ in lease.take()] == [5]


def test_what_was_given_up_and_is_wanted_after_all_is_read_again() -> None:
    store, disk = store_of(4)
    disk.is_stuck = True
    store.expect(3, [5], most=1)
    store.acquire(3, uses(0)).close()
    assert disk.cancelled
    with store.acquire(3, uses(0, 5)) as lease:
        assert sorted(expert for wave in lease.waves() for expert, _ in wave) == [0, 5]
    assert [disk.slots[slot] for slot in range(4)].count(ExpertKey(3, 5)) == 1


def test_an_expected_read_that_fails_is_nobodys_error() -> None:
    store, disk = store_of(4)
    disk.fail_next = 1
    store.expect(3, [5], most=1)
    store.drain()
    assert everyone(store, 3, 5) == [5]


def test_expected_experts_take_the_place_of_the_least_worth_but_of_none_that_is_expected() -> None:
    store, _ = store_of(2)
    run(store, 3, 0)
    run(store, 3, 1)
    assert store.expect(3, [0, 4, 5], most=2) == 1, "the other slot has one of them"
    store.drain()
    assert store.resident() == {ExpertKey(3, 0), ExpertKey(3, 4)}


def test_an_expert_that_another_lease_has_read_meanwhile_is_had() -> None:
    store, _ = store_of(2)
    first, second = store.acquire(3, uses(0, 1, 2)), store.acquire(3, uses(2))
    with first, second:
        assert [expert for wave in first.waves() for expert, _ in wave] == [0, 1, 2]
        assert [expert for expert, _ in second.take()] == [2]


def test_a_pinned_slot_stays_and_one_is_never_pinned() -> None:
    store, disk = store_of(2)
    run(store, 3, 0, 1)
    slot = store.pin(ExpertKey(3, 0))
    assert slot is not None
    assert store.pin(ExpertKey(3, 1)) is None, "no slot would be left to work with"
    assert store.pin(ExpertKey(3, 5)) is None, "it is not there"
    assert everyone(store, 4, 0, 1, 2, 3) == [0, 1, 2, 3], "through the other slot"
    assert disk.slots[slot] == ExpertKey(3, 0)
    assert store.shrink(2) == [], "one slot that is not pinned stays"
    store.unpin(slot)
    assert store.num_leased == 0
    assert len(store.shrink(2)) == 1


def test_what_is_present_is_leased_and_nothing_is_read() -> None:
    store, disk = store_of(3)
    run(store, 3, 0, 1)
    started = disk.num_started
    with store.acquire_present(3, uses(0, 1, 2)) as lease:
        assert sorted(expert for expert, _ in lease.take()) == [0, 1]
        assert store.num_leased == 2
        assert lease.take() == []
    assert disk.num_started == started
    assert (store.stats().lookups, store.stats().hits) == (5, 2)
    assert store.heat(ExpertKey(3, 2)) > 0, "it was wanted"


def test_shrinking_gives_up_the_least_worth_and_growing_takes_it_back() -> None:
    store, _ = store_of(3)
    for expert in (0, 1, 2):
        run(store, 3, expert)
    assert len(store.shrink(1)) == 1
    assert store.num_slots == 2
    assert store.resident() == {ExpertKey(3, 1), ExpertKey(3, 2)}
    assert len(store.shrink(5)) == 1, "one slot is left to work with"
    assert len(store.grow(9)) == 2
    assert everyone(store, 3, 0, 1, 2) == [0, 1, 2]
    assert len(store.resident()) == 3, "those that came back are used"


def test_heats_of_an_earlier_run_decide_at_first() -> None:
    first, _ = store_of(2, policy=LFRU(2.0))
    for _ in range(9):
        run(first, 3, 0)
    store, _ = store_of(2, policy=LFRU(2.0))
    store.seed({**first.heats(), ExpertKey(99, 0): 1.0})
    run(store, 3, 0)
    run(store, 3, 1)
    run(store, 3, 2)
    run(store, 3, 3)
    assert ExpertKey(3, 0) in store.resident()
    assert store.heats()[ExpertKey(3, 0)] > 8 > store.heats()[ExpertKey(3, 3)]


def test_a_layer_that_is_ahead_does_not_push_out_the_next() -> None:
    """While a prompt is processed the first layers have seen more tokens: age is by each layer's own clock."""
    store, _ = store_of(4, most_reads=1, policy=LFRU(2.0))
    for layer in LAYERS:
        for _ in range(6):
            run(store, layer, 0)
    with store.acquire(3, {0: 6.0, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}, num_tokens=500) as lease:
        list(lease.waves())
    assert {ExpertKey(3, 0), ExpertKey(4, 0)} <= store.resident()


@pytest.mark.parametrize(("slots", "reads"), [(0, 1), (1, 0)])
def test_no_slots_are_refused(slots: int, reads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ExpertStore(LAYERS, EXPERTS, slots, Disk(1), LRU(), most_reads=reads)
