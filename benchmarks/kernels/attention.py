"""Paged attention at a model's shape: decode over read bandwidth, prefill over the fp32 fma peak of the same run.

    python benchmarks/kernels/attention.py [--heads 96 --kv-heads 8 --head-dim 128] [--context 512,4096] [--prefill 512]

Ceilings and ops are measured in turns, medians are compared; caches are rotated so that decode reads memory, not the
last-level cache. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.kernels.cpu import _cpu

BLOCK_SIZE = 32
BEYOND_CACHE_BYTES = 512 << 20
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]


def make_cache(order: str, num_blocks: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """[blocks, block_size, kv_heads, head_dim], in memory as said or with keys and values of a head together."""
    if order == "tokens":
        shape = (num_blocks, BLOCK_SIZE, kv_heads, head_dim)
        return torch.randn(shape), torch.randn(shape)
    keys = torch.randn(num_blocks, kv_heads, head_dim, BLOCK_SIZE).permute(0, 3, 1, 2)
    return keys, torch.randn(num_blocks, kv_heads, BLOCK_SIZE, head_dim).transpose(1, 2)


def make_arguments(order: str, seq_len: int, new: int, heads: int, kv_heads: int, head_dim: int) -> Arguments:
    num_blocks = -(-seq_len // BLOCK_SIZE)
    return (
        torch.randn(new, heads, head_dim),
        *make_cache(order, num_blocks, kv_heads, head_dim),
        torch.randperm(num_blocks, dtype=torch.int32)[None],
        torch.tensor([0, new], dtype=torch.int32),
        torch.tensor([seq_len], dtype=torch.int32),
        head_dim**-0.5,
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(cases: list[Arguments], ceiling: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median seconds of one call, and the median ceiling, measured in turns."""
    times, ceilings = [], []
    for i in range(repeats + 1):
        ceilings.append(ceiling())
        case = cases[i % len(cases)]
        times.append(seconds(lambda: kernels.paged_attention(*case)))  # noqa: B023 (called at once)
    return median(times[1:]), median(ceilings[1:])


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=96)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--context", type=numbers, default=[512, 4096, 16384])
    parser.add_argument("--prefill", type=numbers, default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    shape = options.heads, options.kv_heads, options.head_dim
    print(f"{kernels.describe()}; {options.heads} heads, {options.kv_heads} kv heads of {options.head_dim}")

    results = []

    def report(case: dict[str, object], took: float, rate: float, ceiling: float, unit: str) -> None:
        results.append(case | {"us": took * 1e6, "fraction": rate / ceiling})
        name = " ".join(str(value) for value in case.values())
        print(f"{name:24} {took * 1e6:9.0f} µs {rate:7.1f} of {ceiling:.1f} {unit} = {rate / ceiling:.2f}")

    for order in ("tokens", "heads"):
        for context in options.context:
            num_bytes = 2 * 4 * context * options.kv_heads * options.head_dim
            cases = [make_arguments(order, context, 1, *shape) for _ in range(max(1, BEYOND_CACHE_BYTES // num_bytes))]
            took, bandwidth = measure(cases, lambda: _cpu.read_bandwidth(64 << 20), options.repeats)
            report(
                {"op": "decode", "context": context, "order": order}, took, num_bytes / took / 1e9, bandwidth, "GB/s"
            )
        for tokens in options.prefill:
            flops = 2 * tokens * (tokens + 1) * options.heads * options.head_dim
            cases = [make_arguments(order, tokens, tokens, *shape)]
            took, peak = measure(cases, _cpu.fma_peak, min(options.repeats, 5))
            report({"op": "prefill", "tokens": tokens, "order": order}, took, flops / took / 1e9, peak, "GFLOP/s")
    print(json.dumps({"shape": shape, "threads": kernels.num_threads(), "isa": _cpu.isa(), "results": results}))


if __name__ == "__main__":
    main()
