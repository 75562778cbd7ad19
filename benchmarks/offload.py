"""Decode of a packed model that is larger than its memory: against the bound of compute and disk, and caching policies.

    python benchmarks/offload.py PACK --ram 2.4GiB --tokens 48

Routing follows fixed traces (so that policies and runs are comparable), everything else is the model's own: every
layer's chosen experts are replaced by the trace's. For each trace it prints

* measured decode over the bound Σ over steps of max(compute, read), where compute is the time of the same step with all
  experts in their slots (median of steps before and after), and read is the bytes that were read in this step over the
  disk's O_DIRECT rate, measured before and after with the same reader. It takes for granted that all reads of a step
  can be overlapped with all of its computing;
* the same over the bound by layer, Σ over steps of (compute outside experts + Σ over layers of max(experts, read)): a
  layer cannot read before its router has chosen, nor the next one begin before this one ends, unless foreseen;
* where the time of a step went;
* with ``--recall R``: the same where so much of a layer's experts is foreseen before its attention, right or wrong;
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
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB, format_bytes

WARM_UP = 24  # tokens of the trace that fill the slots before anything is timed
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

    Guesses of them are right for each of a token's experts with probability ``recall``; None: nothing is foreseen.
    """

    inner: Experts
    choices: list[list[int]]
    num_experts: int
    recall: float | None
    spent: Spent
    token: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(7)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def foresee(self, num_tokens: int, route: Route) -> None:
        if self.recall is None or num_tokens > 1 or self.token >= len(self.choices):
            return
        right = [expert for expert in self.choices[self.token] if self._random.random() < self.recall]
        others = self._random.sample(range(self.num_experts), len(self.choices[self.token]) - len(right))
        guess = torch.tensor([list(dict.fromkeys([*right, *others]))], dtype=torch.int32)

        def guessed() -> tuple[Tensor, Tensor]:
            route()  # for what it costs
            return guess, torch.linspace(1.0, 0.5, guess.shape[1])[torch.randperm(guess.shape[1])][None]

        self.inner.foresee(num_tokens, guessed)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if x.shape[0] == 1:
            topk_ids = torch.tensor([self.choices[self.token]], dtype=torch.int32)
            self.token += 1
        self.spent.begin_experts()
        return self.inner.submit(x, topk_ids, topk_weights)


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
            self.guessed.append(route()[0][0].tolist())
        self.inner.foresee(num_tokens, route)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if x.shape[0] == 1:
            self.chosen.append(sorted(topk_ids[0].tolist()))
        return self.inner.submit(x, topk_ids, topk_weights)


