"""Which device holds which layer, and how many of its experts. Pure arithmetic on byte counts; knows no models.

Decode passes one layer after the other, so what counts is the sum of the layers' times: the fastest GPUs are filled
first, and equal ones share evenly. Each range is contiguous: activations cross between GPUs once per range.
Every rule is monotone: more memory never moves a layer, nor an expert, to a slower place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import mul

_STEPS = 16  # of a bisection over how full a GPU is: to 2e-5 of its memory


def pack(loads: Sequence[int], budgets: Sequence[float]) -> list[int] | None:
    """Device of each layer, in order, when every device takes as many as it can hold; None when they do not all fit.

    No other contiguous split in this order fits where this one does not.
    """
    return pack_runs(_runs(loads), budgets)


def _runs(loads: Sequence[int]) -> list[tuple[int, int]]:
    """Loads and how many of the same follow one another: most layers are alike."""
    return [(load, len(list(run))) for load, run in groupby(loads)]


def pack_runs(runs: Sequence[tuple[int, int]], budgets: Sequence[float]) -> list[int] | None:
    """``pack`` of (load, how many of the same follow one another)."""
    owners: list[int] = []
    device, used = 0, 0
    for load, left in runs:
        while left:
            if device == len(budgets):
                return None
            taken = _most(load, left, budgets[device] - used)
            if taken == 0:
                device, used = device + 1, 0
            owners += [device] * taken
            used, left = used + taken * load, left - taken
    return owners


def _most(load: int, count: int, room: float) -> int:
    """How many of ``count`` such loads there is room for."""
    if room >= load * count:
        return count
    return int(room // load) if room >= load > 0 else 0


def spread(loads: Sequence[int], budgets: Sequence[int], rates: Sequence[float]) -> list[int] | None:
    """``pack``, with the devices of the slowest rate that is needed filled evenly. Devices come fastest first."""
    count = 0
    while count < len(budgets):
        faster, count = count, sum(rate >= rates[count] for rate in rates)
        if pack(loads, budgets[:count]) is not None:
            return _level(loads, budgets[:faster], budgets[faster:count], 1.0)
    return None


def level(loads: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """The split that fills every device to the same fraction of its budget, the least there is; it may be above 1."""
    factor = 1.0
    while pack(loads, [budget * factor for budget in budgets]) is None:
        factor *= 2
    return _level(loads, (), budgets, factor)


def _level(loads: Sequence[int], full: Sequence[int], shared: Sequence[int], most: float) -> list[int]:
    """The first devices full, the others up to the same least fraction (at most ``most``, which is enough)."""
    if len(full) + len(shared) == 1:
        return [0] * len(loads)
    low, high, runs = 0.0, most, _runs(loads)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = pack_runs(runs, [*full, *(budget * middle for budget in shared)]) is not None
        low, high = (low, middle) if fits else (middle, high)
    owners = pack_runs(runs, [*full, *(budget * high for budget in shared)])
    assert owners is not None, "most is enough"
    return owners


def fill(sizes: Sequence[int], counts: Sequence[int], free: int) -> list[int]:
    """How many experts each layer gets, of ``counts`` of ``sizes`` bytes: one each in turn, until one does not fit.

    The chance that an expert is there rises steeply at first and ever more slowly then: even shares are the fastest.
    """
    low, high, alike = 0, max(counts, default=0), Counter(zip(sizes, counts, strict=True))
    while low < high:  # the number of whole rounds
        middle = (low + high + 1) // 2
        needed = sum(layers * size * min(middle, count) for (size, count), layers in alike.items())
        low, high = (middle, high) if needed <= free else (low, middle - 1)
    given = [min(low, count) for count in counts]
    free -= sum(map(mul, sizes, given))
    for layer, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if given[layer] < count:
            if size > free:
                break
            given[layer] += 1
            free -= size
    return given


def over(loads: Sequence[int], owners: Sequence[int], budgets: Sequence[int]) -> bool:
    """Does any device have more than its budget?"""
    used = [0] * len(budgets)
    for load, owner in zip(loads, owners, strict=True):
        used[owner] += load
    return any(each > budget for each, budget in zip(used, budgets, strict=True))
