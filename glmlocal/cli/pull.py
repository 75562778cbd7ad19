"""``glmlocal pull MODEL``: fetch a model from a hub, once and verified.

``--json`` prints one object per line:

    {"event": "plan", name, hub, repo_id, revision, commit, format, quant, total_bytes, to_fetch_bytes, directory,
     "files": [{path, size_bytes, digest, present}]}
    {"event": "waiting"}                                            another process is at the same repository
    {"event": "progress", done_bytes, total_bytes, bytes_per_s, eta_s (or null), "files": [{path, done_bytes,
     size_bytes}]}                                                  of files on their way
    {"event": "file", path, size_bytes}                             verified and in its place
    {"event": "done", path}                                         what to open
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmlocal.cli.ask import confirm, somebody_is_there
from glmlocal.cli.options import add_pack_options, at_least
from glmlocal.errors import ConfigError
from glmlocal.units import format_bytes, parse_size

if TYPE_CHECKING:
    from glmlocal.cli.pull_choice import Choice
    from glmlocal.hub.download import Options
    from glmlocal.hub.known import Choose
    from glmlocal.hub.listing import Hub
    from glmlocal.hub.names import HubName, Source
    from glmlocal.hub.pull import Pull

_MOST_CONNECTIONS = 64


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="fetch a model from a hub",
        description="Fetch a model from Hugging Face or ModelScope: only the files that are needed, in parallel, "
        "verified by SHA-256, and never twice. An interrupted pull goes on where it stopped.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="org/name, org/name:QUANT for GGUF, a release such as GLM-4.5-Air-FP8, a family such as GLM-4.5-Air (the "
        "release that suits this machine), or demo",
    )
    add_hub_options(parser)
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask before fetching")
    parser.add_argument("--json", action="store_true", help="print progress as JSON, one object per line")
    add_transfer_options(parser)
    pack = parser.add_argument_group("packing")
    pack.add_argument(
        "--pack",
        action="store_true",
        help="write a pack (see `glmlocal pack`) instead of the files, shard by shard: the whole checkpoint is never "
        "on the disk",
    )
    add_pack_options(pack)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hub",
        choices=("huggingface", "modelscope"),
        default="huggingface",
        help="where to look (default: huggingface)",
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit (default: the main branch)")


def add_transfer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit-rate", metavar="RATE", type=_rate, help="bytes per second at most, such as 20MB")
    parser.add_argument(
        "--connections", metavar="N", type=at_least(1), default=8, help="requests at the same time (default: 8)"
    )


def run(args: argparse.Namespace) -> int:
    if args.model == "demo":
        from glmlocal.demo.cache import ensure_demo

        print(ensure_demo(progress=not args.json))
        return 0
    if not args.model.strip():
        raise ConfigError("the model's name is empty; write org/name, a release or a family")
    if Path(args.model).exists() and not _looks_like_hub_id(args.model):
        raise ConfigError(f"{args.model!r} is on this disk already; nothing to pull")
    source, choice = find_source(args)
    if args.pack:
        from glmlocal.cli.pull_pack import pull_pack

        return pull_pack(args, source, choice)
    if (args.quant, args.out, args.threads) != ("auto", None, None):
        raise ConfigError("--quant, --out and --threads are for packing; give --pack as well")
    path = fetch(source, transfer_options(args), as_json=args.json, ask=not args.yes, must_ask=choice is not None)
    if path is None:
        print("nothing was fetched", file=sys.stderr)
        return 0
    if not args.json:
        print(path)
        if choice is not None:
            print(choice.next_step, file=sys.stderr)
    return 0


def find_source(args: argparse.Namespace, choose: Choose | None = None) -> tuple[Source, Choice | None]:
    """What the arguments name, and where only a family was named what the planner chose of it, None otherwise.

    ``choose`` chooses in its place.
    """
    from glmlocal.cli.pull_choice import choose_release
    from glmlocal.hub.known import KnownReleases
    from glmlocal.hub.names import parse_source

    chosen: Choice | None = None

    def remember(family: str, hub: HubName) -> str:
        nonlocal chosen
        chosen = choose_release(family, hub)
        return chosen.hub_id

    source = parse_source(args.model, KnownReleases(choose or remember), hub=args.hub, revision=args.revision)
    return source, chosen


def transfer_options(args: argparse.Namespace) -> Options:
    from glmlocal.hub.download import Options
    from glmlocal.hub.environment import patient_as_told
    from glmlocal.hub.http import DEFAULT_PATIENCE

    if args.connections > _MOST_CONNECTIONS:
        raise ConfigError(
            f"--connections {args.connections} is more than any hub allows; {_MOST_CONNECTIONS} is the limit"
        )
    return Options(
        connections=args.connections,
        limit_bytes_per_s=args.limit_rate,
        patience=patient_as_told(DEFAULT_PATIENCE),
    )


def fetch(
    source: Source, options: Options, *, as_json: bool = False, ask: bool = True, must_ask: bool = False
) -> Path | None:
    """Look up, ask, download, tell. Returns what to open, or None if the person said no.

    Asks at a terminal only; elsewhere what was named exactly is fetched, and what was not (``must_ask``) is refused.
    """
    from glmlocal.cli.pull_progress import emit, shown
    from glmlocal.hub import pull

    hub = pull.connect(source.hub)
    if hub.offline and (path := _here(source)) is not None:
        if as_json:
            emit("done", path=str(path))
        else:
            print(f"HF_HUB_OFFLINE is set; {source} is on this disk", file=sys.stderr)
        return path
    plan = _prepare(source, hub, options)
    if as_json:
        emit("plan", **_facts(plan))
    else:
        print(_summary(plan), file=sys.stderr, flush=True)
    pull.check_room(plan)
    may_ask = ask and not as_json and somebody_is_there()
    if plan.missing and ((ask and must_ask) or may_ask) and not confirm("Fetch it?", default=True):
        return None

    def on_wait() -> None:
        if as_json:
            emit("waiting")
        else:
            print(f"waiting for another process that fetches {source.repo_id}", file=sys.stderr, flush=True)

    try:
        with shown(as_json=as_json) as on_progress:
            path = pull.pull(plan, options, on_progress, on_wait)
    except KeyboardInterrupt:
        print(f"\nstopped; `{source.pull_command}` goes on from here", file=sys.stderr)
        raise
    if as_json:
        emit("done", path=str(path))
    return path


def _prepare(source: Source, hub: Hub, options: Options) -> Pull:
    """As ``pull.prepare``; of a repository that is not there the releases that have nearly its name are told."""
    from glmlocal import catalogue
    from glmlocal.hub import pull
    from glmlocal.hub.http import NotThere

    try:
        return pull.prepare(source, hub, options)
    except NotThere as error:
        near = [] if catalogue.find(source.repo_id) else catalogue.near_misses(source.repo_id.rpartition("/")[2])
        if not near:
            raise
        raise NotThere(f"{error}; did you mean the release {' or '.join(near[:3])}?") from None


def _here(source: Source) -> Path | None:
    from glmlocal.hub import local

    try:
        return local.find(source).path
    except local.NotPulled:
        return None


def offer_to_pull(args: argparse.Namespace) -> None:
    """For the commands that run ``args.model``: where it is a hub's and not here, offer a person at a terminal to fetch
    it; of a family the release that suits this machine. ``args.quant`` becomes what that one is to be loaded with.

    Without a terminal nothing happens: what opens the model then raises NotPulled. Raises that too for a no. What is
    wrong with a name otherwise is for what opens the model to say.
    """
    from glmlocal.resolve import DEMO, resolve

    if args.model == DEMO or not somebody_is_there():
        return
    from glmlocal.hub.download import DEFAULTS
    from glmlocal.hub.local import FamilyNotPulled, NotPulled

    try:
        resolve(args.model, progress=False)
    except NotPulled as error:
        print(f"{error.source} is not on this disk yet.", file=sys.stderr)
        if fetch(error.source, DEFAULTS, must_ask=True) is None:
            raise
    except FamilyNotPulled:
        source, choice = find_source(argparse.Namespace(model=args.model, hub="huggingface", revision=None))
        if choice is not None and choice.must_be_packed:
            raise ConfigError(
                f"{args.model} runs on this machine out of a pack only; make one with "
                f"`glmlocal pull {args.model} --pack`, and name that"
            ) from None
        if fetch(source, DEFAULTS, must_ask=True) is None:
            raise
        if (
            choice is not None
            and choice.quant != "keep"
            and args.quant == "keep"
            and getattr(args, "plan", None) is None
        ):
            args.quant = choice.quant
            print(f"it is loaded with --quant {choice.quant}; the next time: {choice.words}", file=sys.stderr)
    except ConfigError:
        return


def _summary(plan: Pull) -> str:
    from glmlocal.hub.pull import free_bytes

    files, selection = plan.selection.files, plan.selection
    here = selection.size_bytes - plan.bytes_to_fetch()
    present = f", {format_bytes(here)} of it here already" if here else ""
    quant = f" {selection.quant}" if selection.quant else ""
    count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
    return (
        f"{plan.source.repo_id}@{plan.listing.commit[:12]} ({selection.format}{quant}): {count}, "
        f"{format_bytes(selection.size_bytes)}{present}; into {plan.cache.directory}, where "
        f"{format_bytes(free_bytes(plan.cache.directory))} are free"
    )


def _facts(plan: Pull) -> dict[str, Any]:
    missing = {file.path for file in plan.missing}
    return {
        "name": str(plan.source),
        "hub": plan.hub.name,
        "repo_id": plan.source.repo_id,
        "revision": plan.listing.revision,
        "commit": plan.listing.commit,
        "format": plan.selection.format,
        "quant": plan.selection.quant,
        "total_bytes": plan.selection.size_bytes,
        "to_fetch_bytes": plan.bytes_to_fetch(),
        "directory": str(plan.cache.directory),
        "files": [
            {"path": f.path, "size_bytes": f.size_bytes, "digest": f.digest, "present": f.path not in missing}
            for f in plan.selection.files
        ],
    }


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _rate(text: str) -> int:
    try:
        rate = parse_size(text.removesuffix("/s"))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if rate < 1000:
        raise argparse.ArgumentTypeError(f"wanted at least 1KB per second, found {text!r}")
    return rate
