"""Sampler: logits → one token per request. Greedy is exact; the rest follows vLLM's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmlocal.engine.batch import SampledToken, ScheduledRequest
from glmlocal.engine.grammar import Constraint
from glmlocal.engine.request import Request, SamplingParams, TokenLogprob

_CUTOFFS = (2.0**-8, 2.0**-13, 2.0**-18)  # of the largest probability: where likely tokens are looked for first


class Sampler:
    """Chooses tokens and owns what a request's choices depend on besides its logits: one random generator per request,
    so that a batch never changes a sample, and its place in its grammar."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._generators: dict[str, torch.Generator] = {}
        self._constraints: dict[str, Constraint] = {}

    def constrain(self, request_id: str, constraint: Constraint) -> None:
        """Hold a request to a grammar from its first token on."""
        self._constraints[request_id] = constraint

    def greedy(self, logits: Tensor, batch: Sequence[ScheduledRequest]) -> list[SampledToken] | None:
        """logits fp32 [requests, vocab] → what ``sample`` would choose, in one pass over all rows; None where one of
        the requests wants more than its largest logit."""
        if not batch or not all(self._is_plain(item.request) for item in batch):
            return None
        return [SampledToken(token_id) for token_id in logits.numpy().argmax(axis=1).tolist()]

    def _is_plain(self, request: Request) -> bool:
        params = request.params
        return (
            params.temperature == 0
            and params.logprobs is None
            and not params.logit_bias
            and not params.looks_back
            and request.request_id not in self._constraints
        )

    def sample(self, logits: Tensor, scheduled: ScheduledRequest) -> SampledToken:
        """logits fp32 [vocab] of the request's last token → its next. Raises EngineError for a grammar that cannot be
        followed further."""
        request, params = scheduled.request, scheduled.request.params
        constraint = self._constraints.get(request.request_id)
        adjusted = apply_penalties(logits, request, scheduled.output_token_ids)
        if constraint is not None:
            adjusted = _constrained(adjusted, logits, constraint)
        # numpy's argmax is several times as fast as torch's
        token_id = int(adjusted.numpy().argmax()) if params.temperature == 0 else self._draw(adjusted, request)
        ends = constraint is not None and constraint.accept(token_id)
        logprob = None if params.logprobs is None else logprob_of(logits, token_id, params.logprobs)
        return SampledToken(token_id, logprob, ends)

    def forget(self, request_id: str) -> None:
        """Drop what belongs to a request that has ended."""
        self._generators.pop(request_id, None)
        self._constraints.pop(request_id, None)

    def _draw(self, logits: Tensor, request: Request) -> int:
        likely = likely_probs(logits, request.params)
        token_ids, probs = likely or (None, truncated_probs(logits, request.params))
        generator = self._generators.get(request.request_id)
        if generator is None:
            generator = torch.Generator()
            if request.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.params.seed % 2**64)
            self._generators[request.request_id] = generator
        # Inverse transform over the cumulative sum: one uniform number per token whatever the vocabulary, and, unlike
        # torch.multinomial, defined in terms that a test can recompute.
        cumulative = probs.double().cumsum(0)
        threshold = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
        place = torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(probs) - 1)
        return int(place if token_ids is None else token_ids[place])


def _constrained(adjusted: Tensor, logits: Tensor, constraint: Constraint) -> Tensor:
    """fp32 [vocab], -inf where the grammar says no. It comes before every other wish: where penalties or min_tokens
    forbid all that it allows, they do not count."""
    allowed = constraint.allowed()
    if allowed is None:
        return adjusted
    mask = torch.from_numpy(allowed)
    masked = adjusted.masked_fill(~mask, float("-inf"))
    return masked if float(masked.max()) > float("-inf") else logits.masked_fill(~mask, float("-inf"))


