"""A plan's homes of experts → what the model's layers get: slots over the pack, or nothing where all is in RAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmlocal.errors import KernelUnavailable, PlanError
from glmlocal.formats.index import Checkpoint
from glmlocal.formats.schemes import Activations
from glmlocal.kernels import cpu
from glmlocal.layers.experts import Experts
from glmlocal.models.config import ModelConfig
from glmlocal.offload.stats import OffloadStats, merged
from glmlocal.planner.plan import Plan

if TYPE_CHECKING:  # both need the native extension, which there may not be
    from glmlocal.offload.runtime import Offload, OpenReader

_SLOT_LINES = ("expert slots", "MTP expert slots", "read buffers")


@dataclass(frozen=True, slots=True, eq=False)
class Offloads:
    """One store for all layers whose records have the same size; usually one, and none where all experts are in RAM."""

    by_layer: dict[int, Offload]

    @property
    def all(self) -> tuple[Offload, ...]:
        return tuple(dict.fromkeys(self.by_layer.values()))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.all)

    def place(self, layer: int) -> Experts | None:
        """The ``PlaceExperts`` of this plan."""
        offload = self.by_layer.get(layer)
        return None if offload is None else offload.experts(layer)

    def warm(self) -> None:
        """Begin with what was hot in earlier runs."""
        for each in self.all:
            each.warm()

    def stats(self) -> OffloadStats | None:
        """None where all experts are in RAM."""
        return merged([each.stats() for each in self.all])

    def close(self) -> None:
        for each in self.all:
            each.close()


ALL_IN_RAM = Offloads({})


def open_offloads(
    checkpoint: Checkpoint,
    config: ModelConfig,
    plan: Plan,
    activations: Activations,
    open_reader: OpenReader | None = None,
) -> Offloads:
    """Raises PlanError where experts are to come from NVMe and there is no pack, CheckpointError where it is unusable,
    KernelUnavailable where the native extension was not built. ``open_reader`` None: the native one."""
    assert plan.placement is not None
    layers = [i for i, count in enumerate(plan.placement.nvme_experts) if count]
    if not layers:
        return ALL_IN_RAM
    pack = checkpoint.tensors.experts
    if pack is None:
        raise PlanError(
            f"the plan of {plan.name} keeps experts on NVMe, which takes a pack: make one with `glmlocal pack` and "
            "give its directory as the model"
        )
    if not cpu.available:
        raise KernelUnavailable("experts on NVMe need the native kernels, which were not built here; give more --ram")
    from glmlocal.offload import nvme
    from glmlocal.offload.runtime import Offload

    budget = slot_bytes(plan)
    groups: dict[int, list[int]] = {}
    for layer in layers:
        groups.setdefault(pack.layout(layer).record_bytes, []).append(layer)
    shares = [_wanted(plan, size, group) for size, group in groups.items()]
    found: dict[int, Offload] = {}
    for share, group in zip(shares, groups.values(), strict=True):
        offload = Offload(
            pack,
            group,
            budget * share // sum(shares),
            top_k=config.num_experts_per_tok,
            activations=activations,
            open_reader=open_reader or nvme.open_reader,
        )
        found |= dict.fromkeys(group, offload)
    return Offloads(found)


def slot_bytes(plan: Plan) -> int:
    """What the plan's ledger has for slots of experts that live on NVMe."""
    lines = [line for device in plan.devices if device.kind == "ram" for line in device.lines]
    return sum(line.nbytes for line in lines if line.what.partition(",")[0] in _SLOT_LINES)


def _wanted(plan: Plan, record_bytes: int, layers: Sequence[int]) -> int:
    """In proportion to the plan's slots of these layers; never nothing."""
    assert plan.placement is not None
    return record_bytes * max(1, sum(plan.placement.ram_slots[layer] for layer in layers))
