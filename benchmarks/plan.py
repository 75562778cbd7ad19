"""What the planner says against what happens: decode, prefill and memory of whole models, doctor's constants only.

    python benchmarks/plan.py MODEL ... [--contexts 0,2000] [--prompts 512,1500] [--repeat 5] [--threads N] [--cpu-time]

MODEL is what ``glmlocal chat`` takes (``demo``, or what ``benchmarks/synth.py`` wrote). Each model is loaded in a
process of its own, so that its memory can be compared with the plan's. A round measures the kernels on doctor's shapes,
which no released model has, and then every model once; medians of all rounds are compared: that way other work on the
machine slows both sides down alike. ``--doctor`` takes what doctor has
stored instead of measuring, for a machine that does nothing else.

``--cpu-time`` counts the seconds that the processor worked for us, which other work changes little, instead of those on
the clock, and wants one thread. Ends with one JSON line; exit code 1 where a median is off by more than ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from _common import Summary, Worker, serve

DECODE_TOKENS = 16


class Engine:
    """In the worker: one loaded model."""

    def __init__(self, model: str, context: int, threads: int | None, cpu_time: bool, options: dict[str, Any]) -> None:
        from glmlocal.bench import plain_ids, prompts
        from glmlocal.llm import LLM

        self.clock = time.process_time if cpu_time else time.perf_counter
        self.llm = LLM(model, context=context, threads=threads, max_batch=1, **options)
        self.prompt = prompts(plain_ids(self.llm))

        self.run(min(64, context - DECODE_TOKENS - 2))  # pages, scratch memory and threads are there

    def run(self, prompt_tokens: int, tokens: int = DECODE_TOKENS) -> dict[str, float]:
        """Tokens per second of the prompt to its first token, and of those after it."""
        start, first, found = self.clock(), None, 0
        for delta in self.llm.generate(
            self.prompt(prompt_tokens), stream=True, temperature=0.0, max_tokens=tokens, ignore_eos=True
        ):
            found += len(delta.token_ids)
            if first is None and found:
                first = self.clock()
        assert first is not None
        return {"prefill": prompt_tokens / (first - start), "decode": (found - 1) / max(self.clock() - first, 1e-9)}

    def memory(self) -> dict[str, int]:
        """What this process has written: pages of the mapped checkpoint that were read are the page cache's."""
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return {
            "process_bytes": next(int(line.split()[1]) << 10 for line in rollup.splitlines() if "Private_Dirty" in line)
        }

    def plan(self) -> dict[str, Any]:
        from glmlocal.engine.loader import allocations
        from glmlocal.planner.plan_json import as_json

        engine = self.llm.engine
        found = allocations(self.llm.plan, engine.runner.model, engine.runner.kv_cache, engine.offloads)
        lines = {each.what: [each.planned_bytes, each.actual_bytes] for each in found}
        return {"plan": as_json(self.llm.plan), "lines": lines}


