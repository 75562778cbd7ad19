"""The demo's router: exact when done right, badly wrong when done wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmlocal.demo import experts
from glmlocal.kernels.reference import router_topk

HIDDEN, NUM_LAYERS = 576, 30

layers = st.integers(1, NUM_LAYERS - 1)
few = settings(deadline=None, max_examples=30)


def norm_weight(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 2.0, HIDDEN).astype(np.float32)


def hidden_states(seed: int, spread: float, num_tokens: int = 64) -> torch.Tensor:
    """fp32 [tokens, hidden], some features far larger than others, as in real models."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.standard_normal(HIDDEN))
    return torch.from_numpy((rng.standard_normal((num_tokens, HIDDEN)) * sizes).astype(np.float32))


def right_weights(layer: int) -> torch.Tensor:
    """fp32 [experts]: what every token must get."""
    weights = torch.zeros(experts.NUM_ROUTED)
    weights[list(experts.expert_ids(layer)[0])] = 1.0
    return weights


@few
@given(layers, st.integers(0, 1000), st.floats(0, 4))
def test_router_gives_every_real_expert_exactly_one_in_fp32(layer: int, seed: int, spread: float) -> None:
    ids, weights = router_topk(
        hidden_states(seed, spread) @ torch.from_numpy(experts.router_rows(layer, norm_weight(seed))).T,
        torch.from_numpy(experts.correction_bias(layer)),
        top_k=experts.TOP_K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=float(experts.TOP_K),
    )
    assert set(ids.unique().tolist()) == set(experts.expert_ids(layer)[0])
    assert all(len(set(row)) == experts.TOP_K for row in ids.tolist())
    assert (weights == 1.0).all()


@few
@given(layers, st.integers(0, 1000))
def test_weights_are_exact_in_numpy_too(layer: int, seed: int) -> None:
    rows, bias = experts.router_rows(layer, norm_weight(seed)), experts.correction_bias(layer)
    with np.errstate(over="ignore"):
        scores = np.float32(1) / (np.float32(1) + np.exp(-(hidden_states(seed, 1.0).numpy() @ rows.T)))
    chosen = np.argsort(-(scores + bias), axis=1)[:, : experts.TOP_K]
    weights = np.take_along_axis(scores, chosen, axis=1)
    for total in (weights.sum(1, dtype=np.float32), np.add.accumulate(weights, axis=1)[:, -1]):
        assert ((weights / (total[:, None] + np.float32(1e-20))) * np.float32(experts.TOP_K) == 1).all()


def route(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, mistake: str) -> torch.Tensor:
    """fp32 [tokens, experts]: the weight of each expert, 0 where it is not chosen."""
    logits = x @ rows.T
    scores = {
        "softmax": logits.softmax(-1),
        "no sigmoid": logits,
        "bias before the sigmoid": (logits + bias).sigmoid(),
    }.get(mistake, logits.sigmoid())
    choice = {
        "no bias": scores,
        "bias subtracted": scores - bias,
        "bias before the sigmoid": scores,
    }.get(mistake, scores + bias)
    top_k = experts.TOP_K - (mistake == "one expert too few")
    ids = choice.topk(top_k, dim=-1).indices
    weights = (choice if mistake == "biased weights" else scores).gather(1, ids)
    if mistake != "not normalised":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if mistake != "not scaled":
        weights = weights * experts.TOP_K
    if mistake == "next expert":
        ids = (ids + 1) % experts.NUM_ROUTED
    return torch.zeros(len(x), experts.NUM_ROUTED).scatter_(1, ids, weights)


MISTAKES = [
    "no bias",
    "bias subtracted",
    "bias before the sigmoid",
    "biased weights",
    "not normalised",
    "not scaled",
    "no sigmoid",
    "one expert too few",
    "next expert",
]


@pytest.mark.parametrize("layer", [1, 2, 17, 29])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_changes_the_weights_of_every_token(mistake: str, layer: int) -> None:
    rows, bias = experts.router_rows(layer, norm_weight(layer)), experts.correction_bias(layer)
    x = hidden_states(layer, 1.0, num_tokens=500)
    off = (route(x, torch.from_numpy(rows), torch.from_numpy(bias), mistake) - right_weights(layer)).abs()
    assert (off.max(dim=1).values > 0.5).all()


def test_softmax_gives_most_tokens_a_decoy() -> None:
    # Not all: the two strongest decoys may come out level. On the real model's states none escapes.
    for layer in range(1, NUM_LAYERS):
        rows, bias = experts.router_rows(layer, norm_weight(layer)), experts.correction_bias(layer)
        weights = route(hidden_states(layer, 0.5), torch.from_numpy(rows), torch.from_numpy(bias), "softmax")
        assert (weights[:, list(experts.expert_ids(layer)[1])].sum(1) > 3.5).float().mean() > 0.9


@few
@given(layers, st.integers(0, 1000), st.floats(0, 4))
def test_four_decoys_or_more_outscore_all_real_experts_on_every_token(layer: int, seed: int, spread: float) -> None:
    rows = torch.from_numpy(experts.router_rows(layer, norm_weight(seed)))
    logits = hidden_states(seed, spread) @ rows.T
    real_ids, decoy_ids = experts.expert_ids(layer)
    assert (logits[:, list(real_ids)] == 0).all()
    assert ((logits[:, list(decoy_ids)] > 0).sum(1) >= 4).all()


def test_real_ids_differ_between_layers_and_use_all_ids() -> None:
    real = [experts.expert_ids(layer)[0] for layer in range(1, NUM_LAYERS)]
    assert len({frozenset(ids) for ids in real}) == len(real)
    assert set().union(*real) == set(range(experts.NUM_ROUTED))
    assert all(sorted(sum(experts.expert_ids(layer), ())) == list(range(16)) for layer in range(NUM_LAYERS))


@pytest.mark.parametrize("num_layers", [2, 3, 4, 9, 30, 31])
def test_decoys_come_from_other_layers_and_are_distinct_where_that_is_possible(num_layers: int) -> None:
    for layer in range(1, num_layers):
        origins = experts.expert_origins(layer, num_layers)
        real_ids, decoy_ids = experts.expert_ids(layer)
        assert [origins[expert] for expert in real_ids] == [(layer, n) for n in range(1, 8)]
        assert all(0 <= origins[expert][0] < num_layers and origins[expert][0] != layer for expert in decoy_ids)
        if num_layers > 2:
            assert len({origins[expert] for expert in decoy_ids}) == len(decoy_ids)


def test_slices_are_a_partition_with_the_strongest_neurons_first() -> None:
    rng = np.random.default_rng(5)
    norm = rng.uniform(0.5, 2, 16).astype(np.float32)
    gate, up = (rng.standard_normal((256, 16)).astype(np.float32) for _ in range(2))
    down = rng.standard_normal((16, 256)).astype(np.float32)
    down[:, 96:128] *= 100
    norm[3], gate[32:64, 3] = 50, 8  # strong when seen through the norm,
    norm[5], gate[64:96, 5] = 1e-4, 1000  # and only without it
    groups = experts.slice_groups(norm, gate, up, down, group_size=16)
    assert groups.shape == (8, 2)
    assert sorted(groups.ravel().tolist()) == list(range(16))
    assert groups[0].tolist() == [6, 7]
    assert groups[1].tolist() == [2, 3]
