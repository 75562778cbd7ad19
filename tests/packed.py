"""Tiny packed models, and engines over them with a chosen number of expert slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from glmlocal.engine.engine import Engine
from glmlocal.engine.loader import load_engine
from glmlocal.engine.planning import plan_here
from glmlocal.formats.expert_pack import file_bytes
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.offload.runtime import OpenReader
from glmlocal.packing.job import plan_job
from glmlocal.packing.local import pack_model
from glmlocal.planner.plan import Device, Line, Plan, Wants


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


def _without_experts(device: Device) -> tuple[Line, ...]:
    return tuple(line for line in device.lines if not line.what.startswith("routed experts"))


def engine_with(
    directory: Path, num_slots: int | None, open_reader: OpenReader | None = None, **wants: object
) -> Engine:
    """An engine over a packed model: all experts in RAM, or ``num_slots`` slots over the pack."""
    checkpoint = open_checkpoint(directory)
    plan = plan_here(checkpoint, "keep", Wants(batch=4, **wants))  # type: ignore[arg-type]
    if num_slots is not None:
        plan = offloaded(plan, checkpoint, num_slots)
    return load_engine(checkpoint, plan, open_reader=open_reader)
