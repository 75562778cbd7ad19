"""Matrices that compressed-tensors, mlx, AutoAWQ and AutoGPTQ packed: ours are the weights that those tools dequantize.

``fixtures/foreign/matrices.safetensors`` says in its metadata which versions wrote it, what a config would say of each
matrix, and the SHA-256 of the weights, fp32 [out, in], that the tools make of it with scales widened to fp32.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorIndex
from glmlocal.formats.joined import joined
from glmlocal.formats.safetensors import read_file
from glmlocal.formats.stored_rows import StoredRows

FILE = Path(__file__).parent / "fixtures" / "foreign" / "matrices.safetensors"
_RAW = FILE.read_bytes()
_METADATA = json.loads(_RAW[8 : 8 + struct.unpack("<Q", _RAW[:8])[0]])["__metadata__"]
CONFIGS: dict[str, dict[str, Any]] = json.loads(_METADATA["configs"])
SHA256: dict[str, str] = json.loads(_METADATA["sha256"])


def digest(file: Path, module: str, config: dict[str, Any], *, rows_at_a_time: int = 32) -> str:
    """Of the weights that we make of a matrix."""
    stored = {name: ref for name, ref in read_file(file).items() if name.startswith(f"{module}.")}
    refs, unreadable = joined(config if "quantization" in config else {"quantization_config": config}, stored)
    assert unreadable == {}
    assert list(refs) == [f"{module}.weight"]
    ref = refs[f"{module}.weight"]
    rows = StoredRows.open(TensorIndex("safetensors", file, refs, (file,)), ref.matrix)
    parts = [rows.rows(i, i + rows_at_a_time).dequantize() for i in range(0, ref.shape[0], rows_at_a_time)]
    return hashlib.sha256((np.concatenate(parts) + np.float32(0)).astype("<f4").tobytes()).hexdigest()


def test_who_wrote_them() -> None:
    assert json.loads(_METADATA["provenance"]).keys() == {"compressed-tensors", "mlx", "autoawq", "auto-gptq"}
    assert len(CONFIGS) == len(SHA256) == 26


@pytest.mark.parametrize("rows_at_a_time", [32, 8, 1])
@pytest.mark.parametrize("module", sorted(CONFIGS))
def test_weights_are_the_tools_own(module: str, rows_at_a_time: int) -> None:
    assert digest(FILE, module, CONFIGS[module], rows_at_a_time=rows_at_a_time) == SHA256[module]


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    """One bit of one number, somewhere inside."""
    raw = tensor.contiguous().view(torch.uint8).flatten().clone()
    raw[len(raw) // 2] ^= 4
    return raw.view(tensor.dtype).view(tensor.shape)


def _swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 1:
        return tensor.flip(0)
    order = [len(tensor) - 1, *range(1, len(tensor) - 1), 0][: len(tensor)]
    return torch.stack([tensor[i] for i in order])


@pytest.mark.parametrize("module", sorted(CONFIGS))
def test_every_stored_number_and_its_place_matter(module: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in load_file(FILE).items() if name.startswith(f"{module}.")}
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [_flip, _swap_rows]
    tried = 0
    for name, tensor in tensors.items():
        for change in changes:
            changed = change(tensor)
            if torch.equal(changed, tensor):  # symmetric zero points, one row
                continue
            save_file({**tensors, name: changed}, tmp_path / "changed.safetensors")
            tried += 1
            try:
                found = digest(tmp_path / "changed.safetensors", module, CONFIGS[module])
            except CheckpointError:  # zero points, orders and shapes that contradict the rest
                continue
            assert found != SHA256[module], f"{change.__name__} of {name}"
    assert tried >= 4


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("gptq.bits4asym32", {"checkpoint_format": "gptq_v2"}),
        ("gptq.bits3asym32", {"checkpoint_format": "gptq_v2"}),
        ("compressed.int8symrow", None),
    ],
)
def test_what_the_config_says_of_zero_points_matters(module: str, change: dict[str, Any] | None) -> None:
    if change is not None:
        assert digest(FILE, module, CONFIGS[module] | change) != SHA256[module]
        return
    config = json.loads(json.dumps(CONFIGS[module]))
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False
    with pytest.raises(AssertionError, match="zero points"):  # there are none
        digest(FILE, module, config)
