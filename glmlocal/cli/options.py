"""What every command that runs a model lets its user say about how: one vocabulary, one meaning. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

QUANTS = ("keep", "int8", "int4")  # models.weights.QUANTS, which would import torch
KV_DTYPES = ("auto", "fp32", "bf16", "fp8", "int8")
ACTIVATIONS = ("auto", "int8", "fp32")
PLAN_QUANTS = ("auto", *QUANTS)
MAX_DRAFTS = 3
_MOST_DIGITS = 100  # of a whole number: more are no mistake of typing, and Python refuses thousands


def at_least(least: int) -> Any:
    """An argparse type: a whole number, not below that."""

    def whole_number(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS
        value = int(text) if is_number else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at least {least}, found {text!r}")
        return value

    return whole_number


def tokens(text: str) -> int:
    """An argparse type: ``32768``, or ``32K``, which are as many; ``1M`` are 1,024 K."""
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    try:
        count: int = at_least(1)(text if factor == 1 else text[:-1])
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"wanted a whole number of at least 1, as 32768, 32K or 1M, found {text!r}"
        ) from None
    return count * factor


def a_size(text: str) -> int:
    """An argparse type: ``20GiB`` → bytes."""
    from glmlocal.errors import ConfigError
    from glmlocal.units import parse_size

    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def gibibytes(text: str) -> int:
    """An argparse type: vLLM's ``--cpu-offload-gb 16``, which are GiB there too → bytes."""
    from glmlocal.units import GIB

    try:
        value = float(text) if text.isascii() else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 << 20:  # also what is not a number
        raise argparse.ArgumentTypeError(f"wanted a number of GiB, 0 or more, found {text!r}")
    return int(value * GIB)


