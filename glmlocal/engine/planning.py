"""The plan that a checkpoint on this disk is run by: planned for this machine, refused where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from glmlocal.errors import ConfigError, PlanError
from glmlocal.formats.expert_pack import file_bytes
from glmlocal.formats.index import Checkpoint
from glmlocal.kernels import cpu
from glmlocal.models.footprints import QUANTS, of_checkpoint
from glmlocal.offload import devices
from glmlocal.planner.gpus import parse_link
from glmlocal.planner.hardware import DEFAULT_NVME_GB_PER_S, parse_gpus, with_link
from glmlocal.planner.machine import ExpertGpu, Machine, Nvme
from glmlocal.planner.plan import CPU, Plan, Wants
from glmlocal.planner.probe import runtime_machine
from glmlocal.planner.solve import choose, plan
from glmlocal.units import GIB


def plan_here(
    checkpoint: Checkpoint,
    quant: str,
    wants: Wants,
    ram: str | None = None,
    gpus: str = "auto",
    link: str | None = None,
) -> Plan:
    """What ``load_engine`` is to execute on this machine, with the tiers that this version runs.

    ``quant`` "auto" leaves it to the planner; ``ram`` ("16GiB") limits the memory. Experts of a packed model that do
    not fit stay in its pack; others have to fit. ``gpus`` are those that hold experts of a packed model (see
    ``_expert_gpus``), ``link`` what is between them and the host. Raises CheckpointError, ConfigError, or PlanError
    with what is short and what would fit.
    """
    machine = _with_pack(runtime_machine(ram), checkpoint)
    machine = replace(machine, expert_gpus=_expert_gpus(checkpoint, wants, gpus, link))
    if quant == "auto":
        found = choose([of_checkpoint(checkpoint, each) for each in QUANTS], machine, wants)
    else:
        found = plan(of_checkpoint(checkpoint, quant), machine, wants, with_advice=False)
        if not found.fits:
            finer = QUANTS.index(quant) + 1
            others = [of_checkpoint(checkpoint, each) for each in QUANTS[finer:]]
            found = plan(of_checkpoint(checkpoint, quant), machine, wants, alternatives=others)
    if not found.fits:
        raise PlanError(refusal(found, _least_ram(found, checkpoint) if ram else ()) + _pack_hint(checkpoint))
    return found


def _least_ram(found: Plan, checkpoint: Checkpoint) -> tuple[str, ...]:
    """``--ram`` of a packed model that is enough with most experts on the disk, where this machine has so much."""
    used = [device.used_bytes for device in found.devices if device.kind == "ram"]
    if checkpoint.tensors.experts is None or not used:
        return ()
    wanted = f"{-(-10 * used[0] // GIB) / 10:g}GiB"
    machine = replace(_with_pack(runtime_machine(wanted), checkpoint), expert_gpus=found.machine.expert_gpus)
    enough = plan(of_checkpoint(checkpoint, found.resolved.quant), machine, found.wants, with_advice=False)
    return (f"--ram {wanted} (most experts are read from the disk then)",) if enough.fits else ()


def _with_pack(machine: Machine, checkpoint: Checkpoint) -> Machine:
    """The disk is the one the pack is on, as much of it as the pack takes; without a pack there is none to use."""
    pack = checkpoint.tensors.experts
    if pack is None:
        return replace(machine, nvme=None)
    disk = machine.nvme or Nvme(0, DEFAULT_NVME_GB_PER_S)
    return replace(machine, nvme=replace(disk, capacity_bytes=file_bytes(pack.header), path=str(pack.path.parent)))


def _expert_gpus(checkpoint: Checkpoint, wants: Wants, words: str, link: str | None) -> tuple[ExpertGpu, ...]:
    """Of this machine's GPUs, those that are named.

    ``auto`` means fake ones, which somebody has asked for already, and real ones where a limit is given for them: real
    ones were never run, so they are not used unasked. Raises ConfigError for GPUs that there are not, PlanError where
    the model is not packed.
    """
    is_auto = words.strip().casefold() == "auto"
    is_limited = wants.vram_bytes is not None or wants.cpu_offload_bytes is not None
    is_asked = not is_auto or is_limited
    rate = None if link is None else parse_link(link)
    wanted = () if is_auto else parse_gpus(words, rate)
    if not is_auto and not wanted:
        return ()
    if not is_asked and not os.environ.get(devices.FAKE_VARIABLE, ""):
        return ()
    own = devices.found()
    chosen = own if is_auto else _present(words, [gpu.name for gpu in wanted], own)
    if chosen and (checkpoint.tensors.experts is None or not cpu.available):
        if not is_asked:
            return ()
        raise PlanError("GPUs hold experts of packed models only in this version: `glmlocal pack` it, or --gpus none")
    if rate is None:
        return chosen
    return tuple(replace(each, gpu=with_link(each.gpu, rate)) for each in chosen)


def _present(words: str, wanted: Sequence[str], own: Sequence[ExpertGpu]) -> tuple[ExpertGpu, ...]:
    """The first GPUs, since plans number them as the driver does. Raises ConfigError where others are wanted."""
    chosen = tuple(own[: len(wanted)])
    if [each.gpu.name for each in chosen] != list(wanted):
        has = ", ".join(each.gpu.name for each in own) or "none"
        raise ConfigError(f"--gpus {words[:80]!r}: torch finds {has}, in that order; name the first of them")
    return chosen


def _pack_hint(checkpoint: Checkpoint) -> str:
    if checkpoint.tensors.experts is not None:
        return ""
    return "; or `glmlocal pack` it and run the packed model: what does not fit then comes from the disk"


def refusal(plan: Plan, options: Sequence[str] = ()) -> str:
    """A plan that does not fit, in one line; ``options`` are what would fit beside its advice."""
    assert plan.shortfall is not None
    advised = [f"{advice.option} ({advice.text})" if advice.option else advice.text for advice in plan.advice]
    would = [*options, *advised]
    hint = f"; would fit: {', or '.join(would)}" if would else "; close other programs or take a smaller model"
    return f"{plan.name} does not fit: {plan.shortfall.text}{hint}"


def check_runs(plan: Plan) -> None:
    """Raises PlanError for a plan that this version cannot execute: made for another machine, or for other tiers."""
    if not plan.fits or plan.placement is None:
        raise PlanError(refusal(plan))
    if set(plan.placement.layer_device) != {CPU}:
        raise PlanError(
            f"the plan of {plan.name} has layers on GPUs, but this version runs models in RAM and from NVMe, with "
            "experts on GPUs at the most; plan it with --gpus none"
        )
