"""Experts by Triton: in its interpreter the results of the torch twin; compiled for GPUs without a spilled register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; `pip install triton`", allow_module_level=True)

from glmlocal.formats.expert_pack_layout import expert_layout
from glmlocal.formats.schemes import INT4, scheme_of
from glmlocal.kernels.torch_records import RecordExperts
from glmlocal.offload import torch_gpu
from interpreted import CASES, SHAPES

TESTS = Path(__file__).parents[1]


def lines_of(program: str, **environment: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, str(TESTS / program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_interpreted_they_compute_what_the_torch_twin_does() -> None:
    decoding, *found = lines_of("interpreted.py", TRITON_INTERPRET="1")
    assert decoding == {"e4m3_differences": 0}
    assert len(found) == len(CASES) * len(SHAPES) * 2
    for each in found:
        assert each["same_pairs"], each
        assert each["difference"] < 2e-6, each


@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton for Linux")
def test_compiled_ahead_for_gpus_nothing_spills(tmp_path: Path) -> None:
    found = lines_of("compiled_ahead.py", TRITON_CACHE_DIR=str(tmp_path))
    assert {each["case"][2] for each in found} == {80, 89, 90, 120}
    assert len(found) == 3 * 2 * 4
    for each in found:
        assert each["stack"] == each["local"] == 0, each
        assert each["registers"] <= 255, each


def test_a_gpu_has_kernels_for_what_they_take_and_torch_for_the_rest() -> None:
    from glmlocal.kernels.triton_experts import TritonExperts

    ours, other = (expert_layout(64, 96, (scheme,) * 3) for scheme in (INT4, scheme_of("Q4_K")))
    mixed = expert_layout(64, 96, (INT4, INT4, "bf16"))
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert isinstance(torch_gpu._experts(cuda, ours, "int8"), TritonExperts)
    for device, layout in ((cuda, other), (cuda, mixed), (cpu, ours)):
        assert isinstance(torch_gpu._experts(device, layout, "int8"), RecordExperts)
