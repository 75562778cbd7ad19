"""Where experts that are not on the GPU are computed: on the CPU, or uploaded first. Pure; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that one expert takes."""

    cpu_read_s: float  # on the CPU, however few tokens there are: its weights are read
    cpu_token_s: float  # on the CPU for each token, once arithmetic is what it waits for
    upload_s: float
    gpu_token_s: float

    def on_cpu(self, num_tokens: int) -> float:
        return max(self.cpu_read_s, num_tokens * self.cpu_token_s)

    def streamed(self, num_tokens: int) -> float:
        """Uploads and products of neighbours overlap, so the slower of the two counts."""
        return max(self.upload_s, num_tokens * self.gpu_token_s)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Experts in the order in which to begin with them."""

    on_cpu: tuple[int, ...]
    streamed: tuple[int, ...]  # through the GPU's two staging slots


def dispatch(tokens_per_expert: Mapping[int, int], costs: Costs) -> Dispatch:
    """Stream as many of the busiest experts as make the later of the two sides end soonest.

    Only experts for which the CPU waits for its arithmetic: the others it computes as fast as memory is read, and an
    upload reads the same memory. So single tokens are never waited for by an upload, and long prompts stream.
    """
    busiest = sorted(tokens_per_expert, key=lambda expert: (-tokens_per_expert[expert], expert))
    cpu_s = sum(costs.on_cpu(tokens_per_expert[expert]) for expert in busiest)
    streamed_s, best_s, num_streamed = 0.0, cpu_s, 0
    for count, expert in enumerate(busiest, 1):
        num_tokens = tokens_per_expert[expert]
        if num_tokens * costs.cpu_token_s <= costs.cpu_read_s:
            break
        cpu_s -= costs.on_cpu(num_tokens)
        streamed_s += costs.streamed(num_tokens)
        if max(cpu_s, streamed_s) < best_s:
            best_s, num_streamed = max(cpu_s, streamed_s), count
    return Dispatch(tuple(sorted(busiest[num_streamed:])), tuple(busiest[:num_streamed]))
