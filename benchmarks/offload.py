"""Decode of a packed model that is larger than its memory: against the bound of compute and disk, and caching policies.

    python benchmarks/offload.py PACK --ram 2.4GiB --tokens 48

Routing follows fixed traces (so that policies and runs are comparable), everything else is the model's own: every
layer's chosen experts are replaced by the trace's. For each trace it prints

* measured decode over the bound Σ over steps of max(compute, read), where compute is the time of the same step with all
  experts in their slots (median of steps before and after), and read is the bytes of the step's experts that were not
  in their slots (read ahead or not; what was guessed in vain does not count) over the disk's O_DIRECT rate, measured
  between the steps, every few of them, with a reader like the engine's. It takes for granted that all reads of a step
  can be overlapped with all of its computing;
* the same over the bound by layer, Σ over steps of (compute outside experts + Σ over layers of max(experts, read)): a
  layer cannot read before its router has chosen, nor the next one begin before this one ends, unless foreseen;
* where the time of a step went;
* with ``--recall R``: the same where so much of a layer's experts is foreseen while the layer before is computed;
* hit rates beside LRU's and Belady's on the same trace, at 10, 25 and 50 % of the experts;
* CPU seconds per GB read, of reading alone.

Ends with one JSON line. The page cache is kept out by O_DIRECT; a reader without it is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.engine import Engine
from glmlocal.engine.loader import load_engine
from glmlocal.engine.planning import plan_here
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.formats.expert_pack import ExpertPack
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.kernels.cpu.slots import SlotExperts
from glmlocal.layers.experts import Experts, Pending, Route
from glmlocal.offload import eviction, host
from glmlocal.offload.experts import OffloadedExperts
from glmlocal.offload.foresight import Foresight
from glmlocal.offload.nvme import open_reader
from glmlocal.offload.stats import since
from glmlocal.offload.store import ExpertStore
from glmlocal.offload.tiers import ExpertKey, Residency
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB, format_bytes

PROBE_EVERY, PROBE_S = 4, 0.15  # tokens; how long the disk is measured between them
HISTORY = 128  # tokens of the trace that only count as uses, as if an earlier run had seen them
WARM_UP = 24  # tokens after them that fill the slots before anything is timed
_TOUCH = 14  # the same for few experts that are to be in their slots
Trace = list[list[list[int]]]  # [token][layer] → experts


def near_uniform(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> Trace:
    """Every token chooses anew, all experts alike: what the router's training aims at over long runs."""
    generator = random.Random(seed)
    return [[generator.sample(range(experts), top_k) for _ in range(layers)] for _ in range(tokens)]


