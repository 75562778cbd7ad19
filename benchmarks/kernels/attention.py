"""Paged attention at a model's shape: decode over read bandwidth, prefill over the fp32 fma peak of the same run.

    python benchmarks/kernels/attention.py [--heads 96 --kv-heads 8 --head-dim 128] [--context 512,4096] [--prefill 512]
                                           [--kv-dtype fp32,bf16,fp8,int8]

Ceilings (bytes read or floating-point operations, in G/s) and all dtypes are measured in turns, and the best of each is
compared: what it does when nothing else uses the machine. Caches are rotated so that decode reads memory, not the
last-level cache. Where a CPU multiplies pairs of bf16, twice the fma peak is the ceiling of prefill for caches that are
not fp32. A fraction above 1 fails the benchmark. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glmlocal import kernels
from glmlocal.kernels.cpu import _cpu

BLOCK_SIZE = 32
BEYOND_CACHE_BYTES = 512 << 20  # of all dtypes together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int

    def kv_bytes(self, tokens: int, kv_dtype: str) -> int:
        row = self.head_dim * DTYPES[kv_dtype].itemsize + (4 if kv_dtype == "int8" else 0)
        return 2 * tokens * self.kv_heads * row


def make_arguments(order: str, seq_len: int, new: int, shape: Shape, kv_dtype: str) -> tuple[Any, ...]:
    """A cache written by ``rope_store_``, in memory in the shape's order or with keys and values of a head together."""
    num_blocks, dtype = -(-seq_len // BLOCK_SIZE), DTYPES[kv_dtype]
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    if order == "tokens":
        k_cache, v_cache = (torch.empty(num_blocks, BLOCK_SIZE, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    else:
        k_cache = torch.empty(num_blocks, kv_heads, head_dim, BLOCK_SIZE, dtype=dtype).permute(0, 3, 1, 2)
        v_cache = torch.empty(num_blocks, kv_heads, BLOCK_SIZE, head_dim, dtype=dtype).transpose(1, 2)
    scales = [torch.empty(num_blocks, kv_heads, BLOCK_SIZE) if kv_dtype == "int8" else None for _ in range(2)]
    tokens = num_blocks * BLOCK_SIZE
    keys, values = (torch.randn(tokens, kv_heads, head_dim) for _ in range(2))
    q, no_rotation, positions = torch.zeros(tokens, 1, head_dim), torch.tensor([[1.0, 0.0]]), torch.zeros(tokens).long()
    arguments = (no_rotation, positions, k_cache, v_cache, torch.arange(tokens), *scales)
    kernels.rope_store_(q, keys, values, None, None, 0.0, *arguments)
    return (
        torch.randn(new, shape.heads, head_dim),
        k_cache,
        v_cache,
        torch.randperm(num_blocks, dtype=torch.int32)[None],
        torch.tensor([0, new], dtype=torch.int32),
        torch.tensor([seq_len], dtype=torch.int32),
        head_dim**-0.5,
        *scales,
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    cases: dict[str, list[tuple[Any, ...]]], ceiling: Callable[[], float], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Sorted seconds of the calls of each dtype, and the best ceiling, all measured in turns."""
    times: dict[str, list[float]] = {kv_dtype: [] for kv_dtype in cases}
    ceilings = []
    for i in range(repeats + 1):
        ceilings.append(ceiling())
        for kv_dtype, several in cases.items():
            case = several[i % len(several)]
            times[kv_dtype].append(seconds(lambda: kernels.paged_attention(*case)))  # noqa: B023 (called at once)
    return {kv_dtype: sorted(taken[1:]) for kv_dtype, taken in times.items()}, max(ceilings)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def names(known: Iterable[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; wanted some of {', '.join(known)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=96)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--context", type=numbers, default=[512, 4096, 16384])
    parser.add_argument("--prefill", type=numbers, default=[512, 2048])
    parser.add_argument("--kv-dtype", type=names(DTYPES), default=list(DTYPES))
    parser.add_argument("--order", type=names(["tokens", "heads"]), default=["heads"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    shape = Shape(options.heads, options.kv_heads, options.head_dim)
    print(f"{kernels.describe()}; {shape.heads} heads, {shape.kv_heads} kv heads of {shape.head_dim}")

    results: list[dict[str, Any]] = []

    def run(what: dict[str, Any], new: int, amount: Callable[[str], float], ceiling: Callable[[], float]) -> None:
        seq_len, order = what["tokens"], what["order"]
        cases = {}
        for kv_dtype in options.kv_dtype:
            count = (
                1
                if new > 1
                else max(1, BEYOND_CACHE_BYTES // len(options.kv_dtype) // shape.kv_bytes(seq_len, kv_dtype))
            )
            cases[kv_dtype] = [make_arguments(order, seq_len, new, shape, kv_dtype) for _ in range(count)]
        times, best_ceiling = measure(cases, ceiling, options.repeats if new == 1 else min(options.repeats, 9))
        first = next(iter(times.values()))[0]
        for kv_dtype, taken in times.items():
            best, middle = taken[0], taken[len(taken) // 2]
            top = best_ceiling * (2 if new > 1 and kv_dtype != "fp32" and _cpu.attention_operands() != "fp32" else 1)
            rate = amount(kv_dtype) / best / 1e9
            results.append(
                what | {"kv_dtype": kv_dtype, "us": best * 1e6, "median_us": middle * 1e6, "fraction": rate / top}
            )
            print(
                f"{what['op']:8}{seq_len:6} {order:7}{kv_dtype:5}{best * 1e6:9.0f} µs (median {middle * 1e6:.0f}), "
                f"{first / best:.2f} times {options.kv_dtype[0]}, {rate:.1f} of {top:.1f} G/s = {rate / top:.2f}"
            )

    for order in options.order:
        for context in options.context:
            what = {"op": "decode", "tokens": context, "order": order}
            run(what, 1, lambda dtype: shape.kv_bytes(context, dtype), lambda: _cpu.read_bandwidth(64 << 20))  # noqa: B023
        for tokens in options.prefill:
            flops = 2 * tokens * (tokens + 1) * shape.heads * shape.head_dim
            run({"op": "prefill", "tokens": tokens, "order": order}, tokens, lambda _: flops, _cpu.fma_peak)  # noqa: B023
    print(json.dumps({"shape": asdict(shape), "threads": kernels.num_threads(), "isa": _cpu.isa(), "results": results}))
    if any(result["fraction"] > 1 for result in results):
        raise SystemExit("a fraction of its ceiling is above 1: one of the two was measured wrongly")


if __name__ == "__main__":
    main()
