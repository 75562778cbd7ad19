"""Quantized releases: every weight is exactly what is stored, and logits are transformers' on those weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4MoeForCausalLM

import tiny
from glmlocal import kernels
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.stored_rows import StoredRows
from glmlocal.kernels import cpu
from glmlocal.models.footprints import of_checkpoint
from glmlocal.models.held import held_bytes
from glmlocal.models.weights import WeightReader
from loading import load_engine
from packs import pack
from planned import planned_bytes
from releases import SIZES, STYLES, Style, quantize_release

TOKENS = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(3)).tolist()
TOLERANCE = 1e-4  # of the logit range


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # All 8 experts of every layer are used, so that a change of any of them shows.
    model = tiny.build_model(**SIZES, num_experts_per_tok=8)
    return tiny.save(model, tmp_path_factory.mktemp("source") / "source")


@pytest.fixture(scope="module", params=sorted(STYLES))
def style(request: pytest.FixtureRequest) -> Style:
    return STYLES[request.param]


@pytest.fixture(scope="module")
def release(style: Style, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("release")
    return quantize_release(source, directory, style)


def test_every_weight_is_what_is_stored(release: Path, style: Style) -> None:
    tensors = open_checkpoint(release).tensors
    wide = load_file(release / "dequantized" / "model.safetensors")
    joined = [name for name, ref in tensors.items() if ref.matrix is not None]
    assert tensors.unreadable == {}
    of_activations = (".input_scale", ".input_global_scale")  # which are not read
    assert {name for name in tensors if not name.endswith(of_activations)} == set(wide)
    assert len(joined) > 40
    assert tensors.nbytes == sum(t.nbytes for t in load_file(release / "model.safetensors").values())
    for name in joined:
        ref = tensors[name]
        assert ref.shape == tuple(wide[name].shape)
        rows = StoredRows.open(tensors, ref.matrix)
        whole = rows.rows(0, ref.shape[0])
        assert whole.scheme is ref.matrix.scheme
        assert np.array_equal(whole.dequantize(), wide[name].numpy())
        part = rows.rows(5, ref.shape[0] - 3)
        assert np.array_equal(part.dequantize(), wide[name].numpy()[5:-3])


def test_kernels_hold_every_weight_exactly_and_in_no_more_than_it_takes_on_the_disk(release: Path) -> None:
    tensors = open_checkpoint(release).tensors
    reader = WeightReader(tensors, lambda num_bytes: None)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        weight = reader.weight(name)
        whole = StoredRows.open(tensors, tensors[name].matrix).rows(0, weight.shape[0])
        assert weight.kind == tensors[name].dtype
        if cpu.available:
            assert weight.scheme == tensors[name].matrix.scheme
            assert weight.format.scale_type == whole.scheme.scale_type
            if whole.scheme.offset_codec == "zero_point":  # the kernels take the product with the zero point apart
                got, want = weight.dequantize(), torch.from_numpy(whole.dequantize())
                assert (got - want).abs().max() <= 2**-15 * want.abs().max()
            else:
                assert torch.equal(weight.dequantize(), torch.from_numpy(whole.dequantize()))
            unpacked = kernels.cpu.packing.unpack(weight)
            assert np.array_equal(unpacked.dequantize(), whole.dequantize())
            assert np.array_equal(unpacked.codes, whole.codes)


def test_logits_equal_transformers_on_the_dequantized_weights(release: Path, style: Style) -> None:
    wide = Glm4MoeForCausalLM.from_pretrained(release / "dequantized", dtype=torch.float32).eval()
    with torch.no_grad():
        want = wide(torch.tensor([TOKENS])).logits[0]
    engine = load_engine(open_checkpoint(release), context=64)
    got = engine.logits(TOKENS)
    assert float((got - want).abs().max() / (want.max() - want.min())) < TOLERANCE
    if cpu.available:
        footprint = of_checkpoint(open_checkpoint(release))
        assert footprint.is_exact == (style.name != "packed mix")  # whose experts of a layer are not alike
        if footprint.is_exact:
            assert planned_bytes(footprint) == held_bytes(engine.runner.model)


@pytest.mark.skipif(not cpu.available, reason="no native kernels, whose layout a pack has")
def test_a_pack_gives_the_same_logits_bit_for_bit(release: Path, style: Style, tmp_path: Path) -> None:
    if style.name == "packed mix":
        pytest.skip("experts of a layer are not alike")

    def logits(path: Path) -> torch.Tensor:
        return load_engine(open_checkpoint(path), context=64, activations="int8").logits(TOKENS)

    packed = pack(release, tmp_path / "packed")
    assert torch.equal(logits(packed), logits(release))
