"""Matrices of 4-bit floats that contradict themselves are refused, each in a line that names the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fp4_releases
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorIndex
from glmlocal.formats.joined import joined
from glmlocal.formats.safetensors import read_file
from glmlocal.formats.stored_rows import StoredRows

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"a": GROUP}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
NVFP4 = fp4_releases.compressed("m", fp4_releases.nvfp4(WEIGHT, divided=True))
MXFP4 = fp4_releases.compressed("m", fp4_releases.mxfp4(WEIGHT))


def problem(directory: Path, tensors: Mapping[str, torch.Tensor], config: dict[str, Any] = COMPRESSED) -> str:
    """Why the matrix cannot be read; empty if it can."""
    file = directory / "model.safetensors"
    save_file(dict(tensors), file)
    refs, unreadable = joined({"quantization_config": config}, read_file(file))
    if unreadable:
        return unreadable["m.weight"]
    try:
        StoredRows.open(TensorIndex("safetensors", file, refs, (file,)), refs["m.weight"].matrix).rows(0, 32)
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_right_ones_are_read(tmp_path: Path) -> None:
    assert problem(tmp_path, NVFP4) == ""
    assert problem(tmp_path, MXFP4) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"m.weight_global_scale": None}, "no scale for the whole matrix"),
        ({"m.weight_global_scale": torch.zeros(1)}, "weight_global_scale is 0"),
        ({"m.weight_global_scale": torch.tensor([float("nan")])}, "weight_global_scale is nan"),
        ({"m.weight_global_scale": torch.tensor([float("inf")])}, "weight_global_scale is inf"),
        ({"m.weight_global_scale": torch.ones(2)}, "has shape [2]"),
        ({"m.weight_global_scale": torch.ones(1, dtype=torch.int32)}, "is I32"),
        ({"m.weight_scale": None}, "no tensor m.weight_scale"),
        ({"m.weight_scale": NVFP4["m.weight_scale"][:, :-1].contiguous()}, "has shape [32, 3], wanted [32, 4]"),
        ({"m.weight_scale": NVFP4["m.weight_scale"].float()}, "is F32"),
        ({"m.weight_scale": torch.full((32, 4), float("nan")).to(torch.float8_e4m3fn)}, "not finite"),
        ({"m.weight_zero_point": torch.zeros(32, 4, dtype=torch.int8)}, "zero points"),
        ({"m.weight_scale": torch.full((32, 2), 127, dtype=torch.uint8)}, "powers of two"),
    ],
)
def test_what_contradicts_itself_is_refused(
    changes: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in {**NVFP4, **changes}.items() if tensor is not None}
    assert words in problem(tmp_path, changed)


def test_a_power_of_two_that_is_no_number_is_refused(tmp_path: Path) -> None:
    scales = MXFP4["m.weight_scale"].clone()
    scales[3, 1] = 255
    assert "not finite" in problem(tmp_path, {**MXFP4, "m.weight_scale": scales})


def test_bytes_of_other_methods_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.zeros(1024, 1, dtype=torch.uint8), "m.weight.absmax": torch.zeros(32)}
    assert "bitsandbytes" in problem(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "weight_scale" in problem(tmp_path, tensors, MODELOPT)
