"""``glmlocal pack MODEL``: routed experts in one file, quantized and laid out for the kernels; ``--verify`` checks one.

``--json`` prints one object per line:

    {"event": "plan", model, quant, out, source_bytes, pack_bytes, dense_bytes, layers, experts,
     left_out (why MTP layers are, or null)}
    {"event": "progress", done_bytes, total_bytes, bytes_per_s, eta_s (or null)}      bytes of the source
    {"event": "done", path, bytes, seconds}
    {"event": "verified", path, bytes, seconds, damaged: [{file, layer, expert, tensor}]}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmlocal.cli.options import add_pack_options
from glmlocal.cli.terminal import one_line
from glmlocal.errors import ConfigError
from glmlocal.units import format_bytes

if TYPE_CHECKING:
    from glmlocal.formats.index import Checkpoint
    from glmlocal.models.weights import Quant
    from glmlocal.packing.job import PackJob

_DAMAGED = 2
_EVENT_EVERY_S = 0.5


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "pack",
        help="write a model's experts into one file, ready for the kernels",
        description="Write a model's routed experts into one file, quantized and laid out for the kernels, so that an "
        "expert is one read from the disk. A pack that was interrupted goes on where it stopped.",
    )
    parser.add_argument("model", metavar="MODEL", help="what to pack; with --verify, a packed model")
    parser.add_argument("--verify", action="store_true", help="compare every record with its checksum instead")
    add_pack_options(parser)
    parser.add_argument("--json", action="store_true", help="print progress as JSON, one object per line")


def run(args: argparse.Namespace) -> int:
    from glmlocal.resolve import resolve

    path = resolve(args.model, progress=not args.json)
    if args.verify:
        if args.out is not None:
            raise ConfigError("--verify writes nothing; leave out --out")
        return verify(path, args.threads, as_json=args.json)
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.packing.job import plan_job
    from glmlocal.packing.local import check_target, pack_model

    checkpoint = open_checkpoint(path)
    with checkpoint.tensors:
        quant = chosen_quant(checkpoint, args.quant)
        out = args.out or default_out(args.model, quant)
        check_target(out)
        job = plan_job(checkpoint, quant, model=Path(args.model).name, source=str(args.model))
        tell_plan(job, out, as_json=args.json)
        started = time.monotonic()
        with shown(sum(job.source_bytes), as_json=args.json) as on_bytes:
            pack_model(checkpoint, job, quant, out, threads=num_threads(args.threads), on_bytes=on_bytes)
    tell_done(out, time.monotonic() - started, as_json=args.json)
    return 0


def verify(path: Path, threads: int | None, *, as_json: bool) -> int:
    """Say what is damaged; the exit code is 2 if anything is."""
    from glmlocal.packing.verify import verify_pack
    from glmlocal.progress import byte_bar

    total = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0
    started = time.monotonic()
    with byte_bar("checking", total, show=not as_json) as on_bytes:
        num_bytes, damaged = verify_pack(path, num_threads(threads), on_bytes)
    seconds = time.monotonic() - started
    if as_json:
        found = [asdict(each) for each in damaged]
        _emit("verified", path=str(path), bytes=num_bytes, seconds=round(seconds, 3), damaged=found)
    else:
        for each in damaged:
            print(f"damaged: {one_line(str(each))}", file=sys.stderr)
        verdict = f"{len(damaged)} damaged; pack the model again" if damaged else "all right"
        print(
            f"{one_line(path.name)}: {format_bytes(num_bytes)}, {verdict}", file=sys.stderr if damaged else sys.stdout
        )
    return _DAMAGED if damaged else 0


def chosen_quant(checkpoint: Checkpoint, wanted: str) -> Quant:
    """``auto`` is what ``plan`` would say of this machine, its disk included."""
    from glmlocal.models.weights import check_quant

    if wanted != "auto":
        return check_quant(wanted)
    from glmlocal.models.footprints import QUANTS, of_checkpoint
    from glmlocal.planner.plan import Wants
    from glmlocal.planner.probe import machine
    from glmlocal.planner.solve import choose

    there = machine("auto", None, None, None)
    return check_quant(choose([of_checkpoint(checkpoint, quant) for quant in QUANTS], there, Wants()).quant)


def default_out(model: str, quant: str) -> Path:
    from glmlocal.paths import packs_dir

    name = Path(os.path.abspath(model)).name.removesuffix(".gguf").replace(":", "-").replace("@", "-")
    return packs_dir() / f"{name}-{quant}"


def num_threads(wanted: int | None) -> int:
    return wanted or len(os.sched_getaffinity(0))


def tell_plan(job: PackJob, out: Path, *, as_json: bool) -> None:
    header = job.header
    if as_json:
        _emit(
            "plan",
            model=header.model,
            quant=header.quant,
            out=str(out),
            source_bytes=sum(job.source_bytes),
            pack_bytes=job.pack_bytes,
            dense_bytes=job.dense_bytes,
            layers=len(header.layouts),
            experts=header.num_experts,
            left_out=job.left_out,
        )
        return
    kinds = dict.fromkeys(matrix.kind for layout in header.layouts.values() for matrix in layout.matrices)
    print(
        f"{len(header.layouts)} layers of {header.num_experts} experts as {', '.join(kinds)}: "
        f"{format_bytes(sum(job.source_bytes))} become {format_bytes(job.pack_bytes + job.dense_bytes)} in {out}",
        file=sys.stderr,
        flush=True,
    )
    if job.left_out:
        print(f"without its MTP layers, which cannot be used: {one_line(job.left_out)}", file=sys.stderr)


def tell_done(out: Path, seconds: float, *, as_json: bool) -> None:
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        _emit("done", path=str(out), bytes=num_bytes, seconds=round(seconds, 3))
    else:
        print(out)


@contextmanager
def shown(total_bytes: int, *, as_json: bool) -> Iterator[Callable[[int], None]]:
    """What is told how many bytes of the source are done: a bar, or events."""
    from glmlocal.progress import byte_bar

    if not as_json:
        with byte_bar("packing", total_bytes, show=True) as on_bytes:
            yield on_bytes
        return
    started, first, told = time.monotonic(), -1, 0.0

    def on_bytes_json(done: int) -> None:
        nonlocal first, told
        first = done if first < 0 else first  # done before this attempt
        now = time.monotonic()
        if now - told < _EVENT_EVERY_S and done < total_bytes:
            return
        told = now
        rate = (done - first) / max(now - started, 1e-9)
        eta_s = round((total_bytes - done) / rate, 1) if rate else None
        _emit("progress", done_bytes=done, total_bytes=total_bytes, bytes_per_s=round(rate), eta_s=eta_s)

    yield on_bytes_json


def _emit(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)
