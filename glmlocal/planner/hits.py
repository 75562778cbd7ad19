"""How often a routed expert is found in a tier that holds some of them, and how long a layer waits for the rest.

Torch-free, and exact expectations instead of simulations: nothing here depends on a seed, and because experts fall
into tiers independently, more experts in a faster tier never make any of it larger.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, comb

from glmlocal.planner import routes
from glmlocal.planner.routes import Curve

KIND_BELOW = 0.10  # the fit was made above this fraction and is too kind below: a straight line to 0 instead


def hit_rate(fraction: float, curve: Curve | None = None) -> float:
    """Of the routed experts that tokens ask for, the part that is there when ``fraction`` of them is.

    From the model's own ``curve`` where it has a route trace, else from a fit:

    1 − (1 − f^0.52)^1.675: a fit over hosts and eviction policies (design.md §8). Rises from 0 to 1, never steeper.
    """
    if curve is not None:
        return routes.at(curve, fraction)
    if fraction < KIND_BELOW:
        return max(fraction, 0.0) / KIND_BELOW * _fit(KIND_BELOW)
    return _fit(min(fraction, 1.0))


def _fit(fraction: float) -> float:
    return float(1.0 - (1.0 - fraction**0.52) ** 1.675)


def distinct_experts(num_experts: int, per_token: int, num_tokens: int) -> float:
    """Experts of a layer that ``num_tokens`` tokens touch together, each choosing evenly and on its own."""
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** num_tokens)


@lru_cache(maxsize=1 << 14)
def expected_wait(experts: float, near: float, there: float, busy: float, miss: float, far: float) -> float:
    """Seconds that a layer takes for ``experts`` experts: E[max(busy, misses · miss, far misses · far)].

    Each expert is in the fastest tier with chance ``near``, in that or the next with chance ``there`` ≥ near.
    ``busy``: of the fastest tier, were everything there; ``miss``: of one expert outside it, computed; ``far``: of
    reading one that is in neither. (design.md §8: the sum of these maxima, not the maximum of their sums.)

    The fastest tier is charged for all experts, hits or not: a plan never promises that a CPU makes a GPU faster than
    the GPU is alone, and more memory can then not predict slower.
    """
    count = max(1, ceil(experts))
    share = experts / count  # each of the ``count`` stands for so many
    there = max(near, min(there, 1.0))
    total = 0.0
    for lost in range(count + 1):
        chance_lost = comb(count, lost) * (1 - near) ** lost * near ** (count - lost)
        if chance_lost == 0.0:
            continue
        beyond = (1 - there) / (1 - near) if near < 1 else 0.0
        for distant in range(lost + 1):
            chance = chance_lost * comb(lost, distant) * beyond**distant * (1 - beyond) ** (lost - distant)
            total += chance * max(busy, lost * share * miss, distant * share * far)
    return total
