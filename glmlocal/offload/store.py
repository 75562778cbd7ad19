"""ExpertStore: which experts are in which slots. The only mutable map of offloading; it moves no bytes itself.

Holds at all times: an expert is in at most one slot; a leased slot is never given to another expert; nor is one that is
being read into; releasing everything leaves no slot leased; one slot at least is not pinned. One thread uses a store.

The slots are those of one tier: in RAM, read from NVMe, or on a GPU, uploaded from RAM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from glmlocal.errors import GlmlocalError
from glmlocal.offload.eviction import NEVER, History, Policy, heat_after
from glmlocal.offload.tiers import ExpertKey, Residency

_EMPTY = -1
_POLL_S = 0.5  # a wait for the disk is in turns of it, so that Ctrl-C is heard


@dataclass(frozen=True, slots=True)
class Arrival:
    """A read that has ended. ``error`` None and not cancelled: the record is in the slot, whole and checked."""

    slot: int
    error: GlmlocalError | None = None
    is_cancelled: bool = False


class Source(Protocol):
    """Reads an expert's home copy into a slot. ``nvme.PackSource`` does; tests have faulty ones."""

    def start(self, key: ExpertKey, slot: int, *, urgent: bool = True) -> bool:
        """Begin to read; False: too much is under way already. The slot is the reader's until it has arrived.

        Not ``urgent``: only while nothing that is urgent waits.
        """
        ...

    def hurry(self, slot: int) -> None:
        """What is read into the slot has become urgent."""
        ...

    def cancel(self, slot: int) -> None:
        """Nobody waits for what is read into the slot: it may arrive as cancelled, and soon."""
        ...

    def arrival(self, timeout_s: float) -> Arrival | None:
        """The next read that has ended; None: none has in time, or nothing is under way."""
        ...


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Since the start. ``lookups`` are distinct experts of a layer and step; a hit was in its slot when asked for."""

    lookups: int = 0
    hits: int = 0
    evictions: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    stall_s: float = 0.0  # with nothing to do but wait for the disk
    num_tokens: int = 0  # that passed the layer which saw most


class ExpertStore:
    """``num_slots`` slots over experts whose homes a ``Source`` reads.

    ``layers`` have ``num_experts`` experts each. ``most_reads``: how many may be under way at once; while a prompt is
    processed, twice as many slots pass from expert to expert and the others keep what they hold.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        num_slots: int,
        source: Source,
        policy: Policy,
        *,
        most_reads: int = 16,
    ) -> None:
        if num_slots < 1 or most_reads < 1:
            raise ValueError(f"an expert store wanted at least 1 slot and 1 read, found {num_slots} and {most_reads}")
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._layers, self._num_experts = tuple(layers), num_experts
        self._source, self._policy, self._most_reads = source, policy, most_reads
        self._known: dict[int, History] = {}  # by key
        self._slot_of: dict[int, int] = {}
        self._key_in = [_EMPTY] * num_slots
        self._leases = [0] * num_slots
        self._num_pins = 0  # of the leases, those that are pins
        self._pending: set[int] = set()  # slots
        self._unhurried: set[int] = set()  # of them, those whose reads are not urgent
        self._retired: set[int] = set()  # slots whose memory was given back
        # Worth of what is in the slot, less its layer's time; inf where it may not be evicted.
        self._rank = np.full(num_slots, NEVER)
        self._row_in = np.full(num_slots, _EMPTY)
        self._open: list[Lease] = []
        self._prefetched: set[int] = set()  # keys, until they are used
        self._expected: set[int] = set()  # keys that are read because the next acquire may ask for them
        self._time = [0.0] * len(layers)  # tokens that the layer has seen
        self._counts = [0] * 5  # lookups, hits, evictions, prefetched, prefetch hits
        self._stall_s = 0.0

    @property
    def num_slots(self) -> int:
        """That have memory."""
        return len(self._key_in) - len(self._retired)

    @property
    def layers(self) -> tuple[int, ...]:
        return self._layers

    @property
    def num_leased(self) -> int:
        return sum(count > 0 for count in self._leases)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def stall_s(self) -> float:
        """As of ``StoreStats``."""
        return self._stall_s

    def lookup(self, key: ExpertKey) -> Residency:
        """Where the expert is; changes nothing."""
        slot = self._slot_of.get(self._index(key))
        if slot is None:
            return Residency.MISS
        return Residency.PENDING if slot in self._pending else Residency.HIT

    def resident(self) -> frozenset[ExpertKey]:
        """Experts that are in their slots."""
        return frozenset(self._key(key) for key, slot in self._slot_of.items() if slot not in self._pending)

    def touch(self, layer: int, uses: Mapping[int, float], num_tokens: int) -> None:
        """``num_tokens`` tokens have been routed to these experts of the layer, with what their uses count."""
        row = self._row[layer]
        self._time[row] += num_tokens
        self._rank[self._row_in == row] -= num_tokens
        now = self._time[row]
        for expert, weight in uses.items():
            key = row * self._num_experts + expert
            self._known[key] = self._policy.touched(key, self._known.get(key, History()), now, weight)
            slot = self._slot_of.get(key)
            if slot is not None and self._rank[slot] != np.inf:
                self._rank[slot] = self._rank_of(key)

    def acquire(self, layer: int, uses: Mapping[int, float], num_tokens: int = 1) -> Lease:
        """Lease experts of a layer, which counts as using them; reads of those that are missing begin at once.

        Reads that were begun for it in vain (``expect``) are given up.
        """
        self._collect(0.0)
        self.touch(layer, uses, num_tokens)
        base = self._row[layer] * self._num_experts
        for key in self._expected.difference(base + expert for expert in uses):
            if (slot := self._slot_of.get(key)) in self._pending:
                self._source.cancel(slot)
        self._expected.clear()
        return Lease(self, [base + expert for expert in uses], base)

    def acquire_present(self, layer: int, uses: Mapping[int, float], num_tokens: int = 1) -> Lease:
        """Lease those of the experts that are in their slots, which counts as using all of them. Nothing is read."""
        self._collect(0.0)
        self.touch(layer, uses, num_tokens)
        base = self._row[layer] * self._num_experts
        return Lease(self, [base + expert for expert in uses], base, reads=False)

    def pin(self, key: ExpertKey) -> int | None:
        """The slot of an expert, leased until ``unpin`` without counting as a use; None where it is not in its slot,
        or where no slot would be left to work with."""
        slot = self._slot_of.get(self._index(key))
        if slot is None or slot in self._pending or self._num_pins + 2 > self.num_slots:
            return None
        self._num_pins += 1
        self._pin(slot)
        return slot

    def unpin(self, slot: int) -> None:
        self._num_pins -= 1
        self._unpin(slot)

    def heat(self, key: ExpertKey) -> float:
        """How often the expert was used of late, in a slot or not (``eviction.History``)."""
        known = self._known.get(self._index(key))
        return 0.0 if known is None else heat_after(known, self._time[self._row[key.layer]], 0.0)

    def prefetch(self, keys: Sequence[ExpertKey]) -> int:
        """Begin to read experts that are likely to be wanted, if the disk is idle; how many reads have begun.

        Only what is worth less leaves for them.
        """
        self._collect(0.0)
        begun = 0
        for key in map(self._index, keys):
            if self._pending and not begun:
                break
            if key in self._slot_of or len(self._pending) >= self._most_reads:
                continue
            slot = int(np.argmin(self._rank))
            if self._rank[slot] == np.inf or not self._rank[slot] <= self._rank_of(key) or not self._start(key, slot):
                break
            begun += 1
            self._prefetched.add(key)
        self._counts[3] += begun
        return begun

    def expect(self, layer: int, experts: Sequence[int], most: int) -> int:
        """Begin to read what the next ``acquire`` of the layer will probably ask for, likeliest first, behind whatever
        is asked for now; how many of ``most`` reads have begun. None of these experts leaves for them."""
        self._collect(0.0)
        most = min(most, self._most_reads) - len(self._unhurried)
        if any(lease._missing for lease in self._open):  # they wait for slots
            return 0
        keys = [self._row[layer] * self._num_experts + expert for expert in experts]
        kept = [slot for slot in map(self._slot_of.get, keys) if slot is not None]
        ranks, self._rank[kept] = self._rank[kept], np.inf
        begun: list[int] = []
        for key in keys:
            if len(begun) >= most:
                break
            if key in self._slot_of:
                continue
            slot = int(np.argmin(self._rank))
            if self._rank[slot] == np.inf or not self._start(key, slot, urgent=False):
                break
            begun.append(key)
        self._rank[kept] = ranks
        self._expected.update(begun)
        self._prefetched.update(begun)
        self._counts[3] += len(begun)
        return len(begun)

    def shrink(self, num_slots: int) -> list[int]:
        """Give up so many slots, of those worth least; those whose memory may go. Leased ones stay."""
        gone: list[int] = []
        while len(gone) < num_slots and self.num_slots > 1 + self._num_pins:
            slot = int(np.argmin(self._rank))
            if self._rank[slot] == np.inf:
                break
            self._empty(slot)
            self._retired.add(slot)
            self._rank[slot] = np.inf
            gone.append(slot)
        return gone

    def grow(self, num_slots: int) -> list[int]:
        """Take so many of the slots back that ``shrink`` gave up; which."""
        back = sorted(self._retired)[:num_slots]
        for slot in back:
            self._retired.discard(slot)
            self._rank[slot] = NEVER
        return back

    def drain(self) -> None:
        """Wait for all reads that are under way."""
        while self._pending:
            self._collect(_POLL_S)

    def stats(self) -> StoreStats:
        lookups, hits, evictions, prefetched, prefetch_hits = self._counts
        num_tokens = int(max(self._time, default=0))
        return StoreStats(lookups, hits, evictions, prefetched, prefetch_hits, self._stall_s, num_tokens)

    def heats(self) -> dict[ExpertKey, float]:
        """How hot every expert that was ever used is at the present time of its layer."""
        return {
            self._key(key): heat_after(known, self._time[key // self._num_experts], 0.0)
            for key, known in self._known.items()
        }

    def seed(self, heats: Mapping[ExpertKey, float]) -> None:
        """Begin with the heats (> 0) of an earlier run; experts are not read."""
        for key, heat in heats.items():
            if key.layer in self._row and 0 <= key.expert < self._num_experts:
                index = self._index(key)
                self._known[index] = self._policy.touched(index, History(), 0.0, heat)

    # What leases are made of.

    def _index(self, key: ExpertKey) -> int:
        return self._row[key.layer] * self._num_experts + key.expert

    def _key(self, index: int) -> ExpertKey:
        return ExpertKey(self._layers[index // self._num_experts], index % self._num_experts)

    def _pin(self, slot: int) -> None:
        self._leases[slot] += 1
        self._rank[slot] = np.inf
        if slot in self._unhurried:
            self._unhurried.discard(slot)
            self._source.hurry(slot)

    def _unpin(self, slot: int) -> None:
        self._leases[slot] -= 1
        if not self._leases[slot] and slot not in self._pending:
            key = self._key_in[slot]
            self._rank[slot] = NEVER if key == _EMPTY else self._rank_of(key)

    def _rank_of(self, key: int) -> float:
        known = self._known.get(key)
        return NEVER if known is None else known.worth - self._time[key // self._num_experts]

    def _make_room(self) -> int | None:
        """A slot that may be overwritten; None while all are leased or being read into."""
        if len(self._pending) - len(self._unhurried) >= self._most_reads:
            return None
        slot = int(np.argmin(self._rank))
        return None if self._rank[slot] == np.inf else slot

    def _start(self, key: int, slot: int, *, urgent: bool = True) -> bool:
        if not self._source.start(self._key(key), slot, urgent=urgent):
            return False
        if not urgent:
            self._unhurried.add(slot)
        self._counts[2] += self._key_in[slot] != _EMPTY
        self._empty(slot)
        self._slot_of[key], self._key_in[slot] = slot, key
        self._row_in[slot] = key // self._num_experts
        self._pending.add(slot)
        self._rank[slot] = np.inf
        return True

    def _empty(self, slot: int) -> None:
        key = self._key_in[slot]
        if key != _EMPTY:
            del self._slot_of[key]
            self._prefetched.discard(key)
        self._key_in[slot] = self._row_in[slot] = _EMPTY

    def _collect(self, timeout_s: float) -> bool:
        """Take note of reads that have ended, waiting for the first; False when there was none."""
        found = False
        while self._pending and (arrival := self._source.arrival(0.0 if found else timeout_s)) is not None:
            found = True
            slot = arrival.slot
            self._pending.discard(slot)
            self._unhurried.discard(slot)
            if arrival.error is not None or arrival.is_cancelled:
                for lease in self._open:
                    lease._lose(self._key_in[slot], arrival.error)
                self._empty(slot)
                self._leases[slot] = 0
            key = self._key_in[slot]
            if not self._leases[slot]:
                self._rank[slot] = NEVER if key == _EMPTY else self._rank_of(key)
        return found

    def _wait(self) -> None:
        start_s = time.perf_counter()
        try:
            self._collect(_POLL_S)
        finally:
            self._stall_s += time.perf_counter() - start_s


class Lease:
    """Experts of one layer for one step: leased those that are there, on their way those that are missing.

    A context manager; leaving it releases what is still leased. Reads that were begun go on and are kept.
    """

    def __init__(self, store: ExpertStore, keys: Sequence[int], base: int, *, reads: bool = True) -> None:
        """``reads`` False: of those that are there alone."""
        self._store, self._base = store, base
        self._here: list[int] = []  # keys, leased and not handed out yet
        self._handed: list[int] = []  # slots
        self._waiting: list[int] = []  # keys whose read was begun, leased as well
        self._missing: list[int] = []  # keys for which there was no slot yet
        self._error: GlmlocalError | None = None  # why one of them could not be read
        store._open.append(self)
        for key in keys:
            slot = store._slot_of.get(key)
            is_here = slot is not None and slot not in store._pending
            if not reads and not is_here:
                continue
            if slot is None:
                self._missing.append(key)
                continue
            store._pin(slot)
            (self._here if is_here else self._waiting).append(key)
            store._counts[1] += is_here
            store._counts[4] += key in store._prefetched
            store._prefetched.discard(key)
        store._counts[0] += len(keys)
        self._request()

    @property
    def is_over(self) -> bool:
        """All that are left are present: a ``take`` brings them, and that is all."""
        return not self._waiting and not self._missing

    def waves(self) -> Iterator[list[tuple[int, int]]]:
        """(expert, slot) of all, in waves: first those that are here, then whoever has arrived.

        A wave is leased until the next is asked for. Raises what the source says when an expert cannot be read: of
        a pack, CheckpointError.
        """
        while wave := self.take():
            yield wave

    def take(self) -> list[tuple[int, int]]:
        """The next wave, waiting for the disk where nothing else is left; empty when all have been had."""
        store = self._store
        self._release_handed()
        self._advance()
        while not self._here:
            if not self._waiting and not self._missing:
                return []
            if not store._pending:
                raise RuntimeError("all slots are held by other leases")
            store._wait()
            self._advance()
        wave = [(key - self._base, store._slot_of[key]) for key in self._here]
        self._handed = [slot for _, slot in wave]
        self._here = []
        return wave

    def close(self) -> None:
        self._release_handed()
        for key in (*self._here, *self._waiting):
            self._store._unpin(self._store._slot_of[key])
        self._here, self._waiting, self._missing = [], [], []
        if self in self._store._open:
            self._store._open.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _release_handed(self) -> None:
        for slot in self._handed:
            self._store._unpin(slot)
        self._handed = []

    def _request(self) -> None:
        """Begin as many of the missing reads as there are slots for."""
        store = self._store
        while self._missing:
            key = self._missing[0]
            slot = store._slot_of.get(key)  # another lease has asked for it meanwhile
            if slot is None:
                slot = store._make_room()
                if slot is None or not store._start(key, slot):
                    return
            store._pin(slot)
            self._waiting.append(key)
            self._missing.pop(0)

    def _advance(self) -> None:
        """Ask for more, and sort out what has arrived: what is asked for may be there, read for another lease."""
        if self._error is not None:
            raise self._error
        self._request()
        pending, slot_of = self._store._pending, self._store._slot_of
        self._here += [key for key in self._waiting if slot_of[key] not in pending]
        self._waiting = [key for key in self._waiting if slot_of[key] in pending]

    def _lose(self, key: int, error: GlmlocalError | None) -> None:
        """It could not be read; without an error: it was given up before this lease asked for it, and is read again."""
        if key in self._waiting:
            self._waiting.remove(key)
            self._missing += [key] if error is None else []
            self._error = self._error or error
