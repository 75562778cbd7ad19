"""``glmlocal verify MODEL``: hash a pulled model again, name what is damaged, and fetch just that.

``--json`` prints one object: {name, files, bytes, damaged: [path], missing: [path], repaired (true, false)}. A pack is
checked as ``glmlocal pack --verify`` does, and not repaired.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from glmlocal.cli.pull import add_hub_options, add_transfer_options, fetch, find_source, transfer_options
from glmlocal.cli.terminal import one_line
from glmlocal.units import format_bytes


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check a pulled model's bytes, and repair them",
        description="Hash every file of a pulled model again, name what is damaged, and fetch just that.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name of `glmlocal ls`")
    add_hub_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_transfer_options(parser)


def run(args: argparse.Namespace) -> int:
    from glmlocal.hub import local, verify
    from glmlocal.progress import byte_bar

    if args.model == "demo":
        from glmlocal.demo.cache import ensure_demo

        ensure_demo(check_hash=True)
        print("the demo model is whole")
        return 0
    from glmlocal.packing import here

    pack = here.find(args.model)
    if pack is not None:
        from glmlocal.cli.pack import verify as verify_pack

        return verify_pack(pack.path, None, as_json=args.json)
    source, _ = find_source(args, local.the_one_here)
    kept = verify.kept_files(source)
    with byte_bar("hashing", kept.size_bytes, show=not args.json) as on_bytes:
        damaged = verify.damaged(kept, on_bytes)
    for file in () if args.json else damaged:
        print(f"damaged: {one_line(file.path)}", file=sys.stderr)
    for path in () if args.json else kept.missing:
        print(f"missing: {one_line(path)}", file=sys.stderr)
    if damaged or kept.missing:
        verify.discard(kept, damaged)
        at_commit = replace(source, revision=kept.revision)
        fetch(at_commit, transfer_options(args), ask=False)
    facts = {"name": str(source), "files": len(kept.files), "bytes": kept.size_bytes}
    names = {"damaged": [file.path for file in damaged], "missing": list(kept.missing)}
    if args.json:
        print(json.dumps(facts | names | {"repaired": bool(damaged or kept.missing)}))
    else:
        repaired = "; what was damaged or missing has been fetched again" if damaged or kept.missing else ""
        print(f"{source}: {len(kept.files)} files, {format_bytes(kept.size_bytes)}, all right{repaired}")
    return 0
