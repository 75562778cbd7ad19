"""What the scheduler hands to a step and gets back: plain values, torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmlocal.engine.request import Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """The part of one request that a step computes."""

    request: Request
    token_ids: tuple[int, ...]  # to compute now
    start: int  # position of the first of them = num_computed_tokens before this step
    block_ids: Sequence[int]  # all blocks of the request, in order; not to be kept beyond the step
    output_token_ids: tuple[int, ...]  # generated so far, where the sampling parameters look back; else empty
    needs_sample: bool  # the last token known is among token_ids, so its logits choose the next one
    needs_all_logits: bool = False  # of every token, to say how likely the prompt was

    @property
    def num_logits(self) -> int:
        return len(self.token_ids) if self.needs_all_logits else int(self.needs_sample)


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: at least one request, at least one token."""

    requests: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(scheduled.token_ids) for scheduled in self.requests)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The sampler's choice for one request."""

    token_id: int
    logprob: TokenLogprob | None = None
    ends: bool = False  # the grammar allows nothing after it


def prefill_shares(missing: Sequence[int], budget: int, least: int) -> list[int]:
    """How many tokens of each prompt a step computes, oldest first: equal shares, and what a short prompt leaves goes
    to the longer ones. Where shares would be below ``least`` the oldest are served alone."""
    shares = [0] * len(missing)
    served = sorted(range(min(len(missing), max(1, budget // least))), key=lambda i: missing[i])
    for position, i in enumerate(served):
        shares[i] = min(missing[i], budget // (len(served) - position))
        budget -= shares[i]
    return shares
