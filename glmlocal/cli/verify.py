"""``glmlocal verify MODEL``: hash a pulled model again, name what is damaged, and fetch just that.

``--json`` prints one object: {name, files, bytes, damaged: [path], missing: [path], unchecked: [path], repaired (true,
false)}; ``unchecked`` are copies in place of links, which nothing says the hash of. A pack is checked as
``glmlocal pack --verify`` does, and not repaired.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
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
    bad = {"damaged": [file.path for file in damaged], "missing": list(kept.missing), "unchecked": list(kept.unchecked)}
    if not args.json:
        _tell(bad)
    is_repaired = bool(damaged or kept.missing)
    if is_repaired:
        verify.discard(kept, damaged)
        at_commit = replace(source, revision=kept.revision)
        fetch(at_commit, transfer_options(args), ask=False)
    facts = {"name": str(source), "files": len(kept.files), "bytes": kept.size_bytes}
    if args.json:
        print(json.dumps(facts | bad | {"repaired": is_repaired}))
    else:
        repaired = "; what was damaged or missing has been fetched again" if is_repaired else ""
        result = f"{len(kept.unchecked)} of them not checked, the others right" if kept.unchecked else "all right"
        print(f"{source}: {len(kept.files)} files, {format_bytes(kept.size_bytes)}, {result}{repaired}")
    return 0


def _tell(bad: Mapping[str, Sequence[str]]) -> None:
    words = {"unchecked": "not checked, a copy whose hash nothing says"}
    for what, paths in bad.items():
        for path in paths:
            print(f"{words.get(what, what)}: {one_line(path)}", file=sys.stderr)