def apply_penalties(logits: Tensor, request: Request, output_token_ids: Sequence[int]) -> Tensor:
    """Logit bias, min_tokens and the three penalties; fp32 [vocab] → a new tensor, or the same where nothing applies.

    Repetition divides positive and multiplies negative logits of every token seen in prompt or output (CTRL,
    Keskar 2019, as in transformers); presence and frequency subtract over the output alone (OpenAI's definition).
    """
    params = request.params
    seen_matter = params.repetition_penalty != 1
    counts_matter = params.presence_penalty != 0 or params.frequency_penalty != 0
    too_short = len(output_token_ids) + 1 < params.min_tokens
    if not (seen_matter or counts_matter or params.logit_bias or too_short):
        return logits
    logits = logits.clone()
    for token_id, bias in params.logit_bias.items():
        if token_id < len(logits):
            logits[token_id] += bias
    if too_short:
        banned = [token for token in (*params.stop_token_ids, *request.eos_token_ids) if token < len(logits)]
        logits[banned] = float("-inf")
    if seen_matter:
        seen = torch.tensor(sorted({*request.prompt_token_ids, *output_token_ids}))
        picked = logits[seen]
        logits[seen] = torch.where(picked > 0, picked / params.repetition_penalty, picked * params.repetition_penalty)
    if counts_matter and output_token_ids:
        tokens, counts = torch.tensor(output_token_ids).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def truncated_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then min-p, top-k and top-p; fp32 [vocab] → unnormalised probabilities fp32 [vocab].

    min-p keeps tokens with at least min_p × the largest probability (Nguyen 2024). top-k keeps the k largest, equals
    of the k-th included. top-p keeps the fewest most likely tokens whose sum reaches top_p, taken of what top-k left.
    """
    probs = (logits / params.temperature).softmax(-1)
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.max(), 0.0)
    has_top_k = 0 < params.top_k < len(probs)
    if has_top_k:
        probs = probs.where(probs >= probs.topk(params.top_k).values[-1], 0.0)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        reached = ordered.double().cumsum(0)
        total = reached[-1] if has_top_k else probs.sum(dtype=torch.float64)
        probs[order[~_in_nucleus(reached, params.top_p * total)]] = 0.0
    return probs


def likely_probs(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor] | None:
    """``truncated_probs`` without sorting a whole vocabulary, which takes as long as a step of a small model: (ids of
    the tokens that are left, ascending; their probabilities fp32). None where top-k and top-p are off, or where the
    distribution is so flat that few tokens are not enough. A draw from either is the same token.
    """
    if not (params.top_p < 1 or 0 < params.top_k < len(logits)):
        return None
    probs = (logits / params.temperature).softmax(-1)
    largest = probs.max()
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * largest, 0.0)
    for cutoff in _CUTOFFS:
        token_ids = (probs >= cutoff * largest).nonzero().flatten()
        likely = _truncated(probs[token_ids], probs, params, is_all=params.min_p >= cutoff)
        if likely is not None:
            left = likely > 0
            return token_ids[left], likely[left]
    return None


def _truncated(likely: Tensor, probs: Tensor, params: SamplingParams, *, is_all: bool) -> Tensor | None:
    """top-k and top-p of ``probs`` fp32 [vocab], of which ``likely`` has all above some limit, which is all that is not
    0 if ``is_all``. None: too few."""
    has_top_k = 0 < params.top_k < len(probs)
    if has_top_k and len(likely) < params.top_k and not is_all:
        return None
    if has_top_k and len(likely) > params.top_k:
        likely = likely.where(likely >= likely.topk(params.top_k).values[-1], 0.0)
    if params.top_p < 1:
        ordered, order = likely.sort(descending=True, stable=True)
        reached = ordered.double().cumsum(0)
        total = reached[-1] if has_top_k else probs.sum(dtype=torch.float64)
        if reached[-1] < params.top_p * total:
            return None
        likely[order[~_in_nucleus(reached, params.top_p * total)]] = 0.0
    return likely


def _in_nucleus(reached: Tensor, wanted: Tensor) -> Tensor:
    """Which tokens, likeliest first, have more likely ones that do not reach ``wanted`` together; ``reached`` is the
    running sum in fp64, so that it does not matter how many unlikely ones stand behind."""
    before = torch.cat([reached.new_zeros(1), reached[:-1]])
    return before < wanted


def prompt_logprobs(logits: Tensor, scheduled: ScheduledRequest) -> tuple[TokenLogprob, ...]:
    """logits fp32 [tokens, vocab] of a piece of a prompt → of each token that follows one of them in the prompt."""
    request, first = scheduled.request, scheduled.start + 1
    following = request.prompt_token_ids[first : first + len(logits)]
    num_top = request.params.prompt_logprobs or 0
    return tuple(logprob_of(row, token, num_top) for row, token in zip(logits, following, strict=False))


def logprob_of(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of the chosen token and of the ``num_top`` likeliest, from unmodified logits fp32 [vocab]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
