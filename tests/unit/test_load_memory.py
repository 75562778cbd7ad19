"""Loading takes the memory of the weights and little more: nothing is widened, copied whole or left mapped."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from glmlocal.kernels import cpu
from glmlocal.models.config import ModelConfig, expected_tensors

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load_memory
import synth
from synthetic.safetensors_dir import hf_config

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


@pytest.mark.parametrize("kind", ["gptq", "awq", "packed", "mlx"])
def test_so_it_is_for_releases_that_store_a_matrix_as_several_tensors(kind: str, tmp_path: Path) -> None:
    if not cpu.available:
        pytest.skip("the plain kernels hold fp32")
    spec = synth.make_spec("GLM-4.5-Air", "safetensors-bf16", layers=2, vocab=1024)
    shape = replace(spec.shape, hidden_size=2048, num_attention_heads=32, intermediate_size=5472, n_routed_experts=64)
    write_random_release(tmp_path, hf_config(replace(spec, shape=shape)), kind)
    found = load_memory.measure(tmp_path, "keep")
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert found["model_bytes"] > 250 << 20
    assert found["model_bytes"] < 1.05 * on_disk
    assert found["peak_bytes"] - found["start_bytes"] < 1.1 * found["model_bytes"] + ALLOWANCE_BYTES


def write_random_release(directory: Path, config: dict[str, Any], kind: str, group: int = 32) -> None:
    """Linear weights of 4 bits with random codes, which need not mean anything."""
    rng, tensors = np.random.default_rng(0), {}

    def words(rows: int, columns: int) -> np.ndarray:
        return rng.integers(0, 1 << 32, (rows, columns), np.uint32).view(np.int32)

    def floats(*shape: int) -> np.ndarray:
        return np.full(shape, 0.01, np.float16)

    for name, shape in expected_tensors(ModelConfig.from_hf(config)).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = floats(*shape)
            continue
        (out, columns), module = shape, name.removesuffix(".weight")
        groups = columns // group
        if kind == "gptq":
            parts = {"qweight": words(columns // 8, out), "qzeros": words(groups, out // 8)}
            parts["scales"] = floats(groups, out)
        elif kind == "awq":
            parts = {"qweight": words(columns, out // 8), "qzeros": words(groups, out // 8)}
            parts["scales"] = floats(groups, out)
        elif kind == "packed":
            parts = {"weight_packed": words(out, columns // 8), "weight_scale": floats(out, groups)}
        else:
            parts = {"weight": words(out, columns // 8).view(np.uint32), "scales": floats(out, groups)}
            parts["biases"] = floats(out, groups)
        tensors |= {f"{module}.{part}": values for part, values in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    group_4 = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": group, "strategy": "group"}}
    settings = {
        "gptq": {"quant_method": "gptq", "group_size": group},
        "awq": {"quant_method": "awq", "group_size": group},
        "packed": {"quant_method": "compressed-tensors", "config_groups": {"": group_4}},
        "mlx": {"group_size": group, "bits": 4},
    }[kind]
    key = "quantization" if kind == "mlx" else "quantization_config"
    (directory / "config.json").write_text(json.dumps({**config, key: settings}))
