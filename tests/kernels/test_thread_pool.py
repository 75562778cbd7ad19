"""The pool: every task once, callers take turns, forks and resizes work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from glmlocal import kernels
from glmlocal.errors import ConfigError
from glmlocal.kernels import cpu
from quantized import random_matrix

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu

ALWAYS_PARALLEL_NS = 1e9


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_jobs_of_any_size_finish(threads: Callable[[int], None], count: int) -> None:
    threads(count)
    assert kernels.num_threads() == count
    for tasks in (0, 1, 2, count, 5 * count, 1000):
        for cost_ns in (0.0, ALWAYS_PARALLEL_NS):
            _cpu.fork_join(tasks, cost_ns)
    for _ in range(2000):  # back to back: late workers of one job meet the next
        _cpu.fork_join(3, ALWAYS_PARALLEL_NS)


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_an_impossible_number_of_threads_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} threads: wanted 1 to 1024"):
        kernels.set_num_threads(count)


def test_many_python_threads_may_call_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    weight = kernels.pack(random_matrix("Q4_0", 640, 512))
    inputs = [torch.randn(1 + i % 5, 512) for i in range(40)]
    wanted = [kernels.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: kernels.linear(x, weight), inputs * 5))
    assert all(torch.equal(y, wanted[i % 40]) for i, y in enumerate(found))


def test_the_number_of_threads_may_change_while_ops_run(threads: Callable[[int], None]) -> None:
    weight = kernels.pack(random_matrix("Q4_0", 640, 512))
    x = torch.randn(2, 512)
    wanted = kernels.linear(x, weight)
    stop = threading.Event()
    wrong: list[torch.Tensor] = []

    def run() -> None:
        while not stop.is_set():
            y = kernels.linear(x, weight)
            if not torch.equal(y, wanted):
                wrong.append(y)

    runner = threading.Thread(target=run)
    runner.start()
    for count in (1, 2, 3, 2, 1, 4) * 5:
        threads(count)
    stop.set()
    runner.join()
    assert not wrong


def test_a_forked_child_works_with_a_pool_of_its_own() -> None:
    script = textwrap.dedent("""
        import os, torch
        from glmlocal import kernels
        kernels.set_num_threads(2)
        weight = kernels.pack(torch.randn(2048, 512))
        x = torch.randn(1, 512)
        wanted = kernels.linear(x, weight)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if all(torch.equal(kernels.linear(x, weight), wanted) for _ in range(20)) else 1)
            assert torch.equal(kernels.linear(x, weight), wanted)
            assert os.waitpid(child, 0)[1] == 0
        print("fine")
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "fine", run.stderr