def own_router(engine: Engine, tokens: int) -> tuple[Trace, list[float]]:
    """What the model's own router chooses while it writes, and per layer what part of it was guessed before."""
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
    return [list(step) for step in zip(*(each.chosen for each in records), strict=True)], recalls


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
    """Where a step's time goes, and what each of its layers read."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._depth = engine, 0
        self.seconds: dict[str, float] = {}
        self.layer_bytes: list[int] = []
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
        self.seconds, self.layer_bytes = {}, [_read(self._engine)]

    def begin_experts(self) -> None:
        self.layer_bytes.append(_read(self._engine))

    def end_step(self) -> None:
        self.layer_bytes.append(_read(self._engine))

    def _timed(self, inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            inside_s = sum(self.seconds.values())
            try:
                return inner(*args, **kwargs)
            finally:  # what calls inside it took is theirs
                inside_s = sum(self.seconds.values()) - inside_s
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start_s - inside_s

        return timed


@dataclass(frozen=True)
class Step:
    seconds: float
    read_bytes: int
    layer_bytes: tuple[int, ...]  # of each layer with experts, from its submit to the next one's
    spent_s: dict[str, float]


def decode(engine: Engine, trace: Trace, tokens: int, recall: float | None, warm_up: int = WARM_UP) -> list[Step]:
    """Times of ``tokens`` decode steps, after a warm-up that fills the slots."""
    restore = engine.runner.model
    params = SamplingParams(temperature=0.0, max_tokens=warm_up + tokens + 1, ignore_eos=True)
    engine.add(Request("bench", (11, 12, 13, 14), params))
    steps = []
    with Spent(engine) as spent:
        following(engine, trace, recall, spent)
        engine.step()
        for _ in range(warm_up + tokens):
            spent.begin_step()
            before, start_s = _read(engine), time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - start_s
            spent.end_step()
            by_layer = tuple(two - one for one, two in pairwise(spent.layer_bytes[1:]))
            steps.append(Step(seconds, _read(engine) - before, by_layer, spent.seconds))
        while engine.has_work:
            engine.step()
    engine.runner.model = restore
    return steps[warm_up:]


def ledger(steps: Sequence[Step]) -> dict[str, float]:
    """Milliseconds per token by what they went into; "other" is Python and the system."""
    found = {
        what: statistics.mean(step.spent_s.get(what, 0.0) for step in steps) * 1e3
        for what in ("attention", "guessing", "experts", "disk", "checksums", "shared", "head")
    }
    found["other"] = statistics.mean(step.seconds for step in steps) * 1e3 - sum(found.values())
    return {what: round(value, 2) for what, value in found.items()}


def _read(engine: Engine) -> int:
    stats = engine.offloads.stats()
    return 0 if stats is None else stats.read_bytes


def disk_rate(pack: ExpertPack, top_k: int, seconds: float = 1.0) -> dict[str, float]:
    """GB/s of random records, ``top_k`` at a time, and what it costs the CPU."""
    layer = pack.layers()[0]
    size = pack.layout(layer).record_bytes
    pool = host.HostPool(2 * top_k, size)
    reader = open_reader(pack, top_k)
    if not reader.direct:
        sys.exit(f"{pack.path} is on a filesystem without O_DIRECT; the page cache would be measured")
    for slot in range(2 * top_k):
        pool.view(slot)[:] = 0
    generator, slot, under_way, done = random.Random(1), 0, 0, 0
    process = psutil.Process()
    cpu_s, start_s = sum(process.cpu_times()[:2]), time.perf_counter()
    while (running := time.perf_counter() - start_s < seconds) or under_way:
        while running and under_way < top_k:
            record = pack.record(generator.choice(pack.layers()), generator.randrange(pack.num_experts))
            reader.submit(slot, record.offset, min(record.nbytes, size), pool.address(slot))
            slot, under_way = (slot + 1) % (2 * top_k), under_way + 1
        if reader.next(1.0):
            done, under_way = done + 1, under_way - 1
    gigabytes = done * size / 1e9
    return {
        "gb_per_s": gigabytes / (time.perf_counter() - start_s),
        "cpu_s_per_gb": (sum(process.cpu_times()[:2]) - cpu_s) / gigabytes,
    }


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
    traces = {name: make(moe_layers, experts, top_k, 512, args.seed) for name, make in TRACES.items()}
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
        trace, recalls = own_router(engine, args.own_router)
        result["own router"] = {"recall": [round(recall, 3) for recall in recalls]} | describe(trace, experts)
        for fraction in (0.10, 0.25, 0.50):
            result["own router"][f"hit_rate_{fraction:.0%}"] = policies(trace, experts, fraction)
        print("own router", json.dumps(result["own router"]), flush=True)
        return result
    cpu_s_per_gb = []
    with_all = _resident(engine, offload.slots, moe_layers, top_k)
    for name, trace in traces.items():
        for recall in args.recall:
            before, at_first = disk_rate(pack, top_k), engine.offloads.stats()
            steps = decode(engine, trace, args.tokens, recall)
            stats = since(engine.offloads.stats(), at_first)  # type: ignore[arg-type]
            after, then = disk_rate(pack, top_k), _resident(engine, offload.slots, moe_layers, top_k)
            cpu_s_per_gb += [before["cpu_s_per_gb"], after["cpu_s_per_gb"]]
            rate = (before["gb_per_s"] + after["gb_per_s"]) / 2
            found = summary(steps, [*with_all, *then], rate * 1e9, moe_layers) | {
                "disk_gb_per_s": [round(before["gb_per_s"], 2), round(after["gb_per_s"], 2)],
                "hit_rate": round(stats.hit_rate, 4),
                "foreseen_reads": stats.store.prefetched,
                "foreseen_right": round(stats.store.prefetch_hits / max(1, stats.store.prefetched), 3),
                "spent_ms": ledger(steps),
                "spent_ms_with_all_in_slots": [ledger(with_all), ledger(then)],
            }
            key, with_all = name if recall is None else f"{name}, recall {recall:g}", then
            result.setdefault(key, {}).update(found)
            print(key, json.dumps(found), flush=True)
    result |= {
        "rss_bytes": psutil.Process().memory_info().rss,
        "cpu_s_per_gb": round(statistics.median(cpu_s_per_gb), 4),
    }
    return result


def summary(steps: Sequence[Step], resident: Sequence[Step], rate: float, layers: int) -> dict[str, Any]:
    """Against the three bounds; ``resident`` are steps with all experts in slots, before and after."""
    compute = statistics.median(step.seconds for step in resident)
    in_experts = statistics.median(step.spent_s["experts"] for step in resident)
    total = sum(step.seconds for step in steps)
    overlapped = sum(max(compute, step.read_bytes / rate) for step in steps)
    by_layer = sum(
        compute - in_experts + sum(max(in_experts / layers, num_bytes / rate) for num_bytes in step.layer_bytes)
        for step in steps
    )
    read_bytes = sum(step.read_bytes for step in steps)
    return {
        "decode_tokens_per_s": round(len(steps) / total, 3),
        "read_bytes_per_token": round(read_bytes / len(steps)),
        "compute_ms_per_token": round(compute * 1e3, 2),
        "of_bound": round(overlapped / total, 3),
        "of_layer_bound": round(by_layer / total, 3),
        "of_serial": round((compute * len(steps) + read_bytes / rate) / total, 3),
    }


def _resident(engine: Engine, slots: int, layers: int, top_k: int, tokens: int = 10) -> list[Step]:
    """Steps whose experts are all in their slots: a trace that repeats few of them."""
    few = min(2 * top_k, slots // layers - top_k)
    generator = random.Random(5)
    trace = [[generator.sample(range(few), top_k) for _ in range(layers)] for _ in range(_TOUCH + tokens)]
    steps = decode(engine, trace, tokens, None, _TOUCH)
    assert not any(step.read_bytes for step in steps)
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pack", type=Path, help="a packed model (`glmlocal pack`)")
    parser.add_argument("--ram", default="2.4GiB")
    parser.add_argument("--tokens", type=int, default=48, help="timed decode steps per trace")
    parser.add_argument("--seed", type=int, default=0, help="of the traces")
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
