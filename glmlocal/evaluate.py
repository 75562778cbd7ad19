"""The maths of ``glmlocal eval``: windows over a text, perplexity, how far one model's predictions are from another's.

Everything is float64 numpy; logits come in as fp32 [tokens, vocab]. Torch-free.

Scoring (as in the Hugging Face guide to perplexity): windows of ``context`` tokens advance by ``stride``; the first
scores all its tokens but the first, which nothing predicts, and each later one only the tokens that no window before
it has scored. Every token of the text but the first is thus scored once, the later ones with at least
``context - stride`` tokens before them. With ``stride = context / 2`` that is the condition of llama.cpp's perplexity
tool, which scores only the second half of windows that do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError, ConfigError

ROWS_AT_ONCE = 32  # float64 temporaries of 32 × 151,552 logits are 39 MB each


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``begin … end - 1`` are seen together; ``first_target … end - 1`` are scored there.

    Row i of the window's logits predicts token ``begin + i + 1``.
    """

    begin: int
    first_target: int
    end: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Cover a text. Raises ConfigError for a stride without overlap, or a text too short to score."""
    if context < 2 or not 1 <= stride < context:
        raise ConfigError(f"the stride is {stride} and the context {context}; wanted 1 ≤ stride < context")
    if num_tokens < 2:
        raise ConfigError(f"the text has {num_tokens} tokens; at least 2 are needed to score one")
    first_target, end = 1, min(context, num_tokens)
    while first_target < num_tokens:
        yield Window(max(0, end - context), first_target, end)
        first_target, end = end, min(end + stride, num_tokens)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural-log probabilities, float64 [rows, vocab]. Raises CheckpointError for NaN or infinite logits."""
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise CheckpointError("the model's logits are not finite numbers: its weights are damaged or out of range")
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def target_nll(log_probs: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p(target) per row, in nats: [rows]."""
    nll: NDArray[np.float64] = -log_probs[np.arange(len(targets)), targets]
    return nll


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood; standard errors take tokens as independent (delta method for exp)."""

    num_scored: int
    nll: float  # mean, nats per token
    nll_stderr: float
    perplexity: float
    perplexity_stderr: float


def perplexity(nll: NDArray[np.float64]) -> Perplexity:
    """Summary of per-token negative log-likelihoods, at least one."""
    mean, stderr = float(nll.mean()), _stderr(nll)
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(len(nll), mean, stderr, value, value * stderr)


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One model against a reference, per scored token."""

    kl: NDArray[np.float64]  # KL(reference ‖ model), nats
    same_top: NDArray[np.bool_]  # do they agree on the likeliest token?
    delta_p: NDArray[np.float64]  # p_model(target) - p_reference(target)


def compare_rows(
    reference: NDArray[np.float64], model: NDArray[np.float64], targets: NDArray[np.int64]
) -> RowComparison:
    """Log-probabilities of both, float64 [rows, vocab] → figures per row.

    KL is never negative; what rounding leaves below zero (order 1e-16) is cut to it.
    """
    kl = (np.exp(reference) * (reference - model)).sum(axis=-1)
    rows = np.arange(len(targets))
    return RowComparison(
        kl=np.maximum(kl, 0.0),
        same_top=reference.argmax(axis=-1) == model.argmax(axis=-1),
        delta_p=np.exp(model[rows, targets]) - np.exp(reference[rows, targets]),
    )


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model's predictions are from the reference's, over all scored tokens. KL in nats, Δp in probability."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float  # linear interpolation between ranks
    kl_max: float
    top1_agreement: float  # 0 … 1
    top1_agreement_stderr: float
    delta_p_mean: float
    delta_p_rms: float


def divergence(rows: list[RowComparison]) -> Divergence:
    """Summary of comparisons that have at least one row in all."""
    kl = np.concatenate([r.kl for r in rows])
    same = np.concatenate([r.same_top for r in rows]).astype(np.float64)
    delta_p = np.concatenate([r.delta_p for r in rows])
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_stderr=_stderr(kl),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        top1_agreement_stderr=_stderr(same),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt(np.mean(delta_p**2))),
    )


def _stderr(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; 0 for a single value, which says nothing about spread."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
