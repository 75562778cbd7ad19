"""A pack that is on another disk than the model it was made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import packed
import tiny
from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack import PACK_FILE
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

from glmlocal import LLM


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return packed.pack(tiny.save(tiny.build_model(5), tmp_path / "source"), tmp_path / "model", "int4")


@pytest.mark.parametrize("place", ["disk", "disk/model"])
def test_a_pack_is_found_on_another_disk(model: Path, place: str) -> None:
    text = list(range(3, 20))
    with LLM(model) as llm:
        wanted = llm.logits(text)
    there = model.parent / place
    there.mkdir(parents=True)
    (model / PACK_FILE).rename(there / PACK_FILE)
    with LLM(model, nvme_dir=model.parent / "disk") as llm:
        assert torch.equal(llm.logits(text), wanted)
        assert llm.plan.machine.nvme is not None
        assert llm.plan.machine.nvme.path == str(there)


def test_a_pack_that_is_not_the_models_is_refused(model: Path, tmp_path: Path) -> None:
    other = packed.pack(tiny.save(tiny.build_model(6), tmp_path / "other"), tmp_path / "second", "int4")
    with pytest.raises(CheckpointError, match="was made with other tensors"):
        open_checkpoint(model, other)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"no pack at .*empty.experts.pack nor at .*model.experts.pack"):
        open_checkpoint(model, empty)
    with pytest.raises(CheckpointError, match="is no packed model"):
        open_checkpoint(tmp_path / "source", other)
    shutil.rmtree(empty)
    with pytest.raises(CheckpointError, match="no pack at"):
        open_checkpoint(model, empty)
