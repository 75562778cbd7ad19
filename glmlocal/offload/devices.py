"""Which GPUs there are to hold experts: those that torch can use, or those that GLMLOCAL_FAKE_GPU makes up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from glmlocal.errors import ConfigError, PlanError
from glmlocal.offload.device import Device
from glmlocal.planner import gpus as known
from glmlocal.planner.hardware import DEFAULT_RAM_GB_PER_S, parse_gpus
from glmlocal.planner.machine import ExpertGpu
from glmlocal.planner.probe import UNKNOWN_GPU_GB_PER_S
from glmlocal.units import GIB

FAKE_VARIABLE = "GLMLOCAL_FAKE_GPU"  # "2x1GiB": GPUs made of host memory
_MARGIN_BYTES, _MARGIN_PART = GIB // 2, 25  # as the planner's: other programs, fragmentation, products' temporaries


def found(environ: Mapping[str, str] = os.environ) -> tuple[ExpertGpu, ...]:
    """GPUs with what is free of them now. This starts their driver. Raises ConfigError for a bad variable, and where
    there are GPUs that the driver cannot use.
    """
    if words := environ.get(FAKE_VARIABLE, ""):
        return _fakes(words)
    if not torch.cuda.is_available():
        return ()
    try:
        return tuple(_cuda(number) for number in range(torch.cuda.device_count()))
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(
            f"the GPUs cannot be used ({why}); see what `nvidia-smi` says, or do without --gpus"
        ) from error


def _fakes(words: str) -> tuple[ExpertGpu, ...]:
    parts = [part if "@" in part else f"{part}@{DEFAULT_RAM_GB_PER_S:g}" for part in words.split(",")]
    try:
        fakes = parse_gpus(",".join(parts))
    except ConfigError:
        fakes = ()
    if not fakes:
        raise ConfigError(f"{FAKE_VARIABLE} is {words[:80]!r}, wanted GPUs to make of host memory, for example 2x1GiB")
    return tuple(ExpertGpu(gpu, gpu.memory_bytes) for gpu in fakes)


def _cuda(number: int) -> ExpertGpu:
    facts = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    try:
        gpu = known.find(facts.name, total)
    except ConfigError:
        gpu = replace(known.described(total, UNKNOWN_GPU_GB_PER_S), name=facts.name)
    return ExpertGpu(gpu, max(0, free - max(_MARGIN_BYTES, total // _MARGIN_PART)))


def open_device(number: int, gpu: ExpertGpu) -> Device:
    """The GPU of that number in ``found``. Raises PlanError where this machine has it no longer."""
    here = found()
    if number >= len(here) or here[number].gpu.name != gpu.gpu.name:
        has = ", ".join(each.gpu.name for each in here) or "none"
        raise PlanError(f"the plan uses GPU {number}, a {gpu.gpu.name}; this machine has: {has}; plan again")
    if os.environ.get(FAKE_VARIABLE, ""):
        from glmlocal.offload.fake_gpu import FakeGpu

        return FakeGpu(f"fake:{number}", gpu.free_bytes)
    from glmlocal.offload.torch_gpu import TorchGpu

    return TorchGpu(torch.device("cuda", number))
