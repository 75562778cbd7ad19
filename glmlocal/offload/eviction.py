"""Which expert leaves when a slot is needed: pure policies over access histories, and a simulation to compare them.

A policy turns an expert's history into one number, its worth; the store evicts whoever is worth least among those that
are not leased. Worth only changes when the expert is used, so a step costs as much as it has experts. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

NEVER = -math.inf  # the worth of what was never used
HALF_LIFE_TOKENS = 64.0  # the best of 16 … 512 over the traces of benchmarks/offload.py
ADMIT_AT = -1.0  # log2 of what a first touch counts: half of one, see ``LFRU``


class Policy(Protocol):
    def touched(self, key: int, worth: float, time: float, weight: float) -> float:
        """What the expert ``key``, worth so much until now, is worth after a use.

        ``time`` is in tokens and never falls; ``weight`` > 0 is how much the use counts: 1 for a token that was
        routed to it now, for a chunk of tokens what ``burst_weight`` says.
        """
        ...


@dataclass(frozen=True, slots=True)
class LRU:
    """Least recently used."""

    def touched(self, key: int, worth: float, time: float, weight: float) -> float:
        return time


@dataclass(frozen=True, slots=True)
class LFRU:
    """Uses that are forgotten exponentially: half of what one counts is gone after ``half_life_tokens``.

    Worth is log2 Σ 2^(t_i / half life), which orders experts like the decayed sum does at any later time, so nothing
    has to be decayed. (Lee et al., LRFU, IEEE Trans. Computers 2001.) An expert whose history has faded is on
    probation: its first use counts 2^ADMIT_AT, so that it does not push out those that were used twice.
    """

    half_life_tokens: float = HALF_LIFE_TOKENS
    admit_at: float = ADMIT_AT

    def touched(self, key: int, worth: float, time: float, weight: float) -> float:
        now = time / self.half_life_tokens + math.log2(weight)
        if worth < now - _FADED:
            return now + self.admit_at
        high, low = (now, worth) if now > worth else (worth, now)
        return high + math.log2(1.0 + math.exp2(low - high))


_FADED = 4.0  # half-lives


@dataclass(frozen=True, slots=True)
class Pinned:
    """Some experts stay for good; the others share the remaining slots as another policy says."""

    pins: frozenset[int]
    others: Policy

    def touched(self, key: int, worth: float, time: float, weight: float) -> float:
        return math.inf if key in self.pins else self.others.touched(key, worth, time, weight)


@dataclass(frozen=True, slots=True)
class Belady:
    """The optimum, which knows the future: whoever is used again last leaves. For comparisons.

    ``uses``: key → the times at which it is used, ascending.
    """

    uses: Mapping[int, Sequence[float]]

    def touched(self, key: int, worth: float, time: float, weight: float) -> float:
        uses = self.uses.get(key, ())
        low, high = 0, len(uses)
        while low < high:  # the first use after now
            middle = (low + high) // 2
            low, high = (middle + 1, high) if uses[middle] <= time else (low, middle)
        return -uses[low] if low < len(uses) else NEVER


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


def hit_rate(steps: Sequence[Sequence[int]], num_slots: int, policy: Policy) -> float:
    """Of the keys that steps ask for, the part that a cache of ``num_slots`` holds. Starts empty.

    Each step's keys are protected while it runs, as by a lease; ``num_slots`` must be at least the longest step.
    """
    worth: dict[int, float] = {}
    held: set[int] = set()
    hits = lookups = 0
    for time, keys in enumerate(steps):
        lookups += len(keys)
        hits += sum(key in held for key in keys)
        for key in keys:
            worth[key] = policy.touched(key, worth.get(key, NEVER), float(time), 1.0)
        asked = set(keys)
        for key in keys:
            if key in held:
                continue
            if len(held) >= num_slots:
                held.remove(min((each for each in held if each not in asked), key=lambda each: (worth[each], each)))
            held.add(key)
    return hits / lookups if lookups else 0.0
