"""``glmlocal plan [MODEL]``: what fits, where it goes, how fast it will be. Needs no download and no torch.

``--json`` prints one object, which ``planner/plan_json.py`` describes and reads back; without MODEL a list of

    name, quant, fits, runs, where, max_context, decode_tokens_per_s, low, high, download_bytes

where ``runs`` says whether this version of glmlocal runs the release, and the speeds are null for what does not fit.
Releases that a wish rules out, such as a context beyond their limit, are left out.

The exit code is 0 when the model fits (or, with --compare, one of its forms does) and 2 when it does not, so that a
script can ask; a list without MODEL is always 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glmlocal.cli.options import add_machine_options, add_wish_options, planning_options_given, wishes
from glmlocal.errors import ConfigError

if TYPE_CHECKING:
    from glmlocal.catalogue import Release
    from glmlocal.models.footprint import Footprint
    from glmlocal.planner.handover import Served
    from glmlocal.planner.machine import Machine
    from glmlocal.planner.plan import Plan, Wants

_DOES_NOT_FIT = 2
_HEADINGS = ("model", "where", "context", "tok/s", "download")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say what fits, where it goes, and how fast it will be",
        description="Say whether a model fits a machine, where every byte of it goes and how fast it will be, before "
        "anything is downloaded. Without MODEL: every known release. Exits with 2 when the model does not fit.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a family (GLM-4.5-Air), a release (GLM-4.5-Air-FP8), a hub id, a checkpoint directory, a .gguf file, "
        "demo, or a plan saved with --save",
    )
    add_machine_options(parser)
    add_wish_options(parser)
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    form.add_argument("--compare", action="store_true", help="every quantization of MODEL, side by side")
    form.add_argument(
        "--engine", choices=("vllm", "sglang"), help="print the command that starts this engine on such a machine"
    )
    output.add_argument("--explain", action="store_true", help="every figure with its formula")
    output.add_argument("--svg", type=Path, metavar="FILE", help="draw the plan into FILE as well")
    output.add_argument("--save", type=Path, metavar="FILE", help="write the plan into FILE, for later commands")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, CheckpointError or PlanError for what cannot be planned at all."""
    from glmlocal.planner.probe import machine

    _check(args)
    if args.model is not None and args.model.endswith(".json") and Path(args.model).is_file():
        if args.compare or args.engine or (given := planning_options_given(args)):
            what = "--compare" if args.compare else "--engine" if args.engine else given[0]
            raise ConfigError(f"a saved plan is shown as it is, without {what}; give the MODEL that it was made for")
        from glmlocal.planner.plan_json import load

        return _report(load(Path(args.model)), (), args)
    there, wants = machine(args.gpus, args.ram, args.nvme, args.link), wishes(args)
    if args.model is None:
        return _list(there, wants, args)
    if args.engine:
        print(hand_over(args.model, args.engine, there, wants))
        return 0
    if args.compare:
        return _compare(there, wants, args)
    plan, notes = _plan(args.model, args.quant, there, wants)
    is_this_machine = (args.gpus, args.ram, args.nvme) == ("auto", None, None)
    return _report(plan, (*notes, *(_offer(args.model, plan) if is_this_machine else ())), args)


def _check(args: argparse.Namespace) -> None:
    single = {"--svg": args.svg, "--save": args.save, "--engine": args.engine, "--compare": args.compare}
    given = next((option for option, value in {**single, "--explain": args.explain}.items() if value), None)
    if args.model is None and given:
        raise ConfigError(f"{given} wants a MODEL, for example glmlocal plan GLM-4.5-Air {given}")
    for option in ("--svg", "--save"):
        if single[option] and (args.compare or args.engine):
            raise ConfigError(
                f"{option} draws or keeps one plan; leave out {'--compare' if args.compare else '--engine'}"
            )


def _plan(model: str, quant: str, machine: Machine, wants: Wants) -> tuple[Plan, tuple[str, ...]]:
    from glmlocal.planner.solve import choose, plan
    from glmlocal.planner.subject import subject

    found = subject(model, quant)
    if len(found.footprints) == 1:
        return plan(found.footprints[0], machine, wants), found.notes
    return choose(found.footprints, machine, wants), found.notes


def _offer(model: str, plan: Plan) -> tuple[str, ...]:
    """How what fits is fetched, if it is not here: a family's choice by its own name."""
    from glmlocal import catalogue
    from glmlocal.hub.local import NotPulled
    from glmlocal.resolve import DEMO, resolve

    release = catalogue.find(plan.name)
    if not plan.fits or model == DEMO or (isinstance(release, catalogue.Release) and not release.runs):
        return ()
    try:
        resolve(plan.name if isinstance(catalogue.find(model), catalogue.Family) else model, progress=False)
    except NotPulled as error:
        is_packed = plan.placement is not None and any(plan.placement.nvme_experts)
        command = error.source.pull_command + (f" --pack --quant {plan.quant}" if is_packed else "")
        return (f"it is not on this disk yet: `{command}` fetches {'and packs ' if is_packed else ''}it",)
    except ConfigError:
        pass
    return ()


def _report(plan: Plan, notes: tuple[str, ...], args: argparse.Namespace) -> int:
    if args.save is not None:
        _write(args.save, _as_json(plan))
    if args.svg is not None:
        from glmlocal.cli.plan_svg import picture

        _write(args.svg, picture(plan))
    if args.json:
        print(_as_json(plan), end="")
    elif args.markdown:
        from glmlocal.cli.plan_markdown import document

        print(document(plan, notes, explain=args.explain), end="")
    else:
        from glmlocal.cli.plan_report import console, show

        show(plan, console(), notes, explain=args.explain)
    return 0 if plan.fits else _DOES_NOT_FIT


