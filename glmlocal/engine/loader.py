"""Plan + checkpoint → a model with its weights, a KV cache and an engine around them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.engine import Engine
from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.placing import Offloads, OpenDevice, open_offloads, slot_bytes
from glmlocal.engine.planning import check_runs
from glmlocal.engine.scheduler import Scheduler
from glmlocal.formats.index import Checkpoint
from glmlocal.layers.kv_cache import KVCache
from glmlocal.models import glm4_moe
from glmlocal.models.config import ModelConfig, check_tensors
from glmlocal.models.held import held_bytes
from glmlocal.models.precision import check_activations
from glmlocal.models.weights import WeightReader, check_quant
from glmlocal.planner.plan import Plan
from glmlocal.planner.solve import BLOCK_SIZE
from glmlocal.units import MIB, format_bytes

if TYPE_CHECKING:
    from glmlocal.offload.runtime import OpenReader

log = logging.getLogger(__name__)

TOLERANCE, TOLERANCE_BYTES = 0.03, 64 * MIB  # a line that is off by more than both is worth a warning


@dataclass(frozen=True, slots=True)
class Allocation:
    """A line of the plan's ledger and what came of it."""

    what: str  # "attention", "routed experts", …, "KV cache"
    planned_bytes: int
    actual_bytes: int

    @property
    def is_as_planned(self) -> bool:
        return abs(self.actual_bytes - self.planned_bytes) <= max(TOLERANCE * self.planned_bytes, TOLERANCE_BYTES)


def load_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    open_reader: OpenReader | None = None,
    open_device: OpenDevice | None = None,
) -> Engine:
    """Check the checkpoint, read it as the plan says, and return an engine that is ready to step.

    ``on_bytes`` is told how many bytes have been read so far, from several threads; experts whose home is NVMe are not
    read here. ``open_reader`` is what reads them later, ``open_device`` what opens GPUs: tests give their own.
    Raises CheckpointError (nothing is read before every name, shape and dtype is right), and PlanError for a plan that
    does not fit or uses tiers that this version does not run.
    """
    check_runs(plan)
    config, run = ModelConfig.from_hf(checkpoint.config), plan.resolved
    has_mtp = check_tensors(config, checkpoint.tensors)
    activations = check_activations(run.activations)
    offloads = open_offloads(checkpoint, config, plan, activations, open_reader, open_device)
    model = glm4_moe.build(
        config,
        WeightReader(checkpoint.tensors, on_bytes, check_quant(run.quant), activations),
        max_positions=run.context,
        has_mtp=has_mtp and run.num_drafts > 0,  # nothing else uses it
        num_threads=run.threads,
        place=offloads.place,
    )
    num_blocks = run.kv_tokens // BLOCK_SIZE
    kv_cache = KVCache.allocate(
        config.num_hidden_layers, num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim, run.kv_dtype
    )
    offloads.warm()
    _report(allocations(plan, model, kv_cache, offloads))
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        context=run.context,
        max_batch=run.batch,
        max_num_batched_tokens=run.max_num_batched_tokens,
    )
    return Engine(ModelRunner(model, kv_cache), scheduler, offloads)


def allocations(
    plan: Plan, model: glm4_moe.Glm4MoeForCausalLM, kv_cache: KVCache, offloads: Offloads
) -> tuple[Allocation, ...]:
    """Weights by component, expert slots and the KV cache, planned and real. Other lines are no buffers."""
    planned: dict[str, int] = {}
    for device in plan.devices:
        for line in device.lines:
            what = line.what.partition(",")[0]  # without the scheme
            planned[what] = planned.get(what, 0) + line.nbytes
    actual = {**held_bytes(model), "KV cache": kv_cache.nbytes}
    if offloads.nbytes:
        in_ram = sum(planned.get(f"{prefix}routed experts", 0) for prefix in ("", "MTP "))  # slots for all, under GPUs
        planned["expert slots"], actual["expert slots"] = slot_bytes(plan) or in_ram, offloads.nbytes
    return tuple(Allocation(what, planned.get(what, 0), nbytes) for what, nbytes in actual.items())


def _report(found: tuple[Allocation, ...]) -> None:
    for each in found:
        level = logging.INFO if each.is_as_planned else logging.WARNING
        planned, actual = format_bytes(each.planned_bytes), format_bytes(each.actual_bytes)
        log.log(level, "%s: planned %s, allocated %s", each.what, planned, actual)
    log.info("resident set: %s", format_bytes(psutil.Process().memory_info().rss))
