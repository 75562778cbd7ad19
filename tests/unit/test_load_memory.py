"""Loading takes the memory of the weights and little more: nothing is widened, copied whole or left mapped."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from glmlocal.kernels import cpu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load_memory
import synth

ALLOWANCE_BYTES = 80 << 20  # what two threads need while they work, and modules imported on the way


@pytest.mark.parametrize(("file_format", "quant"), [("safetensors-bf16", "keep"), ("safetensors-fp8", "keep")])
def test_peak_memory_is_the_weights_and_a_tenth(file_format: str, quant: str, tmp_path: Path) -> None:
    if not cpu.available:
        pytest.skip("the plain kernels hold fp32")
    spec = synth.make_spec("GLM-4.5-Air", file_format, layers=2, vocab=1024)
    shape = replace(spec.shape, hidden_size=2048, num_attention_heads=32, intermediate_size=5472, n_routed_experts=32)
    path = synth.write(replace(spec, shape=shape), tmp_path / "model")
    found = load_memory.measure(path, quant)
    assert found["model_bytes"] > 250 << 20
    assert found["peak_bytes"] - found["start_bytes"] < 1.1 * found["model_bytes"] + ALLOWANCE_BYTES
