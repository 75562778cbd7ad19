"""Splitting layers over devices, and sharing room among them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlocal.planner import layers

LOADS = st.lists(st.sampled_from([7, 20]) | st.integers(1, 50), min_size=1, max_size=9)  # many alike, as layers are
BUDGETS = st.lists(st.integers(1, 120), min_size=1, max_size=4)


def contiguous(num_layers: int, num_devices: int):
    """Every way to give consecutive layers to devices in their order."""
    for owners in itertools.combinations_with_replacement(range(num_devices), num_layers):
        yield list(owners)


@given(LOADS, BUDGETS)
def test_pack_finds_a_split_whenever_there_is_one(loads, budgets):
    possible = any(not layers.over(loads, owners, budgets) for owners in contiguous(len(loads), len(budgets)))
    owners = layers.pack(loads, budgets)
    assert (owners is not None) == possible
    if owners is not None:
        assert len(owners) == len(loads)
        assert owners == sorted(owners)
        assert not layers.over(loads, owners, budgets)


@given(LOADS, BUDGETS)
def test_level_is_the_least_even_fill(loads, budgets):
    def fullest(owners):
        return max(sum(x for x, o in zip(loads, owners, strict=True) if o == d) / b for d, b in enumerate(budgets))

    best = min(fullest(owners) for owners in contiguous(len(loads), len(budgets)))
    assert fullest(layers.level(loads, budgets)) == pytest.approx(best, rel=1e-3, abs=1e-3)


def test_equal_gpus_share_evenly_and_slower_ones_get_only_what_is_left():
    assert layers.spread([10] * 8, [100, 100], [5, 5]) == [0] * 4 + [1] * 4
    assert layers.spread([10] * 8, [100, 100], [9, 5]) == [0] * 8
    assert layers.spread([10] * 8, [60, 100, 100], [9, 5, 5]) == [0] * 6 + [1, 2]
    assert layers.spread([10] * 8, [30, 40], [9, 5]) is None


def test_fill_gives_one_each_in_turn():
    assert layers.fill([10, 10, 10], [4, 4, 4], 50) == [2, 2, 1]
    assert layers.fill([10, 10, 10], [4, 1, 4], 70) == [3, 1, 3]
    assert layers.fill([10, 0, 30], [2, 0, 2], 39) == [1, 0, 0]
    assert layers.fill([10], [4], 1000) == [4]
    assert layers.fill([], [], 10) == []


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8)), max_size=6), st.integers(0, 600), st.integers(0, 50))
def test_more_room_never_takes_an_expert_away(sizes_and_counts, free, more):
    sizes, counts = [s for s, _ in sizes_and_counts], [c for _, c in sizes_and_counts]
    before, after = layers.fill(sizes, counts, free), layers.fill(sizes, counts, free + more)
    assert all(a <= b <= c for a, b, c in zip(before, after, counts, strict=True))
    assert sum(s * n for s, n in zip(sizes, before, strict=True)) <= free
    missing = [s for s, n, c in zip(sizes, before, counts, strict=True) if n < c]
    if missing:  # no room is left for the largest of those that did not get in
        assert free - sum(s * n for s, n in zip(sizes, before, strict=True)) < max(missing)


@given(st.lists(st.sampled_from([0, 7, 20]) | st.integers(0, 50), max_size=12), BUDGETS)
def test_pack_gives_every_device_as_much_as_it_can_hold(loads, budgets):
    """One layer after the other, as it is done with many alike at once; the last device takes all that is left."""
    device, used, wanted = 0, 0, []
    for load in loads:
        while device < len(budgets) and used + load > budgets[device]:
            device, used = device + 1, 0
        wanted.append(device)
        used += load
    assert layers.pack(loads, [*budgets, float("inf")]) == wanted


def test_fill_counts_layers_that_are_alike():
    assert layers.fill([10, 10, 10, 3], [4, 4, 4, 4], 70) == [2, 2, 2, 2]
    assert layers.fill([10, 10, 10, 3], [4, 4, 4, 4], 80) == [3, 2, 2, 2]
