from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.evaluate import (
    RowComparison,
    Window,
    compare_rows,
    divergence,
    log_softmax,
    perplexity,
    target_nll,
    windows,
)


def random_logits(seed: int, rows: int = 7, vocab: int = 11, scale: float = 5.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


@given(st.integers(2, 300), st.integers(2, 50), st.data())
def test_windows_score_every_token_but_the_first_once(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for window in windows(num_tokens, context, stride):
        assert 0 <= window.begin < window.first_target < window.end <= num_tokens
        assert window.end - window.begin <= context
        scored += range(window.first_target, window.end)
        if window.begin > 0:  # later tokens have this many before them
            assert window.first_target - window.begin >= context - stride
    assert scored == list(range(1, num_tokens))


def test_windows_are_those_of_the_hugging_face_guide() -> None:
    num_tokens, context, stride = 1010, 100, 30
    expected, previous_end = [], 0
    for begin in range(0, num_tokens, stride):  # the loop of the guide
        end = min(begin + context, num_tokens)
        expected.append((begin, max(previous_end, begin + 1), end))
        previous_end = end
        if end == num_tokens:
            break
    found = [(w.begin, w.first_target, w.end) for w in windows(num_tokens, context, stride)]
    assert found[:-1] == expected[:-1]
    # The guide's last window is shorter; ours keeps its full context.
    assert found[-1] == (num_tokens - context, expected[-1][1], num_tokens)


def test_one_short_text_is_one_window() -> None:
    assert list(windows(5, 512, 256)) == [Window(0, 1, 5)]


@pytest.mark.parametrize(("num_tokens", "context", "stride"), [(9, 4, 4), (9, 4, 0), (9, 1, 1), (1, 4, 2), (0, 4, 2)])
def test_windows_refuse_what_cannot_be_scored(num_tokens: int, context: int, stride: int) -> None:
    with pytest.raises(ConfigError, match=r"wanted 1 ≤ stride < context|at least 2"):
        list(windows(num_tokens, context, stride))


def test_log_softmax_equals_the_formula_and_is_float64() -> None:
    logits = random_logits(1)
    found = log_softmax(logits)
    assert found.dtype == np.float64
    for row, logit_row in zip(found, logits, strict=True):
        total = math.fsum(math.exp(float(x)) for x in logit_row)
        expected = [float(x) - math.log(total) for x in logit_row]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-14)


def test_log_softmax_of_large_logits_neither_overflows_nor_changes_its_argument() -> None:
    logits = np.array([[3e38, 3e38, -3e38], [-1e4, -1e4, -1e4]], np.float32)
    before = logits.copy()
    found = log_softmax(logits)
    np.testing.assert_allclose(found[0, :2], -math.log(2))
    np.testing.assert_allclose(found[1], -math.log(3))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_are_an_error(bad: float) -> None:
    logits = random_logits(1)
    logits[3, 2] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        log_softmax(logits)


def test_perplexity_equals_the_formula() -> None:
    logits, targets = random_logits(2), np.array([0, 3, 10, 5, 5, 1, 9])
    found = perplexity(target_nll(log_softmax(logits), targets))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    chosen = [-math.log(probabilities[i, t]) for i, t in enumerate(targets)]
    mean = math.fsum(chosen) / 7
    stderr = math.sqrt(math.fsum((x - mean) ** 2 for x in chosen) / 6 / 7)
    assert found.num_scored == 7
    assert found.nll == pytest.approx(mean, rel=1e-13)
    assert found.nll_stderr == pytest.approx(stderr, rel=1e-13)
    assert found.perplexity == pytest.approx(math.prod(math.exp(x) for x in chosen) ** (1 / 7), rel=1e-12)
    assert found.perplexity_stderr == pytest.approx(math.exp(mean) * stderr, rel=1e-12)


def test_perplexity_of_a_uniform_guess_is_the_size_of_the_vocabulary() -> None:
    found = perplexity(target_nll(log_softmax(np.zeros((5, 64), np.float32)), np.arange(5)))
    assert found.perplexity == pytest.approx(64, rel=1e-13)
    assert found.perplexity_stderr == pytest.approx(0, abs=1e-12)


def test_perplexity_of_one_token_and_of_an_impossible_one() -> None:
    assert perplexity(np.array([2.0])).nll_stderr == 0
    assert perplexity(np.array([1e4, 1e4])).perplexity == math.inf


def test_comparison_equals_the_formula() -> None:
    p, q = log_softmax(random_logits(3)), log_softmax(random_logits(4))
    targets = np.array([1, 2, 3, 4, 5, 6, 7])
    found = compare_rows(p, q, targets)
    for i, target in enumerate(targets):
        kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p[i], q[i], strict=True))
        assert found.kl[i] == pytest.approx(kl, rel=1e-12)
        assert found.kl[i] != pytest.approx(math.fsum(math.exp(b) * (b - a) for a, b in zip(p[i], q[i], strict=True)))
        assert found.same_top[i] == (max(range(11), key=p[i].__getitem__) == max(range(11), key=q[i].__getitem__))
        assert found.delta_p[i] == pytest.approx(math.exp(q[i, target]) - math.exp(p[i, target]), rel=1e-12)


def test_a_model_is_at_no_distance_from_itself() -> None:
    p = log_softmax(random_logits(5))
    found = divergence([compare_rows(p, p, np.zeros(7, np.int64))])
    assert (found.kl_mean, found.kl_max, found.delta_p_rms, found.top1_agreement) == (0, 0, 0, 1)


@given(st.integers(0, 2**32 - 1))
def test_kl_is_never_negative(seed: int) -> None:
    near = random_logits(seed)
    p, q = log_softmax(near), log_softmax(near * np.float32(1 + 1e-7))
    assert (compare_rows(p, q, np.zeros(7, np.int64)).kl >= 0).all()


def test_divergence_summarises_all_rows() -> None:
    kl = np.arange(101, dtype=np.float64)
    same = np.arange(101) < 76
    delta = np.where(np.arange(101) % 2 == 0, 0.3, -0.1)
    parts = [RowComparison(kl[:40], same[:40], delta[:40]), RowComparison(kl[40:], same[40:], delta[40:])]
    found = divergence(parts)
    assert (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max) == (50, 50, 99, 100)
    assert found.kl_stderr == pytest.approx(math.sqrt(sum((x - 50) ** 2 for x in range(101)) / 100 / 101))
    assert found.top1_agreement == pytest.approx(76 / 101)
    share = 76 / 101
    assert found.top1_agreement_stderr == pytest.approx(math.sqrt(share * (1 - share) / 100))
    assert found.delta_p_rms == pytest.approx(math.sqrt((51 * 0.09 + 50 * 0.01) / 101))
    assert found.delta_p_mean == pytest.approx((51 * 0.3 - 50 * 0.1) / 101)
