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
* where the time of a step went, and what made it longer than the bound;
* with ``--recall R``: the same where so much of a layer's experts is foreseen while the layer before is computed;
* with ``--own-router``, instead: the same with the choices of the model's routers and what these name when they are
  asked early, as for users, and how much of it was right; of random weights that says nothing of real ones;
* with ``--simulate``, alone: hit rates beside LRU's and Belady's on the same trace, at 10, 25 and 50 % of the experts;
* CPU seconds per GB read, of reading alone.

Ends with one JSON line. The page cache is kept out by O_DIRECT; a reader without it is refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from _decoding import HISTORY, Disk, Step, Watched, decode, idle_disk, ledger, remember, with_all_in_slots
from _routing import TRACES, Trace, describe, policies

from glmlocal import kernels
from glmlocal.engine.loader import load_engine
from glmlocal.engine.planning import plan_here
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.offload.stats import since
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB, format_bytes


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    pack = checkpoint.tensors.experts
    assert pack is not None
    wants = Wants(context=1024, batch=1, kv_dtype="bf16", activations="int8")
    plan = plan_here(checkpoint, "keep", wants, ram=args.ram)
    kernels.set_num_threads(plan.resolved.threads)
    layers, experts, top_k = len(pack.layers()), pack.num_experts, args.top_k
    result: dict[str, Any] = {
        "pack_bytes": pack.path.stat().st_size,
        "ram_bytes": sum(device.used_bytes for device in plan.devices if device.kind == "ram"),
    }
    traces = {name: TRACES[name](layers, experts, top_k, 512, args.seed) for name in args.traces}
    for name, trace in traces.items():
        result[name] = hit_rates(trace, experts) if args.simulate else {"trace": describe(trace, experts)}
        print(name, json.dumps(result[name]), flush=True)
    if args.simulate:
        return result
    engine = load_engine(checkpoint, plan)
    offload = engine.offloads.stats()
    assert offload is not None, "everything fits: give less --ram"
    result |= {"slots": offload.slots, "resident": round(offload.slots / (layers * experts), 3)}
    with_all, disk = with_all_in_slots(engine, offload.slots, layers, top_k), Disk(pack, top_k)
    runs: list[tuple[str, Trace | None, float | None]] = [
        (name if recall is None else f"{name}, recall {recall:g}", trace, recall)
        for name, trace in traces.items()
        for recall in args.recall
    ]
    for name, trace, recall in [("own router", None, None)] if args.own_router else runs:
        remember(engine, [] if trace is None else trace[:HISTORY])
        at_first = engine.offloads.stats()
        run = decode(engine, None if trace is None else trace[HISTORY:], args.tokens, recall, disk)
        stats = since(engine.offloads.stats(), at_first)  # type: ignore[arg-type]
        then = with_all_in_slots(engine, offload.slots, layers, top_k)
        rates = [step.disk_rate / 1e9 for step in run.steps]
        found = summary(run.steps, [*with_all, *then], layers) | {
            "disk_gb_per_s": [round(min(rates), 2), round(max(rates), 2)],
            "hit_rate": round(stats.hit_rate, 4),
            "foreseen_reads": stats.store.prefetched,
            "foreseen_right": round(stats.store.prefetch_hits / max(1, stats.store.prefetched), 3),
            "spent_ms": ledger(run.steps),
            "spent_ms_disk_idle": idle_disk(run.steps),
            "spent_ms_with_all_in_slots": [ledger(with_all), ledger(then)],
        }
        if trace is None:
            found |= foreseen(run.watched) | hit_rates(chosen(run.watched), experts)
        result.setdefault(name, {}).update(found)
        with_all = then
        print(name, json.dumps(found), flush=True)
    result |= {
        "rss_bytes": psutil.Process().memory_info().rss,
        "cpu_s_per_gb": round(disk.cpu_s / disk.num_bytes * 1e9, 4),
    }
    return result


def hit_rates(trace: Trace, experts: int) -> dict[str, Any]:
    rates = {f"hit_rate_{fraction:.0%}": policies(trace, experts, fraction) for fraction in (0.10, 0.25, 0.50)}
    return {"trace": describe(trace, experts)} | rates


def chosen(watched: Sequence[Watched]) -> Trace:
    """What the model's routers chose."""
    return [list(step) for step in zip(*(layer.chosen for layer in watched), strict=True)]


def foreseen(watched: Sequence[Watched]) -> dict[str, Any]:
    """Of what a layer's router chose, the part that it named when it was asked early; and how often the guesses were
    right, likeliest first."""
    pairs = [list(zip(layer.guessed, layer.chosen, strict=True)) for layer in watched]
    recall = [statistics.mean(len({*one} & {*two}) / len(two) for one, two in layer) for layer in pairs]
    every = [(guess, {*choice}) for layer in pairs for guess, choice in layer]
    by_rank = [statistics.mean(guess[rank] in choice for guess, choice in every) for rank in range(len(every[0][0]))]
    return {"recall": [round(r, 3) for r in recall], "right_by_rank": [round(right, 3) for right in by_rank]}


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
        "above_bound_ms": above_bound(steps, overlapped),
    }


def above_bound(steps: Sequence[Step], bound_s: float) -> dict[str, float]:
    """Of what a token takes more than the bound: the disk idle, reading in vain, reading more slowly than alone; less
    what the bound has beyond reading, in steps that compute for longer."""
    alone_s = sum(sum(step.needed_bytes) / step.disk_rate for step in steps)
    vain_s = sum((step.read_bytes - sum(step.needed_bytes)) / step.disk_rate for step in steps)
    busy_s = sum(step.disk_s for step in steps)
    parts = {
        "idle": sum(step.seconds for step in steps) - busy_s,
        "in_vain": vain_s,
        "slower": busy_s - alone_s - vain_s,
        "compute_bound": alone_s - bound_s,
    }
    return {what: round(seconds / len(steps) * 1e3, 2) for what, seconds in parts.items()}


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
        "--own-router", action="store_true", help="instead of traces: the model's routers choose, and guess"
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