def _as_json(plan: Plan) -> str:
    from glmlocal.planner.plan_json import as_json

    return json.dumps(as_json(plan), indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    """At once or not at all. Raises ConfigError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        part.replace(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        with suppress(OSError, ValueError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot write {str(path)!r}: {reason}; give another file") from error


def hand_over(model: str, engine: Literal["vllm", "sglang"], machine: Machine, wants: Wants) -> str:
    """The command that starts the engine: of a family, the finest release that fits without offload, then the finest
    with it. Raises ConfigError where the hardware cannot run it."""
    from dataclasses import replace

    from glmlocal.planner.handover import launch_command
    from glmlocal.planner.subject import engine_releases

    served = [_served(release) for release in engine_releases(model)]
    tries = [(each, replace(wants, offload=False)) for each in served if len(served) > 1]
    *others, last = [*tries, *((each, wants) for each in served)]
    for each, wanted in others:
        with suppress(ConfigError):
            return launch_command(engine, each, machine, wanted)
    return launch_command(engine, last[0], machine, last[1])  # the smallest: what it lacks is the least


def _served(release: Release) -> Served:
    from glmlocal.models.footprints import of_release
    from glmlocal.planner.handover import Served

    footprint, config = of_release(release), release.family.config
    return Served(
        repository=release.huggingface or release.modelscope or release.name,
        family=release.family.name,
        format=release.format,
        weights_bytes=footprint.weights_bytes,
        kv_bytes_per_token=footprint.kv_bytes_per_token("bf16"),
        kv_heads=config["num_key_value_heads"] if config["model_type"] == "glm4_moe" else 1,
        num_attention_heads=config["num_attention_heads"],
        max_position_embeddings=footprint.max_position_embeddings,
        has_mtp=release.mtp != "none",
    )


def _compare(machine: Machine, wants: Wants, args: argparse.Namespace) -> int:
    from glmlocal.cli.plan_content import title
    from glmlocal.planner.subject import all_forms

    found = all_forms(args.model)
    plans, left_out = _plans(found.footprints, machine, wants)
    kept = [each for each in plans if each is not None]
    _print_table(kept, [title(each) for each in kept], machine, (*found.notes, *left_out))
    return 0 if any(each.fits for each in kept) else _DOES_NOT_FIT


def _list(machine: Machine, wants: Wants, args: argparse.Namespace) -> int:
    """Every release as it is stored, unless all are to be quantized while loading."""
    from glmlocal import catalogue
    from glmlocal.models.footprints import of_release

    quant = "keep" if args.quant == "auto" else args.quant
    releases = catalogue.releases()
    plans, left_out = _plans([of_release(release, quant) for release in releases], machine, wants)
    kept = [(plan, release.runs) for plan, release in zip(plans, releases, strict=True) if plan is not None]
    shown, runs = [plan for plan, _ in kept], [is_run for _, is_run in kept]
    names = [plan.name if is_run else f"[{plan.name}]" for plan, is_run in kept]
    if args.json:
        _print_json_list(shown, runs)
    elif args.markdown:
        from glmlocal.cli.plan_markdown import table

        print("\n".join(table(_HEADINGS, _rows(shown, names), left=2)))
    else:
        note = "releases in brackets are planned for, but this version of glmlocal does not run them"
        _print_table(shown, names, machine, (note, *left_out))
    return 0


def _plans(
    footprints: Sequence[Footprint], machine: Machine, wants: Wants
) -> tuple[list[Plan | None], tuple[str, ...]]:
    """A plan for each, None where a wish rules it out, and a note on those. Raises ConfigError where none is left."""
    from glmlocal.planner.solve import plan_all

    found = plan_all(footprints, machine, wants)
    refused = [each for each in found if isinstance(each, ConfigError)]
    plans = [None if isinstance(each, ConfigError) else each for each in found]
    if len(refused) == len(plans):
        raise refused[0]
    return plans, (f"{len(refused)} left out, for example: {refused[0]}",) if refused else ()


def _print_table(plans: list[Plan], names: list[str], machine: Machine, notes: tuple[str, ...]) -> None:
    from glmlocal.cli.plan_content import machine_name
    from glmlocal.cli.plan_table import show_many
    from glmlocal.cli.terminal import one_line

    lines = [f"on {machine_name(machine)}; tok/s of one sequence at an empty context, GPU speeds are modelled", *notes]
    show_many(_HEADINGS, _rows(plans, names), map(one_line, lines))


def _rows(plans: list[Plan], names: list[str]) -> Iterator[tuple[str, ...]]:
    from glmlocal.cli.plan_content import number, where
    from glmlocal.units import format_bytes

    for plan, name in zip(plans, names, strict=True):
        speed = plan.forecast.decode_tokens_per_s[0] if plan.forecast else None
        yield (
            name,
            where(plan) or "does not fit",
            f"{plan.max_context:,}" if plan.max_context else "",
            number(speed.value) if speed else "",
            format_bytes(plan.download_bytes),
        )


def _print_json_list(plans: list[Plan], runs: list[bool]) -> None:
    from glmlocal.cli.plan_content import where

    rows = []
    for plan, is_run in zip(plans, runs, strict=True):
        speed = plan.forecast.decode_tokens_per_s[0] if plan.forecast else None
        rows.append(
            {
                "name": plan.name,
                "quant": plan.quant,
                "fits": plan.fits,
                "runs": is_run,
                "where": where(plan) or None,
                "max_context": plan.max_context,
                "decode_tokens_per_s": speed and speed.value,
                "low": speed and speed.low,
                "high": speed and speed.high,
                "download_bytes": plan.download_bytes,
            }
        )
    json.dump(rows, sys.stdout, indent=2)
    print()
