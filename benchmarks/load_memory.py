"""Peak memory of loading a model, beside the memory that its weights take, and how long it takes.

    python benchmarks/load_memory.py                 writes synthetic models of 1.4 GB into a scratch directory
    python benchmarks/load_memory.py DIR --quant int4

Each load runs in a process of its own; what it needs before it opens the model (interpreter, torch) is taken off. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import synth

from glmlocal.units import format_bytes

CASES = (("safetensors-bf16", "keep"), ("safetensors-bf16", "int8"), ("safetensors-bf16", "int4"))
CASES += (("safetensors-fp8", "keep"), ("safetensors-fp8", "int4"))
NUM_EXPERTS = 24  # of GLM-4.5-Air's 128


def load(path: Path, quant: str) -> dict[str, Any]:
    """Load the model in this process. Bytes and seconds."""
    import torch

    import glmlocal.llm
    from glmlocal import kernels
    from glmlocal.engine.loader import load_engine
    from glmlocal.engine.planning import plan_here
    from glmlocal.formats.index import open_checkpoint
    from glmlocal.models.held import held_bytes
    from glmlocal.planner.plan import Wants

    kernels.set_num_threads(None)
    torch.zeros(1).add(1)
    before = peak_bytes()
    checkpoint = open_checkpoint(path)
    start = glmlocal.llm.time.perf_counter()
    engine = load_engine(checkpoint, plan_here(checkpoint, quant, Wants(context=64, batch=1)))
    seconds = glmlocal.llm.time.perf_counter() - start
    model = sum(held_bytes(engine.runner.model).values())
    return {"model_bytes": model, "start_bytes": before, "peak_bytes": peak_bytes(), "load_s": round(seconds, 2)}


def peak_bytes() -> int:
    """Most memory that this process ever had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path, quant: str) -> dict[str, Any]:
    """``load`` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(path), "--quant", quant]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def synthetic(directory: Path) -> Iterator[tuple[str, Path, str]]:
    """Models with a few of Air's experts, one on the disk at a time: name, directory, quant."""
    for file_format in dict.fromkeys(file_format for file_format, _ in CASES):
        spec = synth.make_spec("GLM-4.5-Air", file_format, layers=2, vocab=8192)
        spec = replace(spec, shape=replace(spec.shape, n_routed_experts=NUM_EXPERTS))
        path = synth.write(spec, directory / file_format)
        for quant in (quant for each, quant in CASES if each == file_format):
            yield file_format, path, quant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", help="default: synthetic ones")
    parser.add_argument("--quant", default="keep")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.model, args.quant)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        cases = [(args.model.name, args.model, args.quant)] if args.model else synthetic(Path(scratch))
        results = []
        for name, path, quant in cases:
            found = measure(path, quant)
            ratio = (found["peak_bytes"] - found["start_bytes"]) / found["model_bytes"]
            results.append({"model": name, "quant": quant, **found, "peak_over_model": round(ratio, 3)})
            print(
                f"{name:18} {quant:5} weights {format_bytes(found['model_bytes']):>9}, peak "
                f"{format_bytes(found['peak_bytes'] - found['start_bytes']):>9} ({ratio:.3f} ×) above the "
                f"{format_bytes(found['start_bytes'])} of the start, {found['load_s']:.1f} s"
            )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
