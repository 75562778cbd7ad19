"""plan(): a model, a machine and wishes → what is run, where every byte goes, how fast it will be. Pure, torch-free.

Memory is reserved in this order: runtime and weights that every token needs, KV, staging, then experts, as many as fit.
Every "auto" is resolved here and nowhere later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from glmlocal.errors import ConfigError, PlanError
from glmlocal.formats.index import quoted
from glmlocal.models.config import KV_DTYPES
from glmlocal.models.footprint import Footprint
from glmlocal.models.precision import auto_activations, auto_kv_dtype, check_activations
from glmlocal.planner import advise
from glmlocal.planner.demand import MAX_NUM_BATCHED_TOKENS, Demand
from glmlocal.planner.efficiency import DEFAULT, EXPECTED, Efficiency
from glmlocal.planner.forecast import MOST_DRAFTS, PlacedModel, forecast
from glmlocal.planner.layout import Layout, holds, lay_out, layouts, pace
from glmlocal.planner.machine import Machine
from glmlocal.planner.plan import Plan, Resolved, Wants

BLOCK_SIZE = 32  # tokens of a KV block
KV_FRACTION = 0.5  # without GPUs: of the memory that weights leave, what KV takes unless more was asked for
LEAST_CONTEXT = 2048  # promised without a wish: for less, experts rather leave the fastest tier, or it does not fit
POOL_CONTEXT = 8192  # of every sequence of the batch, what the pool has room for at the least
SPILL_CONTEXT = 32768  # without a wish, where experts have to leave it: KV is not to push out more of them
MOST_BATCH = 1024
MOST_THREADS = 1 << 16


def plan(
    footprint: Footprint,
    machine: Machine,
    wants: Wants,
    *,
    alternatives: Sequence[Footprint] = (),
    efficiency: Efficiency = DEFAULT,
    with_advice: bool = True,
) -> Plan:
    """The fastest placement that the rules of docs/design/003-planner.md find, or a plan with ``fits`` False.

    ``alternatives``: the same model quantized further, finest first, for advice. Raises ConfigError for wishes that no
    machine could meet. ``with_advice`` False: for tables of many plans, since what would fit takes the longest to find.
    """
    found = _with_max_context(*_solve(footprint, machine, wants, efficiency))
    return _advised(found, footprint, alternatives) if with_advice else found


def plan_all(footprints: Iterable[Footprint], machine: Machine, wants: Wants) -> list[Plan | ConfigError]:
    """Plans for a table, without advice and with the forecast in brief; the error instead where a wish cannot be met.

    Models that differ in nothing but their names and files, as GLM-4.5 and 4.7 do, are solved once.
    """
    solved: dict[int, list[tuple[Footprint, Plan | ConfigError]]] = {}  # by weight: what is alike weighs the same
    out = []
    for footprint in footprints:
        known = solved.setdefault(footprint.nbytes, [])
        alike = replace(footprint, name="", file_bytes=0)
        found = next((result for other, result in known if other == alike), None)
        if found is None:
            try:
                found = _with_max_context(*_solve(footprint, machine, wants, DEFAULT, in_brief=True))
            except ConfigError as error:  # a context beyond its limit, drafts without an MTP layer
                found = error
            known.append((alike, found))
        out.append(found if isinstance(found, ConfigError) else _named(found, footprint))
    return out


def _named(found: Plan, footprint: Footprint) -> Plan:
    """The plan of another model that is like it in everything but its name and files."""
    short = found.shortfall
    return replace(
        found,
        name=footprint.name,
        download_bytes=footprint.file_bytes,
        disk_bytes=footprint.file_bytes + found.disk_bytes - found.download_bytes,
        shortfall=short and replace(short, text=footprint.name + short.text.removeprefix(found.name)),
    )


def _with_max_context(found: Plan, demand: Demand, layout: Layout) -> Plan:
    """With the largest context, which only the plan that is chosen needs."""
    return replace(found, max_context=_max_context(demand, layout))


def _advised(found: Plan, footprint: Footprint, alternatives: Sequence[Footprint]) -> Plan:
    if found.fits:
        return replace(found, advice=advise.for_running(found))
    return replace(found, advice=advise.for_fitting(found, footprint, alternatives, _placed))


def choose(footprints: Sequence[Footprint], machine: Machine, wants: Wants) -> Plan:
    """``--quant auto``: of one model, finest first, the finest whose experts all stay in GPU memory and RAM.

    Where none does, the one that decodes fastest; where none fits, the plan of the smallest, which says what is short.
    Raises PlanError when there is nothing to choose from.
    """
    if not footprints:
        raise PlanError("no quantization to choose from")
    solved: list[tuple[Plan, Demand, Layout]] = []
    for footprint in footprints:
        solved.append(_solve(footprint, machine, wants, DEFAULT))
        if _needs_no_nvme(solved[-1][0]):
            break  # those after it are only smaller
    plans = [each for each, _, _ in solved]
    chosen = plans.index(_best(plans))
    found = _with_max_context(*solved[chosen])
    return _advised(found, footprints[chosen], footprints[chosen + 1 :])


def _needs_no_nvme(found: Plan) -> bool:
    return found.placement is not None and not any(found.placement.nvme_experts)


def _best(plans: Sequence[Plan]) -> Plan:
    """The last, if it ended the search; else the one that decodes fastest, or the smallest where none fits."""
    if _needs_no_nvme(plans[-1]):
        return plans[-1]
    fitting = [each for each in plans if each.fits]
    if fitting:
        return max(fitting, key=lambda each: each.forecast.decode_tokens_per_s[0].value if each.forecast else 0.0)
    return min(plans, key=lambda each: sum(device.used_bytes for device in each.devices))


def _solve(
    footprint: Footprint, machine: Machine, wants: Wants, efficiency: Efficiency, *, in_brief: bool = False
) -> tuple[Plan, Demand, Layout]:
    """A plan without its largest context and advice, and what it was made of."""
    _check(footprint, wants)
    demand, context, kv_tokens, layout = _resolve(footprint, machine, wants)
    resolved = Resolved(
        context=context,
        batch=wants.batch,
        kv_tokens=kv_tokens,
        kv_dtype=demand.kv_dtype,
        activations=_activations(footprint, wants),
        num_drafts=demand.num_drafts,
        quant=footprint.quant,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        threads=wants.threads or machine.cpu.threads,
    )
    tried = layout  # whose tiers the largest context is of
    if layout.fits and not layout.is_fast:
        layout = _fastest(demand, resolved, efficiency)
    fits, placement = layout.fits, layout.placement
    pack_bytes = sum(device.used_bytes for device in layout.devices if device.kind == "nvme")
    found = Plan(
        name=footprint.name,
        quant=footprint.quant,
        fits=fits,
        total_params=footprint.total_params,
        active_params=footprint.active_params,
        weights_bytes=footprint.weights_bytes,
        download_bytes=footprint.file_bytes,
        disk_bytes=footprint.file_bytes + pack_bytes,
        kv_bytes_per_token=footprint.kv_bytes_per_token(demand.kv_dtype),
        max_context=0,
        machine=machine,
        wants=wants,
        resolved=resolved,
        placement=placement if fits else None,
        devices=layout.devices,
        forecast=forecast(footprint, placement, machine, resolved, efficiency, in_brief=in_brief) if fits else None,
        shortfall=None if fits else advise.shortfall(footprint, layout),
        advice=(),
    )
    return found, demand, tried


def _fastest(demand: Demand, resolved: Resolved, efficiency: Efficiency) -> Layout:
    """Of the layouts that fit, the one that decodes fastest at an empty context."""

    def seconds(layout: Layout) -> float:
        placed = PlacedModel(demand.footprint, layout.placement, demand.machine, resolved, efficiency)
        return placed.decode(placed.speeds[EXPECTED], context=0).total

    return min((layout for layout in layouts(demand, resolved.kv_tokens) if layout.fits), key=seconds)


def _placed(footprint: Footprint, machine: Machine, wants: Wants) -> Layout:
    return _resolve(footprint, machine, wants)[-1]


def _resolve(footprint: Footprint, machine: Machine, wants: Wants) -> tuple[Demand, int, int, Layout]:
    """What to run, its context, the tokens of the KV pool, and where it all goes.

    Unless it was said how many drafts, MTP is planned for (one draft, as the official recipes have it) where it does
    not cost an expert its place on a GPU; without GPUs this version does not speculate.
    """
    kv_dtype = _kv_dtype(footprint, machine, wants)
    demand = Demand(footprint, machine, wants, kv_dtype, wants.draft or 0)
    found = _with_context(demand, math.inf)
    if wants.draft is None and machine.gpus and footprint.holds_mtp and found[-1].is_fast:
        drafting = replace(demand, num_drafts=1)
        tried = _with_context(drafting, pace(demand, found[1]))
        if tried[-1].fits and tried[-1].is_fast and tried[0] >= found[0]:
            return (drafting, *tried)
    return (demand, *found)


def _with_context(demand: Demand, most_pace: float) -> tuple[int, int, Layout]:
    """Context, tokens of the pool, layout: all experts in the fastest tier if possible, else with some that are not.

    ``most_pace``: a longer wait for the layers (on GPUs of unequal speed) is not to be paid for the MTP layer.
    """
    limit, wanted = demand.footprint.max_position_embeddings, demand.wants.context
    fraction = 1.0 if demand.gpus else KV_FRACTION
    least = min(limit, LEAST_CONTEXT)

    def keeps(kv_tokens: int) -> bool:
        return holds(demand, kv_tokens, fraction) and pace(demand, kv_tokens) <= most_pace

    def largest(most: int, accepts: Callable[[int], bool]) -> int:
        return _largest(most, lambda context: accepts(_least_pool(demand, context)))

    if wanted is not None:
        fast = wanted if holds(demand, _least_pool(demand, wanted)) else 0
    else:
        fast = largest(min(limit, SPILL_CONTEXT), keeps)
        if fast < least:
            fast = largest(least, lambda kv_tokens: holds(demand, kv_tokens))
    if fast < (wanted or least):
        spilled = wanted or min(_largest_spilled(demand, limit), SPILL_CONTEXT)
        context = spilled if spilled >= least else wanted or least
        kv_tokens = _shared_pool(demand, context)
        return context, kv_tokens, lay_out(demand, kv_tokens)
    most_pace = pace(demand, _least_pool(demand, fast))  # from here on, KV is not to push layers to slower GPUs
    if wanted is None:
        fast = max(fast, largest(limit, keeps))
    lowest, highest = _least_pool(demand, fast), _blocks(fast) * demand.wants.batch
    kv_tokens = lowest + _largest(highest - lowest, lambda tokens: keeps(lowest + tokens))
    return fast, kv_tokens, lay_out(demand, kv_tokens)


def _least_pool(demand: Demand, context: int) -> int:
    """One full context, and for every sequence of the batch 8,192 tokens, or its context where that is shorter."""
    return max(_blocks(context), demand.wants.batch * _blocks(min(context, POOL_CONTEXT)))


def _shared_pool(demand: Demand, context: int) -> int:
    """Where experts leave the fastest tier: one context, which all sequences share. More would push out more experts.

    Where they may not leave, or there is nowhere to, the batch is what was asked for.
    """
    has_tier_below = bool(demand.gpus) or demand.machine.nvme is not None
    may_leave = demand.wants.offload and has_tier_below and demand.weights.all_experts > 0
    return _blocks(context) if may_leave else _least_pool(demand, context)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


def _max_context(demand: Demand, layout: Layout) -> int:
    """The largest context that would be accepted with experts in the same tiers; 0 where none is."""
    limit = demand.footprint.max_position_embeddings
    if layout.is_fast:
        return _largest(limit, lambda context: holds(demand, _least_pool(demand, context)))
    return _largest_spilled(demand, limit)


def _largest_spilled(demand: Demand, limit: int) -> int:
    """The largest context that fits with experts outside the fastest tier."""
    if demand.is_hopeless():
        return 0
    return _largest(limit, lambda context: lay_out(demand, _shared_pool(demand, context)).fits)


def _largest(limit: int, accepts: Callable[[int], bool]) -> int:
    """The largest accepted number: ``limit``, or a multiple of BLOCK_SIZE below it; 0 where none is accepted."""
    if limit > 0 and accepts(limit):
        return limit
    if not accepts(min(limit, BLOCK_SIZE)):
        return 0
    low, high = 0, max(0, limit - 1) // BLOCK_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if accepts(middle * BLOCK_SIZE) else (low, middle - 1)
    return low * BLOCK_SIZE


def _kv_dtype(footprint: Footprint, machine: Machine, wants: Wants) -> str:
    """``auto``: on GPUs FP8 for FP8 weights, as the official recipes; else what models/precision.py says."""
    if wants.kv_dtype != "auto":
        if wants.kv_dtype not in footprint.kv_bytes:
            known = ", ".join(footprint.kv_bytes)
            raise ConfigError(f"--kv-dtype is {quoted(wants.kv_dtype)}, wanted auto, {known}")
        return wants.kv_dtype
    keys = max(
        (p for p in footprint.layers[0].parts if p.component == "attention"), key=lambda p: p.params, default=None
    )
    kv_dtype = auto_kv_dtype(footprint.weights_bytes, keys.scheme if keys else "")
    if kv_dtype == "fp32":
        return kv_dtype
    expert = next((layer.expert for layer in footprint.layers if layer.expert is not None), None)
    if machine.gpus and expert is not None and expert.scheme.startswith("fp8") and "fp8" in footprint.kv_bytes:
        return "fp8"
    return kv_dtype


def _activations(footprint: Footprint, wants: Wants) -> str:
    if wants.activations != "auto":
        return check_activations(wants.activations)
    return auto_activations(footprint.weights_bytes)


def _check(footprint: Footprint, wants: Wants) -> None:
    """Wishes against the model. Raises ConfigError."""
    limit = footprint.max_position_embeddings
    if wants.context is not None and not 1 < wants.context <= limit:
        raise ConfigError(f"--context is {wants.context}, wanted 2 to {limit} (the model's max_position_embeddings)")
    if not 1 <= wants.batch <= MOST_BATCH:
        raise ConfigError(f"--batch is {wants.batch}, wanted 1 to {MOST_BATCH}")
    if wants.draft is not None and not 0 <= wants.draft <= MOST_DRAFTS:
        raise ConfigError(f"--draft is {wants.draft}, wanted auto or 0 to {MOST_DRAFTS}")
    if wants.draft and not footprint.holds_mtp:
        model = quoted(footprint.name)
        raise ConfigError(f"--draft is {wants.draft}, but {model} has no MTP layer that could be loaded; leave it out")
    if wants.kv_dtype not in ("auto", *KV_DTYPES):
        raise ConfigError(f"--kv-dtype is {quoted(wants.kv_dtype)}, wanted auto, {', '.join(KV_DTYPES)}")
    if wants.threads is not None and not 1 <= wants.threads <= MOST_THREADS:
        raise ConfigError(f"--threads is {wants.threads}, wanted 1 to {MOST_THREADS}")
    limits = {"--vram": wants.vram_bytes, "--ram": wants.ram_bytes, "--cpu-offload-gb": wants.cpu_offload_bytes}
    for option, nbytes in limits.items():
        if nbytes is not None and nbytes < 0:
            raise ConfigError(f"{option} is {nbytes} bytes, wanted 0 or more")
    if wants.cpu_offload_bytes and not wants.offload:
        raise ConfigError("--cpu-offload-gb and --no-offload contradict each other; leave one out")
