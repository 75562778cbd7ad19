"""``glmlocal doctor``: what this machine has, how fast it is, and what to fix.

``--json`` prints one object; docs/doctor.md says what each key means. The exit code is 0 whatever is found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glmlocal.cli.terminal import Console, one_line
from glmlocal.units import format_bytes

_SHOWN = (("Q4_0", "int8"), ("Q4_K", "int8"), ("Q8_0", "int8"), ("fp8_block128", "fp32"), ("bf16", "fp32"))
_STYLES = {"fix": "red", "warn": "yellow", "ok": "green"}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="examine this machine, and say what to fix",
        description="Examine this machine: kernels and their speed, cores, memory, bandwidth, arithmetic peaks, disk, "
        "GPUs. It takes about 30 seconds, writes a temporary file of at most 1 GiB to measure the disk with, keeps the "
        "results for later commands, and says what to fix.",
    )
    parser.add_argument(
        "--disk", type=Path, metavar="PATH", help="measure the disk of this directory (default: glmlocal's cache)"
    )
    parser.add_argument("--quick", action="store_true", help="measure more briefly, with a file of 256 MiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from glmlocal.doctor import examine

    console = Console()
    try:
        facts = examine(args.disk, quick=args.quick, on_step=console.status)
    finally:
        console.clear_status()
    if args.json:
        from glmlocal.cli.chat_render import dump_json

        print(dump_json(facts))
    else:
        _print(facts)
    return 0


def _print(facts: Mapping[str, Any]) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    # In a file or pipe a line stays a line, whatever its length.
    console = RichConsole(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)
    about = Table(show_header=False, box=None, pad_edge=False)
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    for label, text in _lines(facts):
        about.add_row(label, one_line(text))
    console.print(about)
    console.print()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in facts["findings"]:
        advice = f" → {finding['advice']}" if finding["advice"] else ""
        level = Text(finding["level"], _STYLES[finding["level"]])
        table.add_row(level, finding["subject"], one_line(finding["text"] + advice))
    console.print(table)
    to_fix = sum(finding["level"] == "fix" for finding in facts["findings"])
    console.print()
    console.print(f"{to_fix} to fix" if to_fix else "nothing to fix", style=_STYLES["fix" if to_fix else "ok"])


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kernels, cpu, memory, peaks, versions = (facts[k] for k in ("kernels", "cpu", "memory", "peaks", "versions"))
    built = f", built with {kernels['compiler']}" if kernels["compiler"] else ""
    choice = f" (of {', '.join(kernels['available'])})" if kernels["available"] else ""
    yield "kernels", f"{kernels['isa']}{choice}{built}"
    quota = "" if cpu["limit"] is None else f", at most {cpu['limit']:g} CPUs' worth of time"
    nodes = len(cpu["numa_nodes"])
    yield (
        "CPU",
        f"{cpu['name']} ({cpu['architecture']}): {cpu['allowed_cores']} of {cpu['cores']} cores, "
        f"{cpu['logical']} logical, {format_bytes(cpu['last_level_cache_bytes'])} of last-level cache, "
        f"{nodes or 1} memory node{'s' if nodes > 1 else ''}{quota}; {cpu['threads']} threads",
    )
    yield "instruction sets", ", ".join(kernels["cpu_has"]) or "none that matter"
    pages = memory["transparent_huge_pages"] or "unknown"
    limit = "" if memory["limit_bytes"] is None else f", limit {format_bytes(memory['limit_bytes'])}"
    yield (
        "memory",
        f"{format_bytes(memory['available_bytes'])} free of {format_bytes(memory['total_bytes'])}{limit}, "
        f"swap {format_bytes(memory['swap_used_bytes'])} of {format_bytes(memory['swap_total_bytes'])}; "
        f"huge pages: {pages}",
    )
    if peaks is not None:
        yield (
            "read bandwidth",
            f"{peaks['read_gb_per_s']:.1f} GB/s with {peaks['threads']} threads, "
            f"{peaks['read_gb_per_s_one_thread']:.1f} GB/s with one",
        )
        int8 = "" if peaks["int8_gop_per_s"] is None else f", int8 {peaks['int8_gop_per_s']:.0f} GOP/s"
        yield "arithmetic", f"fp32 {peaks['fp32_gflop_per_s']:.0f} GFLOP/s{int8}"
    if facts["kernel_rates"] is not None:
        yield "our kernels", _kernels_line(facts["kernel_rates"])
    yield "disk", _disk_line(facts["disk"])
    yield "GPUs", "; ".join(_gpu(gpu) for gpu in facts["gpus"]) or "none"
    torch = "cuda " + versions["torch_cuda"] if versions["torch_cuda"] else "CPU build"
    yield (
        "versions",
        f"glmlocal {versions['glmlocal']}, Python {versions['python']}, "
        f"torch {versions['torch'] or 'missing'} ({torch}), "
        f"Linux {versions['kernel']}, {versions['glibc'] or 'unknown C library'}",
    )
    if facts["stored"]["path"]:
        yield "kept in", facts["stored"]["path"]


def _kernels_line(rates: Mapping[str, Any]) -> str:
    """The most common schemes, for people; --json has all of them."""
    from glmlocal.formats.forms import FORMS  # brings numpy in

    shown = []
    for product in rates["products"]:
        rows = {int(number): rate for number, rate in product["weights_per_s"].items()}
        nbytes = FORMS[product["scheme"]].held_bytes(1 << 10, 1 << 10) / (1 << 20)
        if (product["scheme"], product["activations"]) in _SHOWN:
            many = max(rows)
            shown.append(
                f"{product['scheme']} {nbytes * rows[1] / 1e9:.1f} GB/s at one row, "
                f"{2 * many * rows[many] / 1e9:.0f} GFLOP/s at {many}"
            )
    layer_s = rates["layer_s"]["int8"]
    return f"{'; '.join(shown)}; {1e6 * layer_s:.0f} µs per layer, {1e3 * rates['token_s']:.2g} ms per token"


def _disk_line(disk: Mapping[str, Any]) -> str:
    if disk["problem"]:
        return disk["path"]  # type: ignore[no-any-return]
    rates = ", ".join(
        f"{rate:.2f} GB/s with {threads} thread{'s' if threads != '1' else ''}"
        for threads, rate in disk["gb_per_s"].items()
    )
    how = "O_DIRECT" if disk["direct"] else "through the page cache"
    return f"{disk['path']} ({disk['filesystem'] or 'unknown'}): {rates}; 8 MiB at random, {how}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']}, {format_bytes(gpu['free_bytes'])} free of {format_bytes(gpu['memory_bytes'])}"
