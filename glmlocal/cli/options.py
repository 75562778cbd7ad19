"""What every command that runs a model lets its user say about how: one vocabulary, one meaning. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

QUANTS = ("keep", "int8", "int4")  # models.weights.QUANTS, which would import torch
KV_DTYPES = ("auto", "fp32", "bf16", "fp8", "int8")
ACTIVATIONS = ("auto", "int8", "fp32")


def at_least(least: int) -> Any:
    """An argparse type: a whole number, not below that."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at least {least}, found {text!r}")
        return value

    return whole_number


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How the model runs, whatever the command does with it; ``engine_options`` reads them back."""
    group = parser.add_argument_group("engine")
    group.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: one per core)")
    group.add_argument(
        "--quant",
        choices=QUANTS,
        default="keep",
        help="what linear weights that are not quantized become while loading (default: keep, as stored)",
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


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``LLM`` that ``add_engine_options`` asked for."""
    return {name: getattr(args, name) for name in ("threads", "quant", "activations", "kv_dtype")}
