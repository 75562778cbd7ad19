"""A plan's homes of experts → what the model's layers get: slots in RAM and on GPUs, or nothing where all is in RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmlocal.errors import KernelUnavailable, PlanError
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.index import Checkpoint
from glmlocal.formats.schemes import Activations
from glmlocal.kernels import cpu
from glmlocal.kernels.reference import takes_int8
from glmlocal.layers.experts import Experts
from glmlocal.models.config import ModelConfig
from glmlocal.offload.device import Device
from glmlocal.offload.dispatch import Costs
from glmlocal.offload.stats import OffloadStats, merged
from glmlocal.planner.efficiency import DEFAULT, EXPECTED, Speeds
from glmlocal.planner.machine import ExpertGpu
from glmlocal.planner.plan import Plan

OpenDevice = Callable[[int, ExpertGpu], Device]

if TYPE_CHECKING:  # these need the native extension, which there may not be
    from glmlocal.offload.gpu_pool import GpuShare
    from glmlocal.offload.runtime import Offload, OpenReader

MANY_TOKENS = 256  # of one expert: so many that arithmetic is all that counts
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
    open_device: OpenDevice | None = None,
) -> Offloads:
    """Raises PlanError where experts are to be on NVMe or a GPU and there is no pack, CheckpointError where it is
    unusable, KernelUnavailable where the native extension was not built. ``open_reader`` and ``open_device`` None: of
    this machine."""
    assert plan.placement is not None
    cached = plan.placement.gpu_slots or (0,) * len(plan.placement.nvme_experts)
    layers = [i for i, counts in enumerate(zip(plan.placement.nvme_experts, cached, strict=True)) if any(counts)]
    if not layers:
        return ALL_IN_RAM
    pack = checkpoint.tensors.experts
    if pack is None:
        raise PlanError(
            f"the plan of {plan.name} keeps experts on NVMe or a GPU, which takes a pack: make one with `glmlocal "
            "pack` and give its directory as the model"
        )
    if not cpu.available:
        raise KernelUnavailable(
            "experts on NVMe or a GPU need the native kernels, which were not built here; give more --ram, --gpus none"
        )
    from glmlocal.offload import nvme
    from glmlocal.offload.runtime import Offload

    devices = _open_devices(plan, open_device)
    groups: dict[int, list[int]] = {}
    for layer in layers:
        groups.setdefault(pack.layout(layer).record_bytes, []).append(layer)
    budgets = _budgets(plan, groups, pack.num_experts)
    found: dict[int, Offload] = {}
    for budget, group in zip(budgets, groups.values(), strict=True):
        offload = Offload(
            pack,
            group,
            budget,
            top_k=config.num_experts_per_tok,
            activations=activations,
            gpus=_shares(plan, devices, group, pack.layout(group[0]), activations),
            open_reader=open_reader or nvme.open_reader,
        )
        found |= dict.fromkeys(group, offload)
    return Offloads(found)


def _open_devices(plan: Plan, open_device: OpenDevice | None) -> dict[int, Device]:
    """Those that the plan has slots on, by number."""
    assert plan.placement is not None
    used = sorted({d for d, slots in zip(plan.placement.slot_device, plan.placement.gpu_slots, strict=True) if slots})
    if used and open_device is None:
        from glmlocal.offload.devices import open_device
    assert open_device is not None or not used
    return {number: open_device(number, plan.machine.expert_gpus[number]) for number in used}  # type: ignore[misc]


def _shares(
    plan: Plan, devices: dict[int, Device], layers: Sequence[int], layout: ExpertLayout, activations: Activations
) -> list[GpuShare]:
    """What of each device is for these layers, whose records are of one size."""
    from glmlocal.offload.gpu_pool import GpuShare

    assert plan.placement is not None
    found = []
    for number, device in devices.items():
        mine = tuple(i for i in layers if plan.placement.slot_device[i] == number)
        slots = sum(plan.placement.gpu_slots[i] for i in mine)
        found.append(GpuShare(device, mine, slots, _costs(plan, number, layout, activations)))
    return found


def _costs(plan: Plan, number: int, layout: ExpertLayout, activations: Activations) -> Costs:
    """By the rates that the plan was made with."""
    speeds, gpu = Speeds(plan.machine, DEFAULT, EXPECTED), plan.machine.expert_gpus[number].gpu
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in layout.matrices)
    kind, scheme = layout.gate.kind, layout.gate.scheme
    is_integer = activations == "int8" and scheme is not None and takes_int8(scheme)
    one, many = (
        max(speeds.product(kind, layout.nbytes, weights, tokens, is_integer=is_integer)) for tokens in (1, MANY_TOKENS)
    )
    upload_s = layout.record_bytes / speeds.link(gpu)
    return Costs(one, many / MANY_TOKENS, upload_s, 2 * weights / speeds.gpu_arithmetic(gpu, kind))


def _budgets(plan: Plan, groups: dict[int, list[int]], num_experts: int) -> list[int]:
    """Bytes of RAM slots of each group: all of its experts where RAM is their home."""
    assert plan.placement is not None
    if not any(plan.placement.nvme_experts):
        return [record_bytes * num_experts * len(group) for record_bytes, group in groups.items()]
    budget, shares = slot_bytes(plan), [_wanted(plan, size, group) for size, group in groups.items()]
    return [budget * share // sum(shares) for share in shares]


def slot_bytes(plan: Plan) -> int:
    """What the plan's ledger has for slots in RAM of experts that live on NVMe."""
    lines = [line for device in plan.devices if device.kind == "ram" for line in device.lines]
    return sum(line.nbytes for line in lines if line.what.partition(",")[0] in _SLOT_LINES)


def _wanted(plan: Plan, record_bytes: int, layers: Sequence[int]) -> int:
    """In proportion to the plan's slots of these layers; never nothing."""
    assert plan.placement is not None
    return record_bytes * max(1, sum(plan.placement.ram_slots[layer] for layer in layers))
