"""A packed model with everything in memory gives the logits of the checkpoint it was made of, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
import tiny_gguf
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.models.weights import Quant
from loading import load_engine
from packs import pack

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels, whose layout a pack has")

TOKENS = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def logits(path: Path, quant: str) -> torch.Tensor:
    return load_engine(open_checkpoint(path), quant=quant, context=64, activations="int8").logits(TOKENS)


def check(source: Path, directory: Path, quant: Quant = "keep") -> None:
    want, got = logits(source, quant), logits(pack(source, directory / f"packed-{quant}", quant), quant)
    assert torch.equal(got, want)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
@pytest.mark.parametrize("name", ["glm45", "mha_odd_sizes"])
def test_bf16(name: str, quant: Quant, tmp_path: Path) -> None:
    check(tiny.save(tiny.build_model(**tiny.CONFIGS[name]).bfloat16(), tmp_path / "source"), tmp_path, quant)


@pytest.mark.parametrize("style", ["compressed-tensors", "deepseek"])
def test_fp8(style: str, tmp_path: Path) -> None:
    (tmp_path / "fp8").mkdir()
    source = tiny.save(tiny.build_model(**tiny.FP8_SIZES), tmp_path / "source")
    tiny.quantize_fp8(source, tmp_path / "fp8", style=style)
    check(tmp_path / "fp8", tmp_path)
    check(tmp_path / "fp8", tmp_path, "int4")


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(), tmp_path / "source")
    tiny_gguf.convert(source, tmp_path / "model.gguf", kind)
    check(tmp_path / "model.gguf", tmp_path)
