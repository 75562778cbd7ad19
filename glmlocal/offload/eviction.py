"""Which expert leaves when a slot is needed: pure policies over access histories, and a simulation to compare them.

A policy turns an expert's history into one number, its worth; the store evicts whoever is worth least, by the clock of
its own layer, among those that are not leased. Worth only changes when the expert is used, so a step costs as much as
it has experts. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

NEVER = -math.inf  # the worth of what was never used
HALF_LIFE_TOKENS = 32.0  # 16 … 256 differ by less than a point of hit rate over the traces of benchmarks/offload.py


@dataclass(frozen=True, slots=True)
class History:
    """What is remembered of an expert, in a slot or not."""

    worth: float = NEVER
    heat: float = 0.0  # uses, each forgotten by half in HALF_LIFE_TOKENS
    at: float = 0.0  # when it was used last, in tokens


class Policy(Protocol):
    def touched(self, key: int, before: History, time: float, weight: float) -> History:
        """An expert's history after a use.

        ``time`` is in tokens and never falls; ``weight`` > 0 is how much the use counts: 1 for a token that was
        routed to it now, for a chunk of tokens what ``burst_weight`` says.
        """
        ...


def heat_after(before: History, time: float, weight: float) -> float:
    return before.heat * math.exp2((before.at - time) / HALF_LIFE_TOKENS) + weight


@dataclass(frozen=True, slots=True)
class LRU:
    """Least recently used."""

    def touched(self, key: int, before: History, time: float, weight: float) -> History:
        return History(time, heat_after(before, time, weight), time)


@dataclass(frozen=True, slots=True)
class LFRU:
    """Least frequently and recently used: being used twice as often is worth as much as ``boost_tokens`` tokens of age.

    What was used once is on probation: it goes before all that were used more lately. A chunk of a prompt uses all
    experts a little, which makes none of them worth more than those that answers use.
    """

    boost_tokens: float

    def touched(self, key: int, before: History, time: float, weight: float) -> History:
        heat = heat_after(before, time, weight)
        return History(time + self.boost_tokens * math.log2(heat), heat, time)


def lfru(num_slots: int, uses_per_token: int) -> LFRU:
    """The default: the boost is half the time in which a cache of ``num_slots`` would be filled anew.

    ``uses_per_token``: experts that one token uses in all layers that share the slots.
    """
    return LFRU(0.5 * num_slots / max(1, uses_per_token))


@dataclass(frozen=True, slots=True)
class Pinned:
    """Some experts stay for good; the others share the remaining slots as another policy says."""

    pins: frozenset[int]
    others: Policy

    def touched(self, key: int, before: History, time: float, weight: float) -> History:
        after = self.others.touched(key, before, time, weight)
        return History(math.inf, after.heat, time) if key in self.pins else after


@dataclass(frozen=True, slots=True)
class Belady:
    """The optimum, which knows the future: whoever is used again last leaves. For comparisons.

    ``uses``: key → the times at which it is used, ascending.
    """

    uses: Mapping[int, Sequence[float]]

    def touched(self, key: int, before: History, time: float, weight: float) -> History:
        uses = self.uses.get(key, ())
        low, high = 0, len(uses)
        while low < high:  # the first use after now
            middle = (low + high) // 2
            low, high = (middle + 1, high) if uses[middle] <= time else (low, middle)
        return History(-uses[low] if low < len(uses) else NEVER, 0.0, time)


def burst_weight(num_uses: int, num_tokens: int, half_life_tokens: float = HALF_LIFE_TOKENS) -> float:
    """What ``num_uses`` of an expert by a chunk of tokens count at the chunk's end: evenly spread, decayed meanwhile.

    1 for one use by one token; a chunk far longer than the half-life counts its share of uses and no more.
    """
    per_token = num_uses / num_tokens
    return per_token * sum_of_decay(num_tokens, half_life_tokens)


def sum_of_decay(num_tokens: int, half_life_tokens: float) -> float:
    """Σ 2^(-i / half life) over the chunk's tokens, i = 0 … num_tokens - 1."""
    step = math.exp2(-1.0 / half_life_tokens)
    return (1.0 - step**num_tokens) / (1.0 - step)


def hit_rate(steps: Sequence[Sequence[int]], num_slots: int, policy: Policy, steps_per_token: int = 1) -> float:
    """Of the keys that steps ask for, the part that a cache of ``num_slots`` holds. Starts empty.

    Each step's keys are protected while it runs, as by a lease; ``num_slots`` must be at least the longest step.
    ``steps_per_token``: layers that share the cache, one step each, every one by its own clock as in ``ExpertStore``;
    1: one clock for all.
    """
    clock = [0] * steps_per_token  # tokens that each layer has seen
    layer_of: dict[int, int] = {}
    known: dict[int, History] = {}
    held: set[int] = set()
    hits = lookups = 0
    for place, keys in enumerate(steps):
        layer = place % steps_per_token
        clock[layer] = place // steps_per_token
        layer_of |= dict.fromkeys(keys, layer)
        lookups += len(keys)
        hits += sum(key in held for key in keys)
        for key in keys:
            known[key] = policy.touched(key, known.get(key, History()), clock[layer], 1.0)
        asked = set(keys)
        for key in keys:
            if key in held:
                continue
            if len(held) >= num_slots:
                held.remove(min(held - asked, key=lambda each: (known[each].worth - clock[layer_of[each]], each)))
            held.add(key)
    return hits / lookups if lookups else 0.0
