"""Sequence: one request in flight, as the scheduler sees it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from glmlocal.engine.block_pool import block_hash
from glmlocal.engine.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """Only the scheduler changes it."""

    request: Request
    token_ids: list[int]  # prompt and output
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_scored_tokens: int = 0  # of the prompt, whose logprobs were reported
    was_preempted: bool = False
    block_ids: list[int] = field(default_factory=list)
    _names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for

    @property
    def num_missing_tokens(self) -> int:
        """Known and not computed: 1 while it decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def uses_cache(self) -> bool:
        """Or are the logits of all its tokens wanted, which no cache has?"""
        return self.request.params.prompt_logprobs is None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.prompt_token_ids) :])

    def block_name(self, index: int, block_size: int) -> bytes:
        """The hash of full block ``index``; all its tokens must be known."""
        names = self._names
        while len(names) <= index:
            start = len(names) * block_size
            assert start + block_size <= len(self.token_ids), "a block that is not full has no name"
            names.append(block_hash(names[-1] if names else b"", self.token_ids[start : start + block_size]))
        return names[index]

    def next_name(self, block_size: int) -> bytes | None:
        """The name of the block that its next token belongs to; None where that block is not full, or has a token in
        it whose logits are wanted, as those of the last one always are: such a block is computed."""
        index = self.num_computed_tokens // block_size
        if not self.uses_cache or (index + 1) * block_size >= len(self.token_ids):
            return None
        return self.block_name(index, block_size)
