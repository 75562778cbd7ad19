"""``glmlocal pull MODEL --pack``: fetch and pack at once.

The events of ``--json`` are those of ``pack``, and ``waiting`` while another process is at the same repository.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from glmlocal.cli.ask import confirm, somebody_is_there
from glmlocal.cli.pack import chosen_quant, default_out, num_threads, shown, tell_done, tell_plan
from glmlocal.cli.pull import transfer_options
from glmlocal.cli.pull_progress import emit
from glmlocal.hub.names import Source

if TYPE_CHECKING:
    from glmlocal.cli.pull_choice import Choice


def pull_pack(args: argparse.Namespace, source: Source, choice: Choice | None) -> int:
    """``choice`` is the planner's where only a family was named; then a yes is needed, also without a terminal."""
    from glmlocal.hub import pull
    from glmlocal.packing.job import plan_job
    from glmlocal.packing.local import check_target
    from glmlocal.packing.streaming import Stream, pull_packed, remote_headers

    options = transfer_options(args)
    plan = pull.prepare(source, pull.connect(source.hub), options)
    with remote_headers(plan, options) as checkpoint:
        quant = chosen_quant(checkpoint, args.quant if choice is None or args.quant != "auto" else choice.quant)
        name = source.repo_id.rpartition("/")[2] + (f"-{source.quant}" if source.quant else "")
        out = args.out or default_out(name, quant)
        check_target(out)
        job = plan_job(checkpoint, quant, model=name, source=str(source))
        tell_plan(job, out, as_json=args.json)
        may_ask = not args.yes and not args.json and somebody_is_there()
        if ((choice is not None and not args.yes) or may_ask) and not confirm("Fetch and pack it?", default=True):
            print("nothing was fetched", file=sys.stderr)
            return 0

        def on_wait() -> None:
            if args.json:
                emit("waiting")
            else:
                print(f"waiting for another process that fetches {source.repo_id}", file=sys.stderr, flush=True)

        started = time.monotonic()
        total = sum(job.source_bytes) + sum(file.stat().st_size for file in checkpoint.tensors.files)
        with shown(total, as_json=args.json) as on_bytes:
            pull_packed(
                Stream(plan, checkpoint, job, quant, out),
                options,
                threads=num_threads(args.threads),
                on_bytes=on_bytes,
                on_wait=on_wait,
            )
    tell_done(out, time.monotonic() - started, as_json=args.json)
    if choice is not None and not args.json:
        print(f"run it with `glmlocal chat {out if args.out else out.name}`", file=sys.stderr)
    return 0
