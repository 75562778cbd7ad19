"""OffloadedExperts: routed experts of a layer whose records come and go. The model cannot tell."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal.kernels.cpu.slots import SlotExperts
from glmlocal.layers.experts import Pending, Route
from glmlocal.offload.dispatch import dispatch
from glmlocal.offload.eviction import burst_weight
from glmlocal.offload.foresight import Foresight
from glmlocal.offload.gpu_pool import GpuPool
from glmlocal.offload.host import HostPool
from glmlocal.offload.store import ExpertStore, Lease
from glmlocal.offload.tiers import ExpertKey, Residency

FORESEEN_TOKENS = 8  # of a step, for which experts are read ahead


class RowBuffer:
    """Memory for the results of single experts, shared by all layers: they run one after another."""

    def __init__(self) -> None:
        self._floats = torch.empty(0)

    def get(self, rows: int, row_floats: int) -> Tensor:
        """fp32 [rows, row_floats], contents undefined; until the next call."""
        if self._floats.numel() < rows * row_floats:
            self._floats = torch.empty(0)  # the old one goes first
            self._floats = torch.empty(rows * row_floats)
        return self._floats[: rows * row_floats].view(rows, row_floats)


@dataclass(frozen=True, slots=True, eq=False)
class _Working:
    """Experts that are here or on their way; ``held`` has their leases."""

    experts: OffloadedExperts
    lease: Lease
    held: ExitStack
    counts: Mapping[int, int]  # expert → tokens
    others: Mapping[int, float]  # experts that no GPU had
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    rows: Tensor
    is_done: bool  # all are here

    def wait(self) -> Tensor:
        return self.experts._finish(self)


@dataclass(frozen=True, slots=True, eq=False)
class OffloadedExperts:
    """``submit`` begins to read what is missing, ``wait`` computes what is in slots and then whoever arrives.

    With a GPU, what it holds is computed there from the beginning, and of a long prompt also what is faster uploaded
    than computed here. The order does not show: results are kept apart and added in order of expert id, as
    ``kernels.experts_ffn`` does.
    """

    layer: int
    slots: SlotExperts
    store: ExpertStore
    pool: HostPool  # the store's slots
    buffer: RowBuffer
    before: Callable[[], None]  # called once per step and layer; keeps the memory within its limits
    foresight: Foresight
    bytes_per_s: Callable[[], float]  # of the disk
    gpu: GpuPool | None = None  # of the layer

    @property
    def nbytes(self) -> int:
        """Nothing of its own: the slots are everybody's."""
        return 0

    def foresee(self, num_tokens: int, route: Route) -> None:
        """Begin to read what ``route`` expects, if it was mostly right of late. Prompts want nearly all experts, and
        their attention takes little of the time."""
        if num_tokens > FORESEEN_TOKENS or not self.foresight.wants_guess():
            return
        start_s = time.perf_counter()
        topk_ids, topk_weights = route()
        weight_of: Counter[int] = Counter()
        for expert, weight in zip(topk_ids.flatten().tolist(), topk_weights.flatten().tolist(), strict=True):
            weight_of[expert] += weight
        likeliest = [expert for expert, _ in weight_of.most_common()]
        if self.gpu is not None:
            likeliest = self.gpu.without_hits(self.layer, likeliest)
        missing = [e for e in likeliest if self.store.lookup(ExpertKey(self.layer, e)) is Residency.MISS]
        most = self.foresight.most_reads(self.bytes_per_s(), self.pool.slot_bytes)
        self.foresight.guessed(missing[:most], time.perf_counter() - start_s)
        if self.foresight.is_trusted:
            self.store.expect(self.layer, likeliest, most)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        """As ``Experts.submit``; ``wait`` raises CheckpointError where an expert cannot be read, and all can go on."""
        self.before()
        num_tokens, top_k = topk_ids.shape
        counts = Counter(topk_ids.flatten().tolist())
        uses = {expert: burst_weight(counts[expert], num_tokens) for expert in sorted(counts)}
        if num_tokens <= FORESEEN_TOKENS:
            self.foresight.compare(uses)
        rows = self.buffer.get(num_tokens * top_k, self.slots.row_floats)
        with ExitStack() as held:
            others = uses
            if self.gpu is not None:
                others = held.enter_context(self.gpu.hits(self.layer, uses, x, topk_ids, rows))
            lease = held.enter_context(self.store.acquire(self.layer, others, num_tokens))
            return _Working(self, lease, held.pop_all(), counts, others, x, topk_ids, topk_weights, rows, lease.is_over)

    def _finish(self, working: _Working) -> Tensor:
        stalled_s = self.store.stall_s
        with working.held:
            for wave in working.lease.waves():
                if working.lease.is_over:
                    self.foresight.arrived()
                self._divide(wave, working)
        if len(working.topk_ids) <= FORESEEN_TOKENS:
            self.foresight.waited(self.store.stall_s - stalled_s)
        if self.gpu is not None:
            self.gpu.rise(self.layer, working.others)
        return self.slots.weigh(working.rows, working.topk_ids, working.topk_weights)

    def _compute(self, wave: list[tuple[int, int]], working: _Working) -> None:
        addresses = [self.pool.address(slot) for _, slot in wave]
        self.slots.rows(working.x, working.topk_ids, [expert for expert, _ in wave], addresses, working.rows)

    def _divide(self, wave: list[tuple[int, int]], working: _Working) -> None:
        """Compute a wave, with a GPU in part in its staging slots, both at once."""
        if self.gpu is None or self.gpu.is_lost:
            self._compute(wave, working)
            return
        slot_of = dict(wave)
        chosen = dispatch({expert: working.counts[expert] for expert in slot_of}, self.gpu.costs)
        sources = [(expert, self.pool.view(slot_of[expert])) for expert in chosen.streamed]
        streamed = self.gpu.stream(self.layer, sources, working.x, working.topk_ids, working.rows)
        try:
            self._compute([(expert, slot_of[expert]) for expert in chosen.on_cpu], working)
        finally:
            streamed.wait()  # the wave's slots are given back after this