class Calibrator:
    """In a worker of its own: what doctor would find now."""

    def __init__(self, threads: int | None, cpu_time: bool, schemes: list[str]) -> None:
        from glmlocal import kernels

        kernels.set_num_threads(threads)
        self.clock, self.schemes = (time.process_time if cpu_time else time.perf_counter), schemes

    def rates(self) -> dict[str, Any]:
        from glmlocal import calibrate
        from glmlocal.machine.kernel_rates import as_json

        return as_json(calibrate.measure(schemes=self.schemes, clock=self.clock, quick=True))


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number of several equal objects; text as in the first."""
    out: dict[str, Any] = {}
    for key, value in rounds[0].items():
        values = [each[key] for each in rounds]
        if isinstance(value, dict):
            out[key] = middle(values)
        else:
            out[key] = median(values) if isinstance(value, int | float) else value
    return out


def predictions(plan_json: dict[str, Any], model: str, kernels: Any, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second as the forecast has them, of the plan that was executed."""
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.machine import kernel_rates
    from glmlocal.models.footprints import of_checkpoint
    from glmlocal.planner.efficiency import DEFAULT, Speeds
    from glmlocal.planner.forecast import PlacedModel
    from glmlocal.planner.plan_json import from_json
    from glmlocal.resolve import resolve

    plan = from_json(json.dumps(plan_json))
    checkpoint = open_checkpoint(resolve(model))
    footprint = of_checkpoint(checkpoint, plan.resolved.quant)
    checkpoint.tensors.close()
    machine = plan.machine
    if kernels is not None:
        cpu = replace(machine.cpu, kernels=kernel_rates.from_json(kernels), threads=plan.resolved.threads)
        machine = replace(machine, cpu=cpu)
    assert plan.placement is not None
    placed, speeds = (
        PlacedModel(footprint, plan.placement, machine, plan.resolved, DEFAULT),
        Speeds(machine, DEFAULT, 1),
    )
    out = {}
    for depth in args.contexts:
        steps = [placed.decode(speeds, max(depth, 1) + i).total for i in range(1, DECODE_TOKENS)]
        out[f"decode at {depth}"] = len(steps) / sum(steps)
    for tokens in args.prompts:
        out[f"prefill of {tokens}"] = tokens / placed.prefill(speeds, tokens).total
    return out


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--contexts", type=numbers, default=[0, 2000])
    parser.add_argument("--prompts", type=numbers, default=[512, 1500])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further round after so long; default 60")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--schemes", default="Q4_0,Q4_1,Q8_0,bf16,f32", help="that the models have, of doctor's")
    parser.add_argument("--doctor", action="store_true", help="predict from what `glmlocal doctor` has stored")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="for LLM: quant=int4")
    parser.add_argument("--limit", type=float, default=0.15)
    parser.add_argument("--worker", choices=["engine", "calibrator"], help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker is None and not parsed.models:
        parser.error("give at least one MODEL")
    if parsed.cpu_time and parsed.threads != 1:
        parser.error("--cpu-time wants --threads 1: threads that wait would be counted as working")
    return parsed


def main() -> int:
    args = arguments()
    if args.worker is not None:
        serve(Engine if args.worker == "engine" else Calibrator)
        return 0
    command = [sys.executable, str(Path(__file__)), "--worker"]
    options = dict(pair.split("=", 1) for pair in args.option)
    context = max([depth + DECODE_TOKENS + 2 for depth in args.contexts] + [tokens + 4 for tokens in args.prompts])
    common = {"threads": args.threads, "cpu_time": args.cpu_time}
    runs: dict[str, dict[str, list[float]]] = {model: {} for model in args.models}
    plans: dict[str, Any] = {}
    rounds: list[dict[str, Any]] = []
    with ExitStack() as workers:
        engines = {}
        for model in args.models:
            engine = engines[model] = workers.enter_context(Worker(model, [*command, "engine"]))
            engine.call("load", model=model, context=context, options=options, **common)
            plans[model] = engine.call("plan")
        calibrator = workers.enter_context(Worker("calibrator", [*command, "calibrator"]))
        calibrator.call("load", **common, schemes=args.schemes.split(","))
        start = time.monotonic()
        for number in range(args.repeat):
            if number and time.monotonic() - start > 60 * args.minutes:
                break
            if not args.doctor:
                rounds.append(calibrator.call("rates"))
            for model, engine in engines.items():
                measure_once(engine, args, runs[model])
            latest = {Path(model).name: {what: rates[-1] for what, rates in runs[model].items()} for model in runs}
            print(f"round {number + 1} of {args.repeat}: {json.dumps(latest)}", file=sys.stderr, flush=True)
        memory = {model: engine.call("memory")["process_bytes"] for model, engine in engines.items()}
    return report(args, runs, plans, middle(rounds) if rounds else None, memory)


def measure_once(engine: Worker, args: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    for depth in args.contexts:
        found = engine.call("run", prompt_tokens=max(depth, 1))
        rates.setdefault(f"decode at {depth}", []).append(found["decode"])
    for tokens in args.prompts:
        found = engine.call("run", prompt_tokens=tokens, tokens=1)
        rates.setdefault(f"prefill of {tokens}", []).append(found["prefill"])


def report(
    args: argparse.Namespace, runs: dict[str, Any], plans: dict[str, Any], kernels: Any, memory: dict[str, int]
) -> int:
    results: list[dict[str, Any]] = []
    off = 0
    for model in args.models:
        predicted = predictions(plans[model]["plan"], model, kernels, args)
        name = Path(model).name
        for what, rates in runs[model].items():
            summary = Summary.of(rates)
            ratio = summary.median / predicted[what]
            off += abs(ratio - 1) > args.limit
            print(
                f"{name:22} {what:16} measured {summary.median:8.2f} ({summary.low:.2f} to {summary.high:.2f}), "
                f"plan {predicted[what]:8.2f} tok/s: measured/plan {ratio:.2f}"
            )
            results.append({"model": name, "what": what, "plan": predicted[what], "ratio": ratio, **summary.rounded()})
        ram = next(each for each in plans[model]["plan"]["devices"] if each["kind"] == "ram")
        planned = sum(line["bytes"] for line in ram["lines"] if line["what"] != "margin")
        wrong = [what for what, (wanted, actual) in plans[model]["lines"].items() if wanted != actual]
        print(f"{name:22} memory: planned {planned >> 20} MiB without margin, process {memory[model] >> 20} MiB")
        print(f"{name:22} ledger lines that differ from the real tensors: {', '.join(wrong) or 'none'}")
        results.append({"model": name, "planned_bytes": planned, "process_bytes": memory[model], "lines_off": wrong})
    how = {"threads": args.threads, "cpu_time": args.cpu_time, "repeats": min(map(len, runs[args.models[0]].values()))}
    print(json.dumps({**how, "results": results, "kernels": kernels}))
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