def working_set(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> Trace:
    """As measured on GLM-5 (docs/landscape): over 128 tokens about 70 % of the experts, 13 % new in the next 128, and a
    quarter of a token's experts are those of the token before."""
    generator = random.Random(seed)
    trace: Trace = []
    sets = [generator.sample(range(experts), round(0.6 * experts)) for _ in range(layers)]
    for token in range(tokens):
        step = []
        for layer, members in enumerate(sets):
            if token % 4 == 3:  # one comes in, one goes
                outside = [e for e in range(experts) if e not in members]
                members[generator.randrange(len(members))] = generator.choice(outside)
            before = trace[-1][layer] if trace else []
            chosen = set(e for e in before if generator.random() < 0.25)
            weights = [1.0 / (rank + 4) for rank in range(len(members))]
            while len(chosen) < top_k:
                chosen.add(generator.choices(members, weights)[0])
            step.append(sorted(chosen))
        trace.append(step)
    return trace


TRACES = {"near-uniform": near_uniform, "working-set": working_set}


def describe(trace: Trace, experts: int) -> dict[str, float]:
    """What landscape.md reports of real traces, of the middle layer."""
    layer = len(trace[0]) // 2
    steps = [set(step[layer]) for step in trace]
    first, second = set().union(*steps[:128]), set().union(*steps[128:256])
    shared = [len(one & two) / len(one) for one, two in pairwise(steps)]
    return {
        "used_by_128_tokens": round(len(first) / experts, 3),
        "new_in_the_next_128": round(len(second - first) / experts, 3),
        "shared_with_the_token_before": round(statistics.mean(shared), 3),
    }


def policies(trace: Trace, experts: int, fraction: float) -> dict[str, float]:
    """Hit rates of one pool for all layers, as the store is one."""
    layers = len(trace[0])
    steps = [[layer * experts + e for e in step[layer]] for step in trace for layer in range(layers)]
    uses: dict[int, list[float]] = {}
    for place, keys in enumerate(steps):
        for key in keys:
            uses.setdefault(key, []).append(float(place))
    slots = round(fraction * layers * experts)
    lfru = eviction.lfru(slots, layers * len(trace[0][0]))
    found = {
        "lfru": eviction.hit_rate(steps, slots, lfru, layers),
        "lru": eviction.hit_rate(steps, slots, eviction.LRU()),
        "belady": eviction.hit_rate(steps, slots, eviction.Belady(uses)),
    }
    return {name: round(value, 4) for name, value in found.items()}


@dataclass
class Follows:
    """Experts that are chosen by a trace instead of the router; ``token`` is where it stands.

    Guesses are the choice among scores of which the trace's experts have the highest, seen through as much noise as
    makes the part ``recall`` of a guess right: those guessed first are right more often. None: nothing is foreseen.
    """

    inner: OffloadedExperts
    choices: list[list[int]]
    num_experts: int
    recall: float | None
    spent: Spent
    token: int = 0

    def __post_init__(self) -> None:
        self._guesses = [] if self.recall is None else guesses(self.choices, self.num_experts, self.recall)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def foresee(self, num_tokens: int, route: Route) -> None:
        if num_tokens > 1 or self.token >= len(self._guesses):
            return
        guess = self._guesses[self.token]

        def guessed() -> tuple[Tensor, Tensor]:
            route()  # for what it costs
            return guess, torch.linspace(1.0, 0.5, guess.shape[1])[None]

        self.inner.foresee(num_tokens, guessed)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if x.shape[0] == 1:
            topk_ids = torch.tensor([self.choices[self.token]], dtype=torch.int32)
            self.token += 1
        self.spent.needed_bytes.append(sum(map(self._is_needed, topk_ids[0].tolist())) * self.inner.pool.slot_bytes)
        return self.inner.submit(x, topk_ids, topk_weights)

    def _is_needed(self, expert: int) -> bool:
        """It has to be read for this step, or was ahead of it."""
        store, key = self.inner.store, ExpertKey(self.inner.layer, expert)
        return store.lookup(key) is not Residency.HIT or store._index(key) in store._prefetched


def guesses(choices: Sequence[Sequence[int]], num_experts: int, recall: float) -> list[Tensor]:
    """int32 [1, top_k] for each of the choices, likeliest first."""
    generator, noise = np.random.default_rng(7), noise_of(recall, num_experts, len(choices[0]))
    found = []
    for chosen in choices:
        scores = -np.sort(-generator.standard_normal(num_experts))
        others = np.setdiff1d(np.arange(num_experts), chosen)
        of_expert = np.empty(num_experts)
        of_expert[generator.permutation(chosen)] = scores[: len(chosen)]
        of_expert[generator.permutation(others)] = scores[len(chosen) :]
        seen = of_expert + noise * generator.standard_normal(num_experts)
        found.append(torch.from_numpy(np.argsort(-seen)[: len(chosen)].astype(np.int32))[None])
    return found


def noise_of(recall: float, num_experts: int, top_k: int) -> float:
    """The noise, in standard deviations of scores, through which ``recall`` of the highest are still the highest."""
    generator = np.random.default_rng(3)
    scores, noise = (generator.standard_normal((1000, num_experts)) for _ in range(2))
    right = np.zeros(scores.shape, bool)
    np.put_along_axis(right, np.argsort(-scores)[:, :top_k], True, 1)
    low, high = 0.0, 30.0
    for _ in range(20):
        middle = (low + high) / 2
        guess = np.argsort(-(scores + middle * noise))[:, :top_k]
        low, high = (middle, high) if np.take_along_axis(right, guess, 1).mean() > recall else (low, middle)
    return (low + high) / 2


@dataclass
class Records:
    """Experts as the router chooses them, noted, and what was guessed of them before the attention."""

    inner: Experts
    chosen: list[list[int]] = field(default_factory=list)
    guessed: list[list[int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def foresee(self, num_tokens: int, route: Route) -> None:
        if num_tokens == 1:
            ids, weights = route()
            self.guessed.append(ids[0][weights[0].argsort(descending=True)].tolist())
        self.inner.foresee(num_tokens, route)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if x.shape[0] == 1:
            self.chosen.append(sorted(topk_ids[0].tolist()))
        return self.inner.submit(x, topk_ids, topk_weights)


def own_router(engine: Engine, tokens: int) -> tuple[Trace, list[float], list[float]]:
    """What the model's own router chooses while it writes; what part of it was guessed before, per layer; and how often
    the guesses were right, likeliest first."""
    restore, layers = engine.runner.model, []
    records: list[Records] = []
    for layer in restore.layers:
        if layer.experts is not None:
            records.append(Records(layer.experts))
            layer = replace(layer, experts=records[-1])
        layers.append(layer)
    engine.runner.model = replace(restore, layers=tuple(layers))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens + 1, ignore_eos=True)
    engine.add(Request("router", (11, 12, 13, 14), params))
    while engine.has_work:
        engine.step()
    engine.runner.model = restore
    recalls = [
        statistics.mean(len(set(one) & set(two)) / len(two) for one, two in zip(each.guessed, each.chosen, strict=True))
        for each in records
    ]
    guesses = [
        (guess, set(chosen)) for each in records for guess, chosen in zip(each.guessed, each.chosen, strict=True)
    ]
    by_rank = [
        statistics.mean(guess[rank] in chosen for guess, chosen in guesses) for rank in range(len(guesses[0][0]))
    ]
    return [list(step) for step in zip(*(each.chosen for each in records), strict=True)], recalls, by_rank


def following(engine: Engine, trace: Trace, recall: float | None, spent: Spent) -> None:
    """Make the engine's model follow the trace."""
    model, layers, moe, foresight = engine.runner.model, [], 0, Foresight()
    for layer in model.layers:
        if isinstance(layer.experts, OffloadedExperts):
            choices, experts = [step[moe] for step in trace], replace(layer.experts, foresight=foresight)
            follows = Follows(experts, choices, model.config.n_routed_experts, recall, spent)
            layer, moe = replace(layer, experts=follows), moe + 1
        layers.append(layer)
    engine.runner.model = replace(model, layers=tuple(layers))


class Spent:
    """Where a step's time goes, and what each of its layers has to read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = [offload._source.reader for offload in engine.offloads.all]
        self.seconds: dict[str, float] = {}
        self.busy_s: dict[str, float] = {}  # of the disk, meanwhile
        self.needed_bytes: list[int] = []  # by layer; read ahead or not
        self._patched: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, name, what in (
            (kernels, "attention_block", "attention"),
            (kernels, "route", "guessing"),
            (kernels, "swiglu_ffn", "shared"),
            (kernels, "combine", "shared"),
            (SlotExperts, "rows", "experts"),
            (SlotExperts, "weigh", "experts"),
            (ExpertStore, "_wait", "disk"),
            (ExpertPack, "check", "checksums"),
            (type(self._engine.runner.model), "compute_logits", "head"),
        ):
            inner = getattr(owner, name)
            self._patched.append((owner, name, inner))
            setattr(owner, name, self._timed(inner, what))
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, inner in self._patched:
            setattr(owner, name, inner)

    def begin_step(self) -> None:
        self.seconds, self.busy_s, self.needed_bytes = {}, {}, []

    def disk_s(self) -> float:
        """With at least one read under way, since the start."""
        return sum(reader.busy_s for reader in self._readers)

    def _timed(self, inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s, start_busy_s = time.perf_counter(), self.disk_s()
            inside_s, inside_busy_s = sum(self.seconds.values()), sum(self.busy_s.values())
            try:
                return inner(*args, **kwargs)
            finally:  # what calls inside it took is theirs
                inside_s = sum(self.seconds.values()) - inside_s
                inside_busy_s = sum(self.busy_s.values()) - inside_busy_s
                self.busy_s[what] = self.busy_s.get(what, 0.0) + self.disk_s() - start_busy_s - inside_busy_s
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start_s - inside_s

        return timed


@dataclass(frozen=True)
class Step:
    seconds: float
    read_bytes: int
    needed_bytes: tuple[int, ...]  # of each layer with experts; what was guessed in vain is not needed
    spent_s: dict[str, float]
    disk_s: float  # of ``seconds``, with at least one read under way
    busy_s: dict[str, float]  # of ``spent_s``, the same
    disk_rate: float = 0.0  # bytes per second of reading alone, just before and after


def decode(
    engine: Engine, trace: Trace, tokens: int, recall: float | None, disk: Disk | None, warm_up: int = WARM_UP
) -> list[Step]:
    """Times of ``tokens`` decode steps, after a warm-up that fills the slots, with the disk's rate around them."""
    restore = engine.runner.model
    params = SamplingParams(temperature=0.0, max_tokens=warm_up + tokens + 1, ignore_eos=True)
    engine.add(Request("bench", (11, 12, 13, 14), params))
    steps: list[Step] = []
    rates: list[float] = []
    with Spent(engine) as spent:
        following(engine, trace, recall, spent)
        engine.step()
        for token in range(warm_up + tokens):
            if disk is not None and token >= warm_up and (token - warm_up) % PROBE_EVERY == 0:
                rates.append(disk.rate(PROBE_S))
            spent.begin_step()
            before, busy_s, start_s = _read(engine), spent.disk_s(), time.perf_counter()
            engine.step()
            seconds, busy_s = time.perf_counter() - start_s, spent.disk_s() - busy_s
            needed = tuple(spent.needed_bytes)
            steps.append(Step(seconds, _read(engine) - before, needed, spent.seconds, busy_s, spent.busy_s))
        while engine.has_work:
            engine.step()
    engine.runner.model = restore
    if disk is None:
        return steps[warm_up:]
    rates.append(disk.rate(PROBE_S))
    around = [(rates[i // PROBE_EVERY] + rates[i // PROBE_EVERY + 1]) / 2 for i in range(tokens)]
    return [replace(step, disk_rate=rate) for step, rate in zip(steps[warm_up:], around, strict=True)]


PARTS = ("attention", "guessing", "experts", "disk", "checksums", "shared", "head")


def ledger(steps: Sequence[Step]) -> dict[str, float]:
    """Milliseconds per token by what they went into; "other" is Python and the system."""
    found = {what: statistics.mean(step.spent_s.get(what, 0.0) for step in steps) * 1e3 for what in PARTS}
    found["other"] = statistics.mean(step.seconds for step in steps) * 1e3 - sum(found.values())
    return {what: round(value, 2) for what, value in found.items()}


def idle_disk(steps: Sequence[Step]) -> dict[str, float]:
    """Of the same milliseconds, those in which nothing was read."""
    busy = {what: statistics.mean(step.busy_s.get(what, 0.0) for step in steps) * 1e3 for what in PARTS}
    busy["other"] = statistics.mean(step.disk_s for step in steps) * 1e3 - sum(busy.values())
    return {what: round(value - busy[what], 2) for what, value in ledger(steps).items()}


def remember(engine: Engine, trace: Trace) -> None:
    """As after a long run: these tokens have been seen, and every record's checksum was compared when it was first read."""
    for offload in engine.offloads.all:
        pack, layers = offload._pack, offload.store.layers
        offload._source._seen.update((record.layer, record.expert) for record in pack.records())
        for step in trace:
            for layer, chosen in zip(pack.layers(), step, strict=True):
                if layer in layers:
                    offload.store.touch(layer, dict.fromkeys(chosen, 1.0), 1)


def _read(engine: Engine) -> int:
    stats = engine.offloads.stats()
    return 0 if stats is None else stats.read_bytes


class Disk:
    """Random records of the pack, ``top_k`` at a time, by a reader of its own."""

    def __init__(self, pack: ExpertPack, top_k: int) -> None:
        self._pack, self._top_k = pack, top_k
        self._size = pack.layout(pack.layers()[0]).record_bytes
        self._pool, self._reader = host.HostPool(2 * top_k, self._size), open_reader(pack, top_k)
        if not self._reader.direct:
            sys.exit(f"{pack.path} is on a filesystem without O_DIRECT; the page cache would be measured")
        for slot in range(2 * top_k):
            self._pool.view(slot)[:] = 0
        self._random, self._process = random.Random(1), psutil.Process()
        self.cpu_s = self.num_bytes = 0.0

    def rate(self, seconds: float) -> float:
        """Bytes per second."""
        slot, under_way, done = 0, 0, 0
        cpu_s, start_s = sum(self._process.cpu_times()[:2]), time.perf_counter()
        while (running := time.perf_counter() - start_s < seconds) or under_way:
            while running and under_way < self._top_k:
                layer, expert = self._random.choice(self._pack.layers()), self._random.randrange(self._pack.num_experts)
                record = self._pack.record(layer, expert)
                self._reader.submit(slot, record.offset, min(record.nbytes, self._size), self._pool.address(slot))
                slot, under_way = (slot + 1) % (2 * self._top_k), under_way + 1
            if self._reader.next(1.0):
                done, under_way = done + 1, under_way - 1
        self.cpu_s += sum(self._process.cpu_times()[:2]) - cpu_s
        self.num_bytes += done * self._size
        return done * self._size / (time.perf_counter() - start_s)


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    pack = checkpoint.tensors.experts
    assert pack is not None
    wants = Wants(context=1024, batch=1, kv_dtype="bf16", activations="int8")
    plan = plan_here(checkpoint, "keep", wants, ram=args.ram)
    kernels.set_num_threads(plan.resolved.threads)
    moe_layers, experts, top_k = len(pack.layers()), pack.num_experts, args.top_k
    result: dict[str, Any] = {
        "pack_bytes": pack.path.stat().st_size,
        "ram_bytes": sum(device.used_bytes for device in plan.devices if device.kind == "ram"),
    }
    traces = {name: TRACES[name](moe_layers, experts, top_k, 512, args.seed) for name in args.traces}
    for name, trace in traces.items():
        result[name] = {"trace": describe(trace, experts)}
        for fraction in (0.10, 0.25, 0.50) if args.simulate else ():
            result[name][f"hit_rate_{fraction:.0%}"] = policies(trace, experts, fraction)
        print(name, json.dumps(result[name]), flush=True)
    if args.simulate:
        return result
    engine = load_engine(checkpoint, plan)
    offload = engine.offloads.stats()
    assert offload is not None, "everything fits: give less --ram"
    result |= {"slots": offload.slots, "resident": round(offload.slots / (moe_layers * experts), 3)}
    if args.own_router:
        trace, recalls, by_rank = own_router(engine, args.own_router)
        result["own router"] = {
            "recall": [round(recall, 3) for recall in recalls],
            "right_by_rank": [round(right, 3) for right in by_rank],
        } | describe(trace, experts)
        for fraction in (0.10, 0.25, 0.50):
            result["own router"][f"hit_rate_{fraction:.0%}"] = policies(trace, experts, fraction)
        print("own router", json.dumps(result["own router"]), flush=True)
        return result
    with_all, disk = _resident(engine, offload.slots, moe_layers, top_k), Disk(pack, top_k)
    for name, trace in traces.items():
        for recall in args.recall:
            at_first = engine.offloads.stats()
            remember(engine, trace[:HISTORY])
            steps = decode(engine, trace[HISTORY:], args.tokens, recall, disk)
            stats = since(engine.offloads.stats(), at_first)  # type: ignore[arg-type]
            then = _resident(engine, offload.slots, moe_layers, top_k)
            rates = [step.disk_rate / 1e9 for step in steps]
            found = summary(steps, [*with_all, *then], moe_layers) | {
                "disk_gb_per_s": [round(min(rates), 2), round(max(rates), 2)],
                "hit_rate": round(stats.hit_rate, 4),
                "foreseen_reads": stats.store.prefetched,
                "foreseen_right": round(stats.store.prefetch_hits / max(1, stats.store.prefetched), 3),
                "spent_ms": ledger(steps),
                "spent_ms_disk_idle": idle_disk(steps),
                "spent_ms_with_all_in_slots": [ledger(with_all), ledger(then)],
            }
            key, with_all = name if recall is None else f"{name}, recall {recall:g}", then
            result.setdefault(key, {}).update(found)
            print(key, json.dumps(found), flush=True)
    result |= {
        "rss_bytes": psutil.Process().memory_info().rss,
        "cpu_s_per_gb": round(disk.cpu_s / disk.num_bytes * 1e9, 4),
    }
    return result


def summary(steps: Sequence[Step], resident: Sequence[Step], layers: int) -> dict[str, Any]:
    """Against the three bounds; ``resident`` are steps with all experts in slots, before and after."""
    compute = statistics.median(step.seconds for step in resident)
    in_experts = statistics.median(step.spent_s["experts"] for step in resident)
    total = sum(step.seconds for step in steps)
    overlapped = sum(max(compute, sum(step.needed_bytes) / step.disk_rate) for step in steps)
    by_layer = sum(
        compute - in_experts + sum(max(in_experts / layers, needed / step.disk_rate) for needed in step.needed_bytes)
        for step in steps
    )
    needed_bytes = sum(sum(step.needed_bytes) for step in steps)
    one_by_one = sum(compute + sum(step.needed_bytes) / step.disk_rate for step in steps)
    return {
        "decode_tokens_per_s": round(len(steps) / total, 3),
        "read_bytes_per_token": round(sum(step.read_bytes for step in steps) / len(steps)),
        "needed_bytes_per_token": round(needed_bytes / len(steps)),
        "compute_ms_per_token": round(compute * 1e3, 2),
        "of_bound": round(overlapped / total, 3),
        "of_layer_bound": round(by_layer / total, 3),
        "of_serial": round(one_by_one / total, 3),
    }


def _resident(engine: Engine, slots: int, layers: int, top_k: int, tokens: int = 10) -> list[Step]:
    """Steps whose experts are all in their slots: a trace that repeats few of them."""
    few = min(2 * top_k, slots // layers - top_k)
    generator = random.Random(5)
    trace = [[generator.sample(range(few), top_k) for _ in range(layers)] for _ in range(_TOUCH + tokens)]
    steps = decode(engine, trace, tokens, None, None, _TOUCH)
    assert not any(step.read_bytes for step in steps)
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pack", type=Path, help="a packed model (`glmlocal pack`)")
    parser.add_argument("--ram", default="2.4GiB")
    parser.add_argument("--tokens", type=int, default=48, help="timed decode steps per trace")
    parser.add_argument("--seed", type=int, default=0, help="of the traces")
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument(
        "--recall",
        type=lambda text: None if text == "none" else float(text),
        nargs="*",
        default=[None],
        help="what part of a layer's experts is foreseen; real weights: 0.72 (docs/landscape); none: nothing is",
    )
    parser.add_argument(
        "--own-router", type=int, metavar="TOKENS", help="instead: hit rates and guesses for the model's own routing"
    )
    parser.add_argument("--simulate", action="store_true", help="the policies' hit rates, nothing timed")
    args = parser.parse_args(argv)
    checkpoint = open_checkpoint(args.pack)
    result = measure(checkpoint, args)
    print(f"pack {result['pack_bytes'] / GIB:.2f} GiB in {format_bytes(result['ram_bytes'])} of RAM")
    for name, found in result.items():
        if isinstance(found, dict) and "of_bound" in found:
            print(
                f"{name:28} {found['decode_tokens_per_s']:.2f} tok/s, {found['read_bytes_per_token'] / 1e6:.0f} MB per "
                f"token at {statistics.mean(found['disk_gb_per_s']):.1f} GB/s: {found['of_bound']:.2f} of max(compute, "
                f"read), {found['of_layer_bound']:.2f} of the same by layer, {found['of_serial']:.2f} of the sum"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
