"""``glmlocal ls``: the models on this disk that were pulled.

``--json`` prints one list of {name, hub, commit, format, quant, bytes, last_used (ISO 8601, UTC), path, complete}; a
download or pack that waits to be gone on with has ``complete`` false and neither format, commit nor path. Packs, of
format "pack", have neither hub nor commit. ``in_doubt`` is there, and true, where the machine went down before all of a
model was surely on disk: whatever opens it hashes those files first.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from glmlocal.cli.terminal import one_line
from glmlocal.units import format_bytes


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "ls", help="list the models that were pulled or packed", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    rows = list_models()
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        _print(rows)
    else:
        print("no models yet; `glmlocal pull MODEL` fetches one", file=sys.stderr)
    return 0


def list_models() -> list[dict[str, Any]]:
    """What ``--json`` prints."""
    from glmlocal.hub import local

    rows = [
        {
            "name": str(model.source),
            "hub": model.source.hub,
            "commit": model.snapshot.name,
            "format": model.selection.format,
            "quant": model.selection.quant,
            "bytes": model.selection.size_bytes,
            "last_used": datetime.fromtimestamp(model.last_used_s(), UTC).isoformat(timespec="seconds"),
            "path": str(model.path),
            "complete": True,
        }
        | ({"in_doubt": True} if model.is_in_doubt() else {})
        for model in local.models()
    ]
    rows += [
        {
            "name": cache.repo_id,
            "hub": hub,
            "commit": None,
            "format": None,
            "quant": None,
            "bytes": cache.partial_bytes(),
            "last_used": None,
            "path": None,
            "complete": False,
        }
        for hub, cache in local.unfinished()
    ]
    return [*_demo(), *_packs(), *rows]


def _packs() -> list[dict[str, Any]]:
    from glmlocal.packing import here

    return [
        {
            "name": pack.name,
            "hub": None,
            "commit": None,
            "format": "pack" if pack.header else None,
            "quant": pack.header.quant if pack.header else None,
            "bytes": pack.size_bytes,
            "last_used": datetime.fromtimestamp(pack.last_used_s(), UTC).isoformat(timespec="seconds"),
            "path": str(pack.path) if pack.header else None,
            "complete": pack.header is not None,
        }
        for pack in here.packs()
    ]


def _demo() -> list[dict[str, Any]]:
    from glmlocal.demo.cache import cached_demo
    from glmlocal.paths import demo_dir

    path = cached_demo(demo_dir())
    if path is None:
        return []
    status = path.stat()
    used = datetime.fromtimestamp(max(status.st_atime, status.st_mtime), UTC).isoformat(timespec="seconds")
    row = {"name": "demo", "hub": None, "commit": None, "format": "gguf", "quant": None, "bytes": status.st_size}
    return [row | {"last_used": used, "path": str(path), "complete": True}]


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("name", overflow="fold")
    table.add_column("format", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for row in rows:
        elsewhere = " (modelscope)" if row["hub"] == "modelscope" else ""
        what = " ".join(filter(None, (row["format"], row["quant"]))) if row["complete"] else "unfinished"
        if row.get("in_doubt"):
            what += ", unchecked"
        used = row["last_used"][:10] if row["last_used"] else ""
        table.add_row(one_line(row["name"]) + elsewhere, what, format_bytes(row["bytes"]), used)
    console.print(table)
    if any(row.get("in_doubt") for row in rows):
        print(
            "unchecked: the machine went down before all of it was surely on disk; it is hashed at its next use, or "
            "now with `glmlocal verify NAME`",
            file=sys.stderr,
        )
