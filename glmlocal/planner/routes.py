"""What a recorded route trace says about hit rates: a model's own curve in place of the fit. Torch-free.

A trace holds how often each expert was used of late. A cache that keeps the hottest experts then finds an expert if it
is among them because of its *other* uses: each use is taken out of its expert's heat before the expert is ranked, else
a trace of few tokens would promise that what happened by chance happens again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

Curve = tuple[float, ...]  # hit rate with 0, 1, … all experts of a layer at hand; rises from 0 to 1

LEAST_TOKENS = 64  # of a trace that is believed: less than one question and its answer
_USE = 0.7  # what a use is worth in a heat: 1 at first, half on average; this fits simulated caches best


def curve_of(heats: Mapping[int, Sequence[float]], num_experts: int) -> Curve | None:
    """``heats``: of each layer's experts, those that were used. The mean over the layers; None of no uses.

    Raises ValueError where a layer has more heats than experts, or one that is not positive.
    """
    curves = [_layer_curve(layer, num_experts) for layer in heats.values() if layer]
    if not curves:
        return None
    return tuple(sum(column) / len(curves) for column in zip(*curves, strict=True))


def at(curve: Curve, fraction: float) -> float:
    """Hit rate with that part of the experts at hand; straight lines between whole numbers of them."""
    place = min(max(fraction, 0.0), 1.0) * (len(curve) - 1)
    left = min(int(place), len(curve) - 2)
    return curve[left] + (place - left) * (curve[left + 1] - curve[left])


def _layer_curve(heats: Sequence[float], num_experts: int) -> Curve:
    if len(heats) > num_experts or min(heats) <= 0:
        raise ValueError(f"{len(heats)} heats of {num_experts} experts")
    rising = sorted(heats)
    hits = [0.0] * (num_experts + 1)  # by the least number of hottest experts that an expert is among
    for heat in rising:
        colder = heat - min(heat, _USE)  # without the use that is looked at
        hotter = len(rising) - bisect_left(rising, colder) - 1 if colder > 0 else None
        for place, share in _places(hotter, len(rising), num_experts):
            hits[place] += heat * share
    total, found, curve = sum(hits), 0.0, []
    for count, each in enumerate(hits):
        found += each / total
        curve.append(min(max(found, count / num_experts), 1.0))  # whoever is kept, so many are found by chance
    return tuple(curve)


def _places(hotter: int | None, used: int, num_experts: int) -> Iterable[tuple[int, float]]:
    """Where the expert stands without that use, and how likely. One that was used once stands anywhere behind those
    that were used otherwise, as good as all that were not."""
    if hotter is not None:
        return ((hotter + 1, 1.0),)
    behind = range(used, num_experts + 1)
    return tuple((place, 1 / len(behind)) for place in behind)
