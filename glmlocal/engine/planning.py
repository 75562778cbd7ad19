"""The plan that a checkpoint on this disk is run by: planned for this machine, refused where it does not fit."""

from __future__ import annotations

from dataclasses import replace

from glmlocal.errors import PlanError
from glmlocal.formats.expert_pack import file_bytes
from glmlocal.formats.index import Checkpoint
from glmlocal.models.footprints import QUANTS, of_checkpoint
from glmlocal.planner.advise import TIERS_RUN
from glmlocal.planner.hardware import DEFAULT_NVME_GB_PER_S
from glmlocal.planner.machine import Machine, Nvme
from glmlocal.planner.plan import CPU, Plan, Wants
from glmlocal.planner.probe import runtime_machine
from glmlocal.planner.solve import choose, plan


def plan_here(checkpoint: Checkpoint, quant: str, wants: Wants, ram: str | None = None) -> Plan:
    """What ``load_engine`` is to execute on this machine, with the tiers that this version runs.

    ``quant`` "auto" leaves it to the planner; ``ram`` ("16GiB") limits the memory. Experts of a packed model that do
    not fit stay in its pack; others have to fit. Raises CheckpointError, ConfigError, or PlanError with what is short
    and what would fit.
    """
    machine = _with_pack(runtime_machine(ram), checkpoint)
    if quant == "auto":
        found = choose([of_checkpoint(checkpoint, each) for each in QUANTS], machine, wants)
    else:
        found = plan(of_checkpoint(checkpoint, quant), machine, wants, with_advice=False)
        if not found.fits:
            finer = QUANTS.index(quant) + 1
            others = [of_checkpoint(checkpoint, each) for each in QUANTS[finer:]]
            found = plan(of_checkpoint(checkpoint, quant), machine, wants, alternatives=others)
    if not found.fits:
        raise PlanError(refusal(found) + _pack_hint(checkpoint))
    return found


def _with_pack(machine: Machine, checkpoint: Checkpoint) -> Machine:
    """The disk is the one the pack is on, as much of it as the pack takes; without a pack there is none to use."""
    pack = checkpoint.tensors.experts
    if pack is None:
        return replace(machine, nvme=None)
    disk = machine.nvme or Nvme(0, DEFAULT_NVME_GB_PER_S)
    return replace(machine, nvme=replace(disk, capacity_bytes=file_bytes(pack.header), path=str(pack.path.parent)))


def _pack_hint(checkpoint: Checkpoint) -> str:
    if checkpoint.tensors.experts is not None:
        return ""
    return "; or `glmlocal pack` it and run the packed model: what does not fit then comes from the disk"


def refusal(plan: Plan) -> str:
    """A plan that does not fit, in one line."""
    assert plan.shortfall is not None
    options = [f"{advice.option} ({advice.text})" if advice.option else advice.text for advice in plan.advice]
    hint = f"; would fit: {', or '.join(options)}" if options else "; close other programs or take a smaller model"
    return f"{plan.name} does not fit: {plan.shortfall.text}{hint}"


def check_runs(plan: Plan) -> None:
    """Raises PlanError for a plan that this version cannot execute: made for another machine, or for other tiers."""
    if not plan.fits or plan.placement is None:
        raise PlanError(refusal(plan))
    used = sorted({device.kind for device in plan.devices if device.used_bytes} - TIERS_RUN)
    if used and set(plan.placement.layer_device) != {CPU}:  # with experts alone on GPUs it is executed
        names = {"gpu": "GPUs", "nvme": "NVMe"}
        raise PlanError(
            f"the plan of {plan.name} uses {' and '.join(names[kind] for kind in used)}, but this version runs models "
            "in RAM and from NVMe only; plan it with --gpus none"
        )
