"""``glmlocal bench MODEL``: prefill and decode speed, and what part of this machine's ceilings they reach.

``--json`` prints one object; docs/bench.md says what each key means:

    model, threads
    prefill    [{tokens, tokens_per_s, fraction_of_peak, min, max, stddev, repeats, flops, flops_per_token}]
    decode     [{context, tokens, tokens_per_s, fraction_of_bandwidth, min, max, stddev, repeats, bytes_per_token,
               flops_per_token}]
    peaks      {read_gb_per_s, fp32_gflop_per_s, int8_gop_per_s, arithmetic, read_bytes, before, after, difference,
               busy}
    memory     {weights_bytes, kv_bytes_per_token, kv_bytes, peak_rss_bytes, available_bytes}
    skipped    [{test, tokens, context, reason}]
    errors     [text]; a fraction above 1.0 is one, and the exit code then is 1
    interrupted                 true after Ctrl-C, with what was measured until then (exit code 130)
    repeat, load_s, date, kernels, isa, kv_dtype, quant {name: bytes}, parts [{name, quant, weights, bytes, …}]
    versions   {glmlocal, python, torch}, cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from glmlocal.cli.options import add_engine_options, add_plan_option, at_least, planned
from glmlocal.cli.pull import offer_to_pull
from glmlocal.cli.terminal import Console, bar, one_line
from glmlocal.errors import PlanError
from glmlocal.units import format_bytes

if TYPE_CHECKING:
    from glmlocal.bench import Measured, Row, Skipped
    from glmlocal.cost import ModelCost
    from glmlocal.llm import LLM
    from glmlocal.peaks import Peaks

EXIT_IMPOSSIBLE, EXIT_INTERRUPTED = 1, 130
_CEILING_TRIES = 4
_MOST_TOKENS = 1 << 30
_DEFAULTS = {"prefill": "32,128,512,2048", "decode": 64, "context": "0,4096", "repeat": 3}
_EPILOG = """\
pp512 is the speed of a prompt of 512 tokens, its first answer token included; tg64 @ d4096 that of the 64 tokens after
the first, 4096 tokens deep in the context: the names are llama-bench's. ± is half the range of the repeats. The last
column divides by what was measured in the same run on the same threads: operations per second for pp, bytes read from
memory per second for tg.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure prefill and decode speed",
        description="Measure how fast MODEL runs here, and what part of this machine's ceilings it reaches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, or demo")
    for name, text in (
        ("prefill", "lengths of the prompts that are timed; 0 for none"),
        ("context", "how deep in the context decoding is timed"),
    ):
        default = _DEFAULTS[name]
        parser.add_argument(
            f"--{name}", type=_counts, default=default, metavar="N,N,…", help=f"{text} (default: {default})"
        )
    for name, least, text in (
        ("decode", 0, "tokens that are decoded and timed; 0 for none"),
        ("repeat", 1, "how often each is measured"),
    ):
        default = _DEFAULTS[name]
        parser.add_argument(
            f"--{name}", type=at_least(least), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_plan_option(parser)
    add_engine_options(parser)


def _counts(text: str) -> tuple[int, ...]:
    """``128,512`` → (128, 512), in order and once each."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 11 and int(part) < _MOST_TOKENS for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of tokens such as 128,512")
    return tuple(dict.fromkeys(map(int, parts)))


@dataclass(slots=True)
class Run:
    """What was measured so far."""

    wanted: list[Row]
    skipped: list[Skipped]
    before: Peaks
    after: Peaks | None = None
    between: list[Peaks] = field(default_factory=list)  # after every round of all rows but the last
    rates: dict[Row, list[float]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def peaks(self) -> Peaks:
        best = self.before
        for other in (*self.between, *([] if self.after is None else [self.after])):
            best = best.best_of(other)
        return best


def run(args: argparse.Namespace) -> int:
    """Load, measure, print. Raises what loading raises, and PlanError where nothing that was asked for fits."""
    offer_to_pull(args)
    from glmlocal import bench

    wanted = bench.rows(args.prefill, args.decode, args.context)
    if not wanted:
        raise PlanError("nothing to measure: --prefill and --decode are both 0")
    console = Console()
    start_s = time.time()
    progress = console.err_is_screen and not args.json
    llm, fitting, skipped = bench.load(args.model, wanted, progress=progress, **planned(args))
    with llm:
        for skip in skipped:
            console.note(f"{skip.row.name} is skipped: it {skip.reason}")
        if not fitting:
            raise PlanError(f"nothing fits: {skipped[0].row.name} {skipped[0].reason}; give smaller lengths")
        cost = bench.cost_of(llm)
        result = _measure(llm, fitting, skipped, args.repeat, console)
        measured = _judge(result, cost)
        facts = describe(llm, cost, result, measured, args.repeat, start_s)
    if args.json:
        from glmlocal.cli.chat_render import dump_json

        print(dump_json(facts))
    else:
        _print(facts, measured)
    for error in facts["errors"]:
        print(f"glmlocal: error: {one_line(error)}", file=sys.stderr)
    if result.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_IMPOSSIBLE if facts["errors"] else 0


def _judge(result: Run, cost: ModelCost) -> list[Measured]:
    """Rows against the best of all ceilings; while one is above, the ceilings are measured again, some times.

    Other programs slow a measurement down and never speed it up, so it is the ceiling that was too low; but a rate
    that stays above it was measured or counted wrongly.
    """
    from glmlocal import bench, peaks

    tries = 0
    while True:
        measured = [bench.judge(row, rates, cost, result.peaks) for row, rates in result.rates.items()]
        if result.interrupted or tries == _CEILING_TRIES or not any(item.error for item in measured):
            return measured
        result.between.append(peaks.measure(result.before.threads))
        tries += 1


def _measure(llm: LLM, wanted: list[Row], skipped: list[Skipped], repeat: int, console: Console) -> Run:
    """Ceilings, warm-up, rows with the ceilings between the rounds and at the end; Ctrl-C ends it early."""
    from glmlocal import bench, kernels, peaks

    threads = kernels.num_threads()
    console.status("measuring the machine's read bandwidth and arithmetic peaks")
    result = Run(wanted, skipped, peaks.measure(threads))
    subject, prompt = bench.Model(llm), bench.prompts(bench.plain_ids(llm))
    total = repeat * len(wanted)
    try:
        console.status(f"warming up with {max(row.prompt_tokens for row in wanted)} tokens")
        bench.warm_up(subject, wanted, prompt)
        console.status(_progress(result, 0, total))
        for number, (row, rate) in enumerate(bench.timed(subject, wanted, repeat, prompt), 1):
            result.rates.setdefault(row, []).append(rate)
            console.status(_progress(result, number, total))
            if number % len(wanted) == 0 and number < total:
                result.between.append(peaks.measure(threads))
        result.after = peaks.measure(threads)
    except KeyboardInterrupt:
        result.interrupted = True
    console.clear_status()
    return result


def _progress(result: Run, number: int, total: int) -> str:
    import statistics

    done = ", ".join(f"{row.name} {statistics.median(rates):.4g}" for row, rates in result.rates.items())
    following = result.wanted[number % len(result.wanted)].name
    return f"{bar(number / total)} {number} of {total}, now {following}" + (f" · tok/s: {done}" if done else "")


def describe(
    llm: LLM, cost: ModelCost, result: Run, measured: Sequence[Measured], repeat: int, start_s: float
) -> dict[str, Any]:
    """Everything that was measured, in the form of ``--json``."""
    import datetime
    import platform
    from importlib.metadata import version

    from glmlocal import __version__, bench, kernels
    from glmlocal.machine.cpu import probe

    peaks = result.peaks
    kernel = kernels.describe()
    kv_cache = llm.engine.runner.kv_cache
    return {
        "model": llm.model_name,
        "threads": kernels.num_threads(),
        "prefill": [_prefill(m) for m in measured if m.row.context is None],
        "decode": [_decode(m, cost) for m in measured if m.row.context is not None],
        "peaks": {
            **_peaks(peaks),
            "arithmetic": bench.arithmetic_peak(cost, peaks)[0],
            "read_bytes": peaks.read_bytes,
            "before": _peaks(result.before),
            "after": None if result.after is None else _peaks(result.after),
            "difference": None if result.after is None else _significant(result.before.difference(result.after)),
            "busy": bench.is_busy(result.before, result.after),
        },
        "memory": _memory(cost, result.wanted),
        "skipped": [
            {"test": s.row.name, "tokens": s.row.tokens, "context": s.row.context, "reason": s.reason}
            for s in result.skipped
        ],
        "offload": _offload(llm),
        "errors": [m.error for m in measured if m.error is not None],
        "interrupted": result.interrupted,
        "repeat": repeat,
        "load_s": _significant(llm.load_s),
        "date": datetime.datetime.fromtimestamp(start_s, datetime.UTC).isoformat(timespec="seconds"),
        "kernels": kernel,
        "isa": kernels.isa(),
        "kv_dtype": str(kv_cache.keys[0].dtype).removeprefix("torch."),
        "quant": _quant(cost),
        "parts": [
            {
                "name": part.name,
                "quant": part.kind,
                "weights": part.weights,
                "bytes": part.nbytes,
                "weights_per_token": part.weights_per_token,
                "bytes_per_token": part.bytes_per_token,
            }
            for part in cost.parts
        ],
        "versions": {"glmlocal": __version__, "python": platform.python_version(), "torch": version("torch")},
        "cpu": probe().name,
    }


def _prefill(measured: Measured) -> dict[str, Any]:
    tokens = measured.row.tokens
    return {
        "tokens": tokens,
        "tokens_per_s": _significant(measured.spread.median),
        "fraction_of_peak": _significant(measured.fraction),
        **_spread(measured),
        "flops": int(measured.work),
        "flops_per_token": int(measured.work / tokens),
    }


def _decode(measured: Measured, cost: ModelCost) -> dict[str, Any]:
    row = measured.row
    return {
        "context": row.context,
        "tokens": row.tokens,
        "tokens_per_s": _significant(measured.spread.median),
        "fraction_of_bandwidth": _significant(measured.fraction),
        **_spread(measured),
        "bytes_per_token": int(measured.work),
        "flops_per_token": int(cost.decode_flops(row.prompt_tokens, row.tokens)),
    }


def _spread(measured: Measured) -> dict[str, Any]:
    spread = measured.spread
    return {
        "min": _significant(spread.minimum),
        "max": _significant(spread.maximum),
        "stddev": _significant(spread.stddev),
        "repeats": measured.repeats,
    }


def _peaks(peaks: Peaks) -> dict[str, Any]:
    int8 = peaks.int8_gop_per_s
    return {
        "read_gb_per_s": _significant(peaks.read_gb_per_s),
        "fp32_gflop_per_s": _significant(peaks.fp32_gflop_per_s),
        "int8_gop_per_s": None if int8 is None else _significant(int8),
    }


def _memory(cost: ModelCost, wanted: Sequence[Row]) -> dict[str, int]:
    import resource

    from glmlocal import memory

    return {
        "weights_bytes": cost.nbytes,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "kv_bytes": cost.kv_bytes_per_token * max(row.positions for row in wanted),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "available_bytes": memory.available_bytes(),
    }


def _offload(llm: LLM) -> dict[str, Any] | None:
    """Of everything since the model was loaded; None where all experts are in RAM."""
    stats = llm.offload_stats
    if stats is None:
        return None
    gpu = None if stats.gpu is None else asdict(stats.gpu)
    return {"tiers": stats.tiers(), "nvme": stats.nvme(), "slot_bytes": stats.slot_bytes, "gpu": gpu}


def _quant(cost: ModelCost) -> dict[str, int]:
    """Bytes by the name of their quantization, most first."""
    sums: dict[str, int] = {}
    for part in cost.parts:
        sums[part.kind] = sums.get(part.kind, 0) + part.nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def _print(facts: dict[str, Any], measured: Sequence[Measured]) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table

    # In a file or pipe a line stays a line, whatever its length.
    console = RichConsole(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("test", no_wrap=True)
    for heading in ("tokens/s", "±", "of the peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("moved", overflow="fold")
    peaks = facts["peaks"]
    for item in measured:
        spread = item.spread
        if item.row.context is None:
            work = f"{item.work / item.row.tokens / 1e9:.3g} GFLOP per token"
            ceiling = f"of {peaks['arithmetic']} peak"
        else:
            work, ceiling = f"{format_bytes(item.work)} per token", "of bandwidth"
        table.add_row(
            item.row.name,
            f"{spread.median:.2f}",
            f"{(spread.maximum - spread.minimum) / 2:.2f}",
            f"{item.fraction:.1%} {ceiling}",
            work,
        )
    for line in _heading(facts):
        console.print(one_line(line), style="dim")
    console.print()
    console.print(table)
    console.print()
    for line in _remarks(facts):
        console.print(one_line(line), style="dim")


def _heading(facts: dict[str, Any]) -> list[str]:
    memory, quant = facts["memory"], facts["quant"]
    stored = ", ".join(f"{name} {nbytes / memory['weights_bytes']:.0%}" for name, nbytes in quant.items())
    return [
        f"{facts['model']}: weights {format_bytes(memory['weights_bytes'])} ({stored}), "
        f"KV {facts['kv_dtype']} {format_bytes(memory['kv_bytes_per_token'])} per token",
        f"{facts['kernels']} on {facts['cpu']}, glmlocal {facts['versions']['glmlocal']}; "
        f"median of {facts['repeat']} repeats",
    ]


def _remarks(facts: dict[str, Any]) -> list[str]:
    peaks, memory = facts["peaks"], facts["memory"]
    int8 = "" if peaks["int8_gop_per_s"] is None else f", int8 {peaks['int8_gop_per_s']:.0f} GOP/s"
    lines = [
        f"peaks: reading {peaks['read_gb_per_s']:.1f} GB/s, fp32 {peaks['fp32_gflop_per_s']:.0f} GFLOP/s{int8}; "
        f"loaded in {facts['load_s']:.1f} s, at most {format_bytes(memory['peak_rss_bytes'])} of memory in use"
    ]
    if peaks["busy"]:
        lines.append(
            f"the machine is busy: its peaks before and after differ by {peaks['difference']:.0%}; "
            "measure again when nothing else runs"
        )
    if offload := facts["offload"]:
        lines += _about_experts(offload)
    if facts["interrupted"]:
        lines.append("interrupted: fewer repeats than asked for, and no second measurement of the peaks")
    return lines


def _about_experts(offload: dict[str, Any]) -> list[str]:
    """Where experts were found."""
    tiers, nvme, gpu = {tier["tier"]: tier for tier in offload["tiers"]}, offload["nvme"], offload["gpu"]
    ram, lines = tiers["ram"], []
    if gpu is not None:
        lines.append(
            f"experts: {tiers['gpu']['hit_rate']:.0%} found in {format_bytes(gpu['slot_bytes'])} on GPUs, "
            f"{format_bytes(gpu['uploaded_bytes'])} uploaded; of the others:"
        )
    lines.append(
        f"experts: {ram['hit_rate']:.0%} found in {format_bytes(offload['slot_bytes'])} of RAM, the others read "
        f"from NVMe at {nvme['read_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"{format_bytes(round(nvme['read_bytes_per_token']))} per token; {nvme['stall_s']:.1f} s spent waiting"
    )
    return lines