def drafts(text: str) -> int | None:
    """An argparse type: ``auto`` → None, or 0 to MAX_DRAFTS."""
    if text == "auto":
        return None
    if text in {str(count) for count in range(MAX_DRAFTS + 1)}:
        return int(text)
    raise argparse.ArgumentTypeError(f"wanted auto or a number from 0 to {MAX_DRAFTS}, found {text!r}")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The machine: ``plan`` describes one with these, other commands limit this one; ``planner.probe`` reads them.

    Commands that run take GPUs for experts alone (docs/offload.md), and only those that are named.
    """
    group = parser.add_argument_group("machine (default: this one)")
    group.add_argument(
        "--gpus",
        default="auto",
        metavar="GPUS",
        help="2xH100; 2xH100,1xRTX4090; 24GiB@1008 (memory and its GB/s); auto; none",
    )
    group.add_argument("--ram", metavar="SIZE[@GB/s]", help="128GiB@60: memory, and how fast it is read")
    group.add_argument("--nvme", metavar="SIZE[@GB/s]", help="2TB@7: free space of the disk for packs, or none")
    group.add_argument("--link", metavar="LINK", help="between host and each GPU: pcie4x16, pcie5x8, 25GB/s")
    group.add_argument("--vram", type=a_size, metavar="SIZE", help="use no more of each GPU than this: 20GiB")
    group.add_argument(
        "--cpu-offload-gb",
        type=gibibytes,
        metavar="N",
        help="GiB of each GPU's expert weights that live in the host's memory instead, as in vLLM",
    )
    group.add_argument(
        "--no-offload", action="store_true", help="everything on the GPUs (without GPUs: in memory), or not at all"
    )


def add_wish_options(parser: argparse.ArgumentParser) -> None:
    """What is wanted of the machine; ``wishes`` reads them and those of ``add_machine_options`` back."""
    group = parser.add_argument_group("wishes")
    group.add_argument("--context", type=tokens, metavar="N", help="tokens of one sequence, prompt and answer: 32K")
    group.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="sequences at a time (default: 8)")
    group.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="what the KV cache stores")
    group.add_argument(
        "--draft", type=drafts, metavar="N", help=f"MTP drafts per step, 0 to {MAX_DRAFTS}, or auto (the default)"
    )
    group.add_argument(
        "--quant",
        choices=PLAN_QUANTS,
        default="auto",
        help="what linear weights that are not quantized become; auto: the finest that keeps all experts in memory",
    )


def wishes(args: argparse.Namespace) -> Any:
    """``planner.plan.Wants`` of the options above. ``--quant`` is not among them: it chooses the footprint."""
    from glmlocal.planner.plan import Wants

    return Wants(
        context=args.context,
        batch=args.batch,
        kv_dtype=args.kv_dtype,
        draft=args.draft,
        vram_bytes=args.vram,
        cpu_offload_bytes=args.cpu_offload_gb,
        offload=not args.no_offload,
    )


def planning_options_given(args: argparse.Namespace) -> list[str]:
    """Which of the options above were said, as they are typed."""
    parser = argparse.ArgumentParser(add_help=False)
    add_machine_options(parser)
    add_wish_options(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How and with what the model runs, whatever the command does with it; ``engine_options`` reads them back."""
    group = parser.add_argument_group("engine")
    group.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: one per core)")
    group.add_argument(
        "--quant",
        choices=PLAN_QUANTS,
        default="keep",
        help="what linear weights that are not quantized become while loading (default: keep, as stored); "
        "auto: what `glmlocal plan --quant auto` chooses",
    )
    group.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="what quantized weights are multiplied with: int8 rounds each 32 activations to 8 bits, as llama.cpp "
        "does, and is several times faster; fp32 is exact; auto is fp32 for models below 1 GiB, else int8",
    )
    group.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="what the KV cache stores; auto, as in vLLM, follows the checkpoint: fp32 where its weights are fp32 or "
        "below 1 GiB, else bf16; fp8 (e4m3) and int8 take half of bf16's memory",
    )
    group.add_argument("--draft", type=drafts, metavar="N", help="MTP drafts per step: auto (the default) or 0 for now")
    group.add_argument(
        "--nvme-dir", type=Path, metavar="DIR", help="where a packed model's experts.pack is, if on another disk"
    )
    add_machine_options(parser)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``LLM`` that ``add_engine_options`` asked for.

    Raises ConfigError for words about tiers that this version, or this machine, does not run: they are not ignored.
    """
    from glmlocal.errors import ConfigError

    if args.draft:
        raise ConfigError("--draft: this version loads MTP layers but does not speculate yet; leave it out or give 0")
    if args.nvme not in (None, "none"):
        raise ConfigError(
            "--nvme: this version takes the disk that the pack is on; leave it out (`glmlocal plan` knows it)"
        )
    about_gpus = {
        "--gpus": args.gpus.strip().casefold() not in ("auto", "none"),
        "--link": args.link is not None,
        "--vram": args.vram is not None,
        "--cpu-offload-gb": args.cpu_offload_gb is not None,
    }
    word = next((option for option, given in about_gpus.items() if given), None)
    if word is not None and not _has_gpus():
        raise ConfigError(
            f"{word}: this version runs models in RAM and from NVMe only where torch finds no GPU, as here; leave it "
            "out (`glmlocal plan` knows it)"
        )
    names = ("threads", "quant", "activations", "kv_dtype", "ram", "gpus", "link", "nvme_dir")
    words = {name: getattr(args, name) for name in names}
    gpu_limits = {"vram_bytes": args.vram, "cpu_offload_bytes": args.cpu_offload_gb}
    return {**words, **gpu_limits, "offload": not args.no_offload and args.nvme != "none"}


def _has_gpus() -> bool:
    from glmlocal.offload.devices import found  # brings torch in, so only where somebody asks

    return bool(found())


def add_pack_options(parser: argparse._ActionsContainer) -> None:
    """How a pack is made, for ``pack`` and ``pull --pack``."""
    parser.add_argument(
        "--quant",
        choices=PLAN_QUANTS,
        default="auto",
        help="what experts that are not quantized become; auto (the default): what `glmlocal plan` chooses here",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: below GLMLOCAL_HOME, see `ls`)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: one per core)")


def add_plan_option(parser: argparse.ArgumentParser) -> None:
    """For commands that can run a saved plan as it stands; ``planned`` reads it."""
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="run what `glmlocal plan MODEL --save FILE` wrote, as it stands"
    )


def planned(args: argparse.Namespace, **decided: Any) -> dict[str, Any]:
    """``engine_options``, or the saved plan in their place. Raises ConfigError where both are given.

    ``decided``: the defaults of the command's own options that a plan decides too.
    """
    if args.plan is None:
        return engine_options(args)
    from glmlocal.errors import ConfigError
    from glmlocal.planner.plan_json import load

    given = next((name for name, default in (_PLAN_DECIDES | decided).items() if getattr(args, name) != default), None)
    if given is not None:
        raise ConfigError(f"--{given.replace('_', '-')} is decided by --plan already; leave one of them out")
    place = {} if args.nvme_dir is None else {"nvme_dir": args.nvme_dir}  # which a plan does not know
    return {"plan": load(args.plan), **place}


_PLAN_DECIDES: dict[str, Any] = {
    "threads": None,
    "quant": "keep",
    "activations": "auto",
    "kv_dtype": "auto",
    "draft": None,
    "gpus": "auto",
    "ram": None,
    "nvme": None,
    "link": None,
    "vram": None,
    "cpu_offload_gb": None,
    "no_offload": False,
}  # option → its default
