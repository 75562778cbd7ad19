"""``glmlocal rm MODEL``: remove a model that was pulled or packed, and what an unfinished attempt at it has left."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from typing import Any

from glmlocal.cli.ask import confirm
from glmlocal.cli.pull import add_hub_options, find_source
from glmlocal.errors import ConfigError
from glmlocal.units import format_bytes


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "rm",
        help="remove a model that was pulled or packed",
        description="Remove a model that was pulled, or a pack by its name. org/name:QUANT removes one quantization, "
        "org/name everything of the repository.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a name of `glmlocal ls`")
    add_hub_options(parser)
    parser.add_argument(
        "--replaced",
        action="store_true",
        help="remove what packs were made of instead, once every record of them is verified; MODEL: of this pack only",
    )
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    from glmlocal.packing import here

    if args.replaced:
        from glmlocal.cli.rm_replaced import remove_replaced

        return remove_replaced(args.model, yes=args.yes)
    if args.model is None:
        raise ConfigError("name what to remove (`glmlocal ls` shows it), or give --replaced")
    pack = here.find(args.model)
    if pack is not None:
        what, num_bytes, remove = f"the pack {pack.name}", pack.size_bytes, pack.remove
    else:
        what, num_bytes, remove = _demo() if args.model == "demo" else _of_hub(args)
    packed = here.made_of(args.model)
    kept = f"; its pack stays: {', '.join(packed)}" if packed else ""
    question = f"Remove {what} ({format_bytes(num_bytes)}{kept})?"
    if not args.yes and not confirm(question, default=False):
        print("nothing was removed", file=sys.stderr)
        return 0
    print(f"removed {what}: {format_bytes(remove())} freed", file=sys.stderr)
    return 0


def _of_hub(args: argparse.Namespace) -> tuple[str, int, Callable[[], int]]:
    """What is removed, how large it is, and the function that does it and returns the bytes freed."""
    from glmlocal.hub import local
    from glmlocal.hub.cache import RepoCache, blocks_bytes, remove, snapshot_files

    source, _ = find_source(args, local.the_one_here)
    cache = RepoCache(local.cache_dir(source.hub), source.repo_id)
    if not cache.directory.is_dir():
        raise ConfigError(f"{source} is not on this disk; `glmlocal ls` shows what is")
    if source.quant is None and source.revision is None:
        links = [s / f.path for s in cache.snapshots() for f in snapshot_files(s)]
        num_bytes = sum(blocks_bytes(path) for path in cache.directory.rglob("*") if not path.is_symlink())
    else:
        model = local.find(source, settle=False)
        links = [model.snapshot / file.path for file in model.selection.files]
        num_bytes = model.selection.size_bytes

    def act() -> int:
        with cache.locked(lambda: print(f"waiting for another process that uses {source.repo_id}", file=sys.stderr)):
            return remove(cache, links)

    return str(source), num_bytes, act


def _demo() -> tuple[str, int, Callable[[], int]]:
    from glmlocal.paths import demo_dir

    directory = demo_dir()
    if not directory.is_dir():
        raise ConfigError("the demo model is not on this disk")
    num_bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())

    def act() -> int:
        shutil.rmtree(directory)
        return num_bytes

    return "the demo model", num_bytes, act
