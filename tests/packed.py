"""Tiny packed models, and engines over them with a chosen number of expert slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glmlocal.engine.engine import Engine
from glmlocal.engine.loader import load_engine
from glmlocal.engine.placing import OpenDevice
from glmlocal.engine.planning import plan_here
from glmlocal.formats.expert_pack import file_bytes
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.offload.runtime import OpenReader
from glmlocal.packing.job import plan_job
from glmlocal.packing.local import pack_model
from glmlocal.planner.gpus import described
from glmlocal.planner.machine import ExpertGpu
from glmlocal.planner.plan import CPU, Device, Line, Plan, Wants
from glmlocal.units import GIB


def pack(source: Path, target: Path, quant: str = "keep") -> Path:
    """A packed model of a checkpoint."""
    checkpoint = open_checkpoint(source)
    job = plan_job(checkpoint, quant, model="tiny", source=str(source))  # type: ignore[arg-type]
    pack_model(checkpoint, job, quant, target, threads=1, on_bytes=lambda *_: None)  # type: ignore[arg-type]
    checkpoint.tensors.close()
    return target


def offloaded(plan: Plan, checkpoint: Checkpoint, num_slots: int) -> Plan:
    """The plan with all experts on NVMe and so many slots in RAM, whatever memory there is."""
    pack = checkpoint.tensors.experts
    assert pack is not None
    assert plan.placement is not None
    record_bytes = max(pack.layout(layer).record_bytes for layer in pack.layers())
    place = plan.placement
    counts = place.ram_experts
    placement = replace(
        place, ram_experts=(0,) * len(counts), nvme_experts=counts, ram_slots=tuple(min(1, count) for count in counts)
    )
    slots = Line("expert slots, test", num_slots * record_bytes, "exact")
    devices = (
        *(replace(device, lines=(*_without_experts(device), slots)) for device in plan.devices if device.kind == "ram"),
        Device("NVMe", "nvme", file_bytes(pack.header), (Line("expert pack", file_bytes(pack.header), "exact"),)),
    )
    return replace(plan, placement=placement, devices=devices)


def with_gpus(plan: Plan, slots: Sequence[int], *, streams: bool = False) -> Plan:
    """The plan with so many expert slots on each of as many GPUs, which share the layers evenly.

    ``streams``: with rates by which an upload is always faster than the CPU; else it never is.
    """
    assert plan.placement is not None
    homes = [ram + nvme for ram, nvme in zip(plan.placement.ram_experts, plan.placement.nvme_experts, strict=True)]
    moe = [i for i, count in enumerate(homes) if count]
    owner = {layer: turn * len(slots) // len(moe) for turn, layer in enumerate(moe)}
    given = [0] * len(homes)
    for gpu, count in enumerate(slots):
        mine = [layer for layer in moe if owner[layer] == gpu]
        for turn, layer in enumerate(mine):
            given[layer] = min(homes[layer], count // len(mine) + (turn < count % len(mine)))
    place = replace(
        plan.placement,
        slot_device=tuple(owner[i] if given[i] else CPU for i in range(len(homes))),
        gpu_slots=tuple(given),
    )
    gpu = replace(described(GIB, 60), link_gb_per_s=1e6 if streams else 1e-3)
    slow = 1e-6 if streams else 1e3
    cpu = replace(plan.machine.cpu, fp32_gflop_per_s=slow, int8_gop_per_s=slow, kernels=None)
    machine = replace(plan.machine, cpu=cpu, expert_gpus=(ExpertGpu(gpu, GIB),) * len(slots))
    return replace(plan, placement=place, machine=machine)


def _without_experts(device: Device) -> tuple[Line, ...]:
    return tuple(line for line in device.lines if not line.what.startswith("routed experts"))


def engine_with(
    directory: Path,
    num_slots: int | None,
    open_reader: OpenReader | None = None,
    gpu_slots: Sequence[int] = (),
    open_device: OpenDevice | None = None,
    streams: bool = False,
    **wants: object,
) -> Engine:
    """An engine over a packed model: all experts in RAM, or ``num_slots`` slots over the pack; slots on GPUs above."""
    checkpoint = open_checkpoint(directory)
    plan = plan_here(checkpoint, "keep", Wants(batch=4, **wants))  # type: ignore[arg-type]
    if num_slots is not None:
        plan = offloaded(plan, checkpoint, num_slots)
    if gpu_slots:
        plan = with_gpus(plan, gpu_slots, streams=streams)
    return load_engine(checkpoint, plan, open_reader=open_reader, open_device=open_device)
