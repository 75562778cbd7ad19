"""What the catalogue's forms say of a release is what is found in a checkpoint that is written in that form.

The checkpoints here are headers alone, made by rules of their own: how a release stores what is said once more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.formats.index import Checkpoint, TensorIndex, TensorRef
from glmlocal.models import dsa_config
from glmlocal.models.config import ModelConfig, expected_mtp_tensors, expected_tensors, optional_mtp_tensors
from glmlocal.models.dsa_config import DsaConfig
from glmlocal.models.footprint import Footprint
from glmlocal.models.footprints import of_checkpoint, of_release

FORMS = ("bf16", "fp8_channel", "fp8_block128", "gguf BF16", "gguf Q8_0")
BITS = {"BF16": 16, "F32": 32, "F8_E4M3": 8, "Q8_0": 8.5}
Shapes = dict[str, tuple[int, ...]]


@st.composite
def glm4_configs(draw: Any) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 5))
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": 32 * draw(st.integers(1, 6)),
        "intermediate_size": 32 * draw(st.integers(1, 6)),
        "moe_intermediate_size": 32 * draw(st.integers(1, 5)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads * draw(st.integers(1, 3)),
        "num_key_value_heads": heads,
        "head_dim": 32,
        "attention_bias": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_nextn_predict_layers": draw(st.integers(1, 2)),
    }


@st.composite
def dsa_configs(draw: Any) -> dict[str, Any]:
    # No matrix of one row: its FP8 scales could be those of a row as well as those of a block.
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return {
        "model_type": "glm_moe_dsa",
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.integers(2, 200)),
        "intermediate_size": draw(st.integers(2, 200)),
        "moe_intermediate_size": draw(st.integers(2, 200)),
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 4)),
        "q_lora_rank": draw(st.integers(2, 150)),
        "kv_lora_rank": draw(st.integers(2, 150)),
        "index_topk_freq": draw(st.integers(1, 4)),
        "index_skip_topk_offset": draw(st.integers(1, 4)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
    }


def shapes_of(config: dict[str, Any], mtp: str) -> Shapes:
    if config["model_type"] == "glm4_moe":
        parsed = ModelConfig.from_hf(config)
        shapes = expected_tensors(parsed)
        copies = optional_mtp_tensors(parsed) if mtp == "with copies" else {}
        return shapes if mtp == "none" else shapes | expected_mtp_tensors(parsed) | copies
    dsa = DsaConfig.from_hf(config)
    layers = dsa.num_hidden_layers + (0 if mtp == "none" else dsa.num_nextn_predict_layers)
    shapes = dict(dsa_config.top_tensors(dsa))
    for i in range(layers):
        shapes |= dsa_config.layer_tensors(dsa, i)
    return shapes


def dtype_of(name: str, shape: tuple[int, ...], form: str) -> str:
    if form.startswith("gguf"):
        return "F32" if len(shape) == 1 or name.endswith("mlp.gate.weight") else form.removeprefix("gguf ")
    if name.endswith("e_score_correction_bias"):
        return "F32"
    is_linear = ".self_attn." in name or "_proj." in name or (form == "fp8_channel" and "shared_head.head" in name)
    is_kept = len(shape) == 1 or name.endswith(("eh_proj.weight", "weights_proj.weight"))
    return "F8_E4M3" if form.startswith("fp8") and is_linear and not is_kept else "BF16"


def header(shapes: Shapes, form: str) -> TensorIndex:
    refs: dict[str, TensorRef] = {}

    def add(name: str, shape: tuple[int, ...], dtype: str) -> None:
        count = 1
        for size in shape:
            count *= size
        refs[name] = TensorRef(name, Path("model"), 0, int(count * BITS[dtype] / 8), shape, dtype)

    for name, shape in shapes.items():
        dtype = dtype_of(name, shape, form)
        add(name, shape, dtype)
        if dtype == "F8_E4M3" and form == "fp8_channel":
            add(f"{name}_scale", (shape[0], 1), "F32")
        elif dtype == "F8_E4M3":
            add(f"{name}_scale_inv", (-(-shape[0] // 128), -(-shape[1] // 128)), "F32")
    return TensorIndex("gguf" if form.startswith("gguf") else "safetensors", Path("model"), refs, ())


def release_of(config: dict[str, Any], form: str, mtp: Any) -> Release:
    """As the catalogue has those of this form."""
    model = next(release for release in catalogue.releases() if release.format == form.partition(" ")[0])
    quant = form.removeprefix("gguf ") if form.startswith("gguf") else None
    return replace(model, family=Family("Tiny", config), quant=quant, mtp=mtp, published_bytes=None)


def without_source(footprint: Footprint) -> Footprint:
    return replace(footprint, name="", file_bytes=0, is_exact=True)


@settings(max_examples=60, deadline=None)
@given(
    glm4_configs(),
    st.sampled_from(FORMS),
    st.sampled_from(["with copies", "without copies", "none"]),
    st.sampled_from(["keep", "int8", "int4"]),
)
def test_a_glm4_release_is_what_is_found(config: dict[str, Any], form: str, mtp: str, quant: str) -> None:
    index = header(shapes_of(config, mtp), form)
    found = of_checkpoint(Checkpoint(Path("model"), Path(), config, index, None), quant, file_bytes=0)
    expected = of_release(release_of(config, form, mtp), quant)
    assert without_source(expected) == without_source(found)
    assert found.weights_bytes == index.nbytes
    assert found.is_exact
    num_mtp = 0 if mtp == "none" else config["num_nextn_predict_layers"]
    assert found.mtp_kv_bytes == {dtype: num_mtp * layers[0] for dtype, layers in found.kv_bytes.items()}
    assert expected.file_bytes == expected.weights_bytes + 20_000_000


@settings(max_examples=60, deadline=None)
@given(
    dsa_configs(),
    st.sampled_from(["bf16", "fp8_block128"]),
    st.sampled_from(["without copies", "none"]),
    st.sampled_from(["keep", "int4"]),
)
def test_a_glm5_release_is_what_is_found(config: dict[str, Any], form: str, mtp: str, quant: str) -> None:
    index = header(shapes_of(config, mtp), form)
    found = of_checkpoint(Checkpoint(Path("model"), Path(), config, index, None), quant, file_bytes=0)
    assert without_source(of_release(release_of(config, form, mtp), quant)) == without_source(found)
    assert found.weights_bytes == index.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_here_is_in_the_catalogue(form: str) -> None:
    assert any(release.format == form.partition(" ")[0] for release in catalogue.releases())
