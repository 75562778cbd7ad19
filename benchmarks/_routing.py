"""Routing to measure offload with: fixed traces like what is known of real ones, guesses that are right so often."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from glmlocal.offload import eviction

Trace = list[list[list[int]]]  # [token][layer] → experts


def near_uniform(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> Trace:
    """Every token chooses anew, all experts alike: what the router's training aims at over long runs."""
    generator = random.Random(seed)
    return [[generator.sample(range(experts), top_k) for _ in range(layers)] for _ in range(tokens)]


def working_set(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> Trace:
    """As measured on GLM-5 (docs/landscape): over 128 tokens about 70 % of the experts, 13 % new in the next 128, and a
    quarter of a token's experts are those of the token before."""
    generator = random.Random(seed)
    trace: Trace = []
    sets = [generator.sample(range(experts), round(0.6 * experts)) for _ in range(layers)]
    for token in range(tokens):
        step = []
        for layer, members in enumerate(sets):
            if token % 4 == 3:  # one comes in, one goes
                outside = [e for e in range(experts) if e not in members]
                members[generator.randrange(len(members))] = generator.choice(outside)
            before = trace[-1][layer] if trace else []
            chosen = set(e for e in before if generator.random() < 0.25)
            weights = [1.0 / (rank + 4) for rank in range(len(members))]
            while len(chosen) < top_k:
                chosen.add(generator.choices(members, weights)[0])
            step.append(sorted(chosen))
        trace.append(step)
    return trace


TRACES = {"near-uniform": near_uniform, "working-set": working_set}


def describe(trace: Trace, experts: int) -> dict[str, float]:
    """What landscape.md reports of real traces, of the middle layer."""
    layer = len(trace[0]) // 2
    steps = [set(step[layer]) for step in trace]
    first, second = set().union(*steps[:128]), set().union(*steps[128:256])
    shared = [len(one & two) / len(one) for one, two in pairwise(steps)]
    return {
        "used_by_128_tokens": round(len(first) / experts, 3),
        "new_in_the_next_128": round(len(second - first) / experts, 3),
        "shared_with_the_token_before": round(statistics.mean(shared), 3),
    }


def policies(trace: Trace, experts: int, fraction: float) -> dict[str, float]:
    """Hit rates of one pool for all layers, as the store is one."""
    layers = len(trace[0])
    steps = [[layer * experts + e for e in step[layer]] for step in trace for layer in range(layers)]
    uses: dict[int, list[float]] = {}
    for place, keys in enumerate(steps):
        for key in keys:
            uses.setdefault(key, []).append(float(place))
    slots = round(fraction * layers * experts)
    lfru = eviction.lfru(slots, layers * len(trace[0][0]))
    found = {
        "lfru": eviction.hit_rate(steps, slots, lfru, layers),
        "lru": eviction.hit_rate(steps, slots, eviction.LRU()),
        "belady": eviction.hit_rate(steps, slots, eviction.Belady(uses)),
    }
    return {name: round(value, 4) for name, value in found.items()}


def guesses(choices: Sequence[Sequence[int]], num_experts: int, recall: float) -> list[Tensor]:
    """int32 [1, top_k] for each of the choices, likeliest first."""
    generator, noise = np.random.default_rng(7), noise_of(recall, num_experts, len(choices[0]))
    found = []
    for chosen in choices:
        scores = -np.sort(-generator.standard_normal(num_experts))
        others = np.setdiff1d(np.arange(num_experts), chosen)
        of_expert = np.empty(num_experts)
        of_expert[generator.permutation(chosen)] = scores[: len(chosen)]
        of_expert[generator.permutation(others)] = scores[len(chosen) :]
        seen = of_expert + noise * generator.standard_normal(num_experts)
        found.append(torch.from_numpy(np.argsort(-seen)[: len(chosen)].astype(np.int32))[None])
    return found


def noise_of(recall: float, num_experts: int, top_k: int) -> float:
    """The noise, in standard deviations of scores, through which ``recall`` of the highest are still the highest."""
    generator = np.random.default_rng(3)
    scores, noise = (generator.standard_normal((1000, num_experts)) for _ in range(2))
    right = np.zeros(scores.shape, bool)
    np.put_along_axis(right, np.argsort(-scores)[:, :top_k], True, 1)
    low, high = 0.0, 30.0
    for _ in range(20):
        middle = (low + high) / 2
        guess = np.argsort(-(scores + middle * noise))[:, :top_k]
        low, high = (middle, high) if np.take_along_axis(right, guess, 1).mean() > recall else (low, middle)
    return (low + high) / 2
