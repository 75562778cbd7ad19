"""What more threads give, and what a core that another program keeps busy takes: one layer of experts.

    python benchmarks/kernels/threads.py [--threads 2] [--repeats 7]

The work is the routed experts of GLM-4.5-Air's shape in Q4_0, for 512 tokens and for one. Each is measured by turns
with one thread, with all of them, and with all of them while a process spins on one of their cores; medians count.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from linear import EXPERTS, TOP_K, check, random_matrix

from glmlocal import kernels

HIDDEN, INTERMEDIATE = 4096, 1408
_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that never sleeps, on the last core that this one may use."""
    spinner = subprocess.Popen([sys.executable, "-c", _SPIN, str(max(os.sched_getaffinity(0)))])
    try:
        time.sleep(0.3)
        yield
    finally:
        spinner.kill()
        spinner.wait()


def seconds(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    check("Q4_0", [1, 8, 64], HIDDEN, "int8")

    shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    experts = kernels.pack_experts(*([random_matrix("Q4_0", *shape, i)] * EXPERTS for i, shape in enumerate(shapes)))
    generator = torch.Generator().manual_seed(0)

    def work(tokens: int) -> Callable[[], object]:
        x = torch.randn(tokens, HIDDEN, generator=generator)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)]).int()
        weights = torch.rand(tokens, TOP_K, generator=generator)
        return lambda: kernels.experts_ffn(x, ids, weights, experts)

    results = {}
    for name, tokens in (("prefill 512", 512), ("decode", 1)):
        call = work(tokens)
        times: dict[str, list[float]] = {"one": [], "all": [], "busy": []}
        for _ in range(options.repeats):
            for count, key in ((1, "one"), (options.threads, "all")):
                kernels.set_num_threads(count)
                times[key].append(seconds(call))
            with busy_core():
                times["busy"].append(seconds(call))
        one, every, busy = (median(times[key]) for key in ("one", "all", "busy"))
        results[name] = {"scaling": one / every, "slower_with_a_busy_core": busy / every}
        print(
            f"{name:12s} {options.threads} threads {one / every:.2f} × one thread's speed; "
            f"{busy / every:.2f} × slower with a core kept busy"
        )
    print(json.dumps({"benchmark": "threads", "threads": options.threads, "repeats": options.repeats, **results}))


if __name__ == "__main__":
    main()
