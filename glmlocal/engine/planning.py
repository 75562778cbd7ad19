"""The plan that a checkpoint on this disk is run by: planned for this machine, refused where it does not fit."""

from __future__ import annotations

from glmlocal.errors import PlanError
from glmlocal.formats.index import Checkpoint
from glmlocal.models.footprints import QUANTS, of_checkpoint
from glmlocal.planner.plan import Plan, Wants
from glmlocal.planner.probe import runtime_machine
from glmlocal.planner.solve import choose, plan


def plan_here(checkpoint: Checkpoint, quant: str, wants: Wants, ram: str | None = None) -> Plan:
    """What ``load_engine`` is to execute on this machine, with the tiers that this version runs.

    ``quant`` "auto" leaves it to the planner; ``ram`` ("16GiB") limits the memory. Raises CheckpointError, ConfigError,
    or PlanError with what is short and what would fit.
    """
    machine = runtime_machine(ram)
    if quant == "auto":
        found = choose([of_checkpoint(checkpoint, each) for each in QUANTS], machine, wants)
    else:
        found = plan(of_checkpoint(checkpoint, quant), machine, wants, with_advice=False)
        if not found.fits:
            finer = QUANTS.index(quant) + 1
            others = [of_checkpoint(checkpoint, each) for each in QUANTS[finer:]]
            found = plan(of_checkpoint(checkpoint, quant), machine, wants, alternatives=others)
    if not found.fits:
        raise PlanError(refusal(found))
    return found


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
    used = sorted({device.kind for device in plan.devices if device.used_bytes} - {"ram"})
    if used:
        names = {"gpu": "GPUs", "nvme": "NVMe"}
        raise PlanError(
            f"the plan of {plan.name} uses {' and '.join(names[kind] for kind in used)}, but this version runs models "
            "in RAM only; plan it with --gpus none --nvme none"
        )
