"""Matrix products on packed weights: few rows over read bandwidth, many rows over the arithmetic peak of the same run.

    python benchmarks/kernels/linear.py [--kinds Q4_0,Q8_0,bf16] [--rows 1,2,4,8,512] [--shape 1408x4096] [--experts]
                                        [--activations int8|fp32]

The peak is that of int8 dot products where activations are int8, of fp32 fma where they are not.

First every kind is checked against the reference; a mistake ends the run. Then kinds and ceilings are measured in
turns and medians compared; weights are rotated so that few rows read memory, not the last-level cache. ``--experts``
adds the routed experts of GLM-4.5-Air's shape: 8 of 32 per token. A ratio above 1 means that a ceiling is wrong and is
an error. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import get_args

import numpy as np
import torch

from glmlocal import kernels
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import QuantScheme
from glmlocal.kernels import reference
from glmlocal.kernels.cpu import _cpu

BEYOND_CACHE_BYTES = 256 << 20
FEW_ROWS = 8  # up to here a product is judged by the bytes it reads
EXPERTS, TOP_K = 32, 8

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("Q4_0", 4, 32, 32, zero_point=8),
        QuantScheme("Q5_0", 5, 32, 32, zero_point=16),
        QuantScheme("Q8_0", 8, 32, 32, zero_point=128),
        QuantScheme("Q2_K", 2, 16, 256, "two_level", "two_level_min"),
        QuantScheme("Q3_K", 3, 16, 256, "two_level", zero_point=4),
        QuantScheme("Q4_K", 4, 32, 256, "two_level", "two_level_min"),
        QuantScheme("Q6_K", 6, 16, 256, "two_level", zero_point=32),
    )
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def random_matrix(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor | QuantizedMatrix:
    rng = np.random.default_rng(seed)
    if kind in DTYPES:
        return torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(DTYPES[kind])
    scheme = SCHEMES[kind]
    groups, supers = columns // scheme.group_size, columns // scheme.super_size
    scales = [rng.standard_normal((rows, supers)).astype(np.float16).astype(np.float32) for _ in range(2)]
    has_min = scheme.offset_codec == "two_level_min"
    return QuantizedMatrix(
        scheme,
        rng.integers(0, 1 << scheme.bits, (rows, columns), dtype=np.uint8),
        scales[0],
        rng.integers(-32, 32, (rows, groups), dtype=np.int8) if scheme.scale_codec == "two_level" else None,
        scales[1] if has_min else None,
        rng.integers(0, 16, (rows, groups), dtype=np.uint8) if has_min else None,
    )


def check(kind: str, rows: list[int], columns: int, activations: reference.Activations) -> None:
    """Exit with an error unless the native product is the reference's within fp32 rounding."""
    matrix = random_matrix(kind, 192, columns, 0)
    plain, packed = reference.pack(matrix), kernels.pack(matrix, activations)
    for num_rows in rows:
        x = torch.randn(num_rows, columns)
        seen = reference.int8_rounded(x) if packed.int8_activations else x
        error = (kernels.linear(x, packed).double() - seen.double() @ plain.values.double().T).abs()
        bound = 2.0**-24 * 8 * columns**0.5 * (x.double().abs() @ plain.values.double().abs().T)
        if not bool((error <= bound).all()):
            sys.exit(f"{kind}, {num_rows} rows: off by {float((error / bound).max()):.1f} × the tolerance")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: list[Callable[[], object]], few_rows: bool, int8: bool, repeats: int) -> tuple[list[float], float]:
    """Seconds of the calls, one after another, and the median of the ceiling measured between them."""
    peak = _cpu.int8_peak if int8 else _cpu.fma_peak
    ceiling = (lambda: _cpu.read_bandwidth(BEYOND_CACHE_BYTES)) if few_rows else peak
    times, ceilings = [], []
    for _ in range(repeats):
        ceilings.append(ceiling())
        times += [seconds(call) for call in calls]
    return times[len(calls) // 2 :], median(ceilings)


def judge(
    name: str, rows: int, few_rows: bool, num_bytes: int, flops: float, times: list[float], ceiling: float
) -> dict[str, object]:
    took = median(times)
    rate = (num_bytes if few_rows else flops) / took / 1e9
    unit, of = ("GB/s", "bandwidth") if few_rows else ("GFLOP/s", "peak")
    low, high = np.quantile(times, [0.25, 0.75]) * 1e6
    print(
        f"{name:8s} {rows:5d} rows  {took * 1e6:9.1f} µs ({low:.1f} to {high:.1f})  "
        f"{rate:7.1f} of {ceiling:6.1f} {unit:7s} = {rate / ceiling:.2f} of {of}"
    )
    if rate > ceiling:
        sys.exit("above the ceiling: the ceiling was measured wrong, most likely beside other work; run again")
    return {"kind": name, "rows": rows, "us": took * 1e6, f"fraction_of_{of}": rate / ceiling}


def bench_linear(
    kind: str, shape: tuple[int, int], rows: list[int], repeats: int, activations: reference.Activations
) -> list[dict[str, object]]:
    start = time.perf_counter()
    weights = [kernels.pack(matrix := random_matrix(kind, *shape, 0), activations)]
    pack_ms = (time.perf_counter() - start) * 1e3
    weights += [kernels.pack(matrix, activations) for _ in range(BEYOND_CACHE_BYTES // weights[0].nbytes)]
    print(f"{kind}: {weights[0].nbytes * 8 / np.prod(shape):.2f} bits per weight, made and packed in {pack_ms:.0f} ms")
    results = []
    for num_rows in rows:
        few_rows = num_rows <= FEW_ROWS
        x = torch.randn(num_rows, shape[1])
        calls = [partial(kernels.linear, x, weight) for weight in weights[: len(weights) if few_rows else 2]]
        flops = 2.0 * num_rows * shape[0] * shape[1]
        times, ceiling = in_turns(calls, few_rows, weights[0].int8_activations, repeats)
        results.append(judge(kind, num_rows, few_rows, weights[0].nbytes, flops, times, ceiling))
    return results


def bench_experts(
    kind: str, hidden: int, intermediate: int, rows: list[int], repeats: int, activations: reference.Activations
) -> list[dict[str, object]]:
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    groups = [[random_matrix(kind, *shape, i)] * EXPERTS for i, shape in enumerate(shapes)]
    experts = kernels.pack_experts(*groups, activations)
    results = []
    for num_tokens in rows:
        few_rows = num_tokens == 1
        x = torch.randn(num_tokens, hidden)
        calls = []
        for turn in range(EXPERTS // TOP_K if few_rows else 2):
            if few_rows:  # the next experts each time, so that they come from memory
                ids = (torch.arange(TOP_K, dtype=torch.int32) + turn * TOP_K)[None]
            else:
                ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)]).int()
            chances = torch.rand(num_tokens, TOP_K)
            calls.append(partial(kernels.experts_ffn, x, ids, chances, experts))
        num_bytes = experts.nbytes * TOP_K // EXPERTS
        flops = 2.0 * num_tokens * TOP_K * 3 * hidden * intermediate
        times, ceiling = in_turns(calls, few_rows, experts.gate[0].int8_activations, repeats)
        results.append(judge(f"experts {kind}", num_tokens, few_rows, num_bytes, flops, times, ceiling))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join([*SCHEMES, *DTYPES]))
    parser.add_argument("--rows", default="1,2,4,8,64,512")
    parser.add_argument("--shape", default="1408x4096", help="out_features x in_features")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--activations", choices=get_args(reference.Activations), default="int8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    kinds, rows = options.kinds.split(","), [int(n) for n in options.rows.split(",")]
    shape = tuple(int(n) for n in options.shape.split("x"))
    kernels.set_num_threads(options.threads)

    for kind in kinds:
        check(kind, rows, shape[1], options.activations)
    print(f"{kernels.describe()}; [{shape[0]}, {shape[1]}], all kinds right")
    results = []
    for kind in kinds:
        results += bench_linear(kind, shape, rows, options.repeats, options.activations)
        if options.experts:
            results += bench_experts(kind, shape[1], shape[0], rows, options.repeats, options.activations)
    print(json.dumps({"shape": shape, "threads": kernels.num_threads(), "isa": _cpu.isa(), "results": results}))


if __name__ == "__main__":
    main()
