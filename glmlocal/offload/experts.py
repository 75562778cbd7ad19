"""OffloadedExperts: routed experts of a layer whose records come and go. The model cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal.kernels.cpu.slots import SlotExperts
from glmlocal.layers.experts import Pending
from glmlocal.offload.dispatch import dispatch
from glmlocal.offload.eviction import burst_weight
from glmlocal.offload.gpu_pool import GpuPool
from glmlocal.offload.host import HostPool
from glmlocal.offload.store import ExpertStore


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


@dataclass(frozen=True, slots=True)
class _Done:
    out: Tensor

    def wait(self) -> Tensor:
        return self.out


@dataclass(frozen=True, slots=True, eq=False)
class OffloadedExperts:
    """``submit`` computes what is in slots while the rest is read, then whoever has arrived, until all have been had.

    With a GPU, what it holds is computed there meanwhile, and of a long prompt also what is faster uploaded than
    computed here. The order does not show: results are kept apart and added in order of expert id, as
    ``kernels.experts_ffn`` does.
    """

    layer: int
    slots: SlotExperts
    store: ExpertStore
    pool: HostPool  # the store's slots
    buffer: RowBuffer
    before: Callable[[], None]  # called once per step and layer; keeps the memory within its limits
    gpu: GpuPool | None = None  # of the layer

    @property
    def nbytes(self) -> int:
        """Nothing of its own: the slots are everybody's."""
        return 0

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        """As ``Experts.submit``. Raises CheckpointError when an expert cannot be read; the store stays usable."""
        self.before()
        num_tokens, top_k = topk_ids.shape
        counts = Counter(topk_ids.flatten().tolist())
        uses = {expert: burst_weight(counts[expert], num_tokens) for expert in sorted(counts)}
        rows = self.buffer.get(num_tokens * top_k, self.slots.row_floats)
        if self.gpu is None:
            with self.store.acquire(self.layer, uses, num_tokens) as lease:
                for wave in lease.waves():
                    self._compute(wave, x, topk_ids, rows)
        else:
            with (
                self.gpu.hits(self.layer, uses, x, topk_ids, rows) as others,
                self.store.acquire(self.layer, others, num_tokens) as lease,
            ):
                for wave in lease.waves():
                    self._divide(self.gpu, wave, counts, x, topk_ids, rows)
            self.gpu.rise(self.layer, others)
        return _Done(self.slots.weigh(rows, topk_ids, topk_weights))

    def _compute(self, wave: list[tuple[int, int]], x: Tensor, topk_ids: Tensor, rows: Tensor) -> None:
        addresses = [self.pool.address(slot) for _, slot in wave]
        self.slots.rows(x, topk_ids, [expert for expert, _ in wave], addresses, rows)

    def _divide(
        self,
        gpu: GpuPool,
        wave: list[tuple[int, int]],
        counts: Mapping[int, int],
        x: Tensor,
        topk_ids: Tensor,
        rows: Tensor,
    ) -> None:
        """A wave between the CPU and the GPU's staging slots, both at once."""
        slot_of = dict(wave)
        chosen = dispatch({expert: counts[expert] for expert in slot_of}, gpu.costs)
        sources = [(expert, self.pool.view(slot_of[expert])) for expert in chosen.streamed]
        streamed = gpu.stream(self.layer, sources, x, topk_ids, rows)
        try:
            self._compute([(expert, slot_of[expert]) for expert in chosen.on_cpu], x, topk_ids, rows)
        finally:
            streamed.wait()  # the wave's slots are given back after this
