"""Footprints: the published sizes of releases, the tensors of checkpoints, and the bytes that a loaded model holds."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_gguf
from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.demo.cache import cached_demo
from glmlocal.engine import loader
from glmlocal.engine.planning import plan_here
from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.formats.forms import FORMS, Form
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.llama_cpp_types import tensor_type
from glmlocal.kernels import cpu
from glmlocal.kernels.reference import takes_int8
from glmlocal.models import footprints
from glmlocal.models.config import ModelConfig, expected_mtp_tensors, expected_tensors, optional_mtp_tensors
from glmlocal.models.footprint import COMPONENTS, Footprint, Layer, Part
from glmlocal.models.footprint_parts import joined
from glmlocal.models.footprints import of_checkpoint, of_release
from glmlocal.models.held import held_bytes
from glmlocal.paths import demo_dir
from glmlocal.planner.plan import Wants
from planned import planned_bytes

needs_native = pytest.mark.skipif(not cpu.available, reason="sizes are those of the native kernels")


def release(name: str) -> Release:
    found = catalogue.find(name)
    assert isinstance(found, Release)
    return found


# What the releases weigh (counts: the hub's, and those of their configs; bytes: two per parameter, four per element of
# e_score_correction_bias)

PUBLISHED = {
    "GLM-4.5-BF16": (358_337_791_296, 352_797_829_024, 90 * 160),
    "GLM-4.5-Base-BF16": (358_337_791_296, 352_797_829_024, 90 * 160),
    "GLM-4.6-BF16": (356_785_898_816, 352_797_829_024, 90 * 160),
    "GLM-4.7-BF16": (358_337_791_296, 352_797_829_024, 90 * 160),
    "GLM-4.5-Air-BF16": (110_468_824_832, 106_852_251_264, 46 * 128),
    "GLM-4.5-Air-Base-BF16": (110_468_824_832, 106_852_251_264, 46 * 128),
    "GLM-5-BF16": (753_864_139_008, 743_911_218_432, 76 * 256),
    "GLM-5.1-BF16": (753_864_139_008, 743_911_218_432, 76 * 256),
    "GLM-5.2-BF16": (753_329_940_480, 743_377_019_904, 76 * 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_bytes_of_the_original_releases(name: str) -> None:
    total, without_mtp, fp32 = PUBLISHED[name]
    footprint = of_release(release(name))
    assert footprint.mtp is not None
    assert footprint.total_params == total
    assert footprint.total_params - footprint.mtp.params == without_mtp
    assert footprint.weights_bytes == 2 * total + 2 * fp32
    assert footprint.is_exact


@pytest.mark.parametrize(
    ("name", "active"),
    [("GLM-4.5-BF16", 33.63e9), ("GLM-4.5-Air-BF16", 13.42e9), ("GLM-5-BF16", 41.78e9), ("GLM-5.2-BF16", 41.25e9)],
)
def test_active_parameters(name: str, active: float) -> None:
    assert of_release(release(name)).active_params == pytest.approx(active, abs=0.005e9)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "per_token"),
    [
        ("GLM-4.5-FP8", "bf16", 376_832),
        ("GLM-4.5-FP8", "fp8", 188_416),
        ("GLM-4.5-FP8", "fp32", 753_664),
        ("GLM-4.5-FP8", "int8", 188_416 + 92 * 8 * 2 * 4),
        ("GLM-4.5-Air-FP8", "bf16", 188_416),
        ("GLM-5-FP8", "bf16", 89_856 + 19_968),
        ("GLM-5.2-FP8", "bf16", 89_856 + 5_376),
        ("GLM-5-FP8", "fp8", 78 * (656 + 132)),
        ("GLM-5.2-FP8", "fp8", 78 * 656 + 21 * 132),
    ],
)
def test_kv_bytes_per_token(name: str, kv_dtype: str, per_token: int) -> None:
    assert of_release(release(name)).kv_bytes_per_token(kv_dtype) == per_token


def test_what_attention_costs_and_sees() -> None:
    air, five, shared = (of_release(release(f"{name}-BF16")) for name in ("GLM-4.5-Air", "GLM-5", "GLM-5.2"))
    assert air.attention_flops == (2 * 96 * 128 * 2,) * 46
    assert (air.attention_window, air.index_flops, dict(air.index_kv_bytes)) == (None, (), {})
    assert air.mtp_kv_bytes["bf16"] == 4096
    assert five.attention_flops == (2 * 64 * (576 + 512),) * 78
    assert five.attention_window == 2048
    assert five.index_flops == (2 * 32 * 128,) * 78
    assert sum(shared.index_kv_bytes["bf16"]) == 5376
    assert [i for i, flops in enumerate(shared.index_flops) if flops] == [0, 1, 2, *range(6, 75, 4)]
    assert shared.mtp_kv_bytes == {"fp32": 2 * 1408, "bf16": 1408, "fp8": 788}  # its MTP layer has its own indexer


def test_a_release_adds_up_to_every_tensor_that_its_config_implies() -> None:
    config = ModelConfig.from_hf(release("GLM-4.5-Air-BF16").family.config)
    everything = expected_tensors(config) | expected_mtp_tensors(config) | optional_mtp_tensors(config)
    counts: Counter[str] = Counter()
    for name, shape in everything.items():
        counts["routed" if ".experts." in name else "rest"] += int(torch.Size(shape).numel())
    footprint = of_release(release("GLM-4.5-Air-BF16"))
    layers = [layer for layer in (*footprint.layers, footprint.mtp) if layer is not None]
    routed = sum(layer.expert.params * layer.num_experts for layer in layers if layer.expert)
    assert {"routed": routed, "rest": footprint.total_params - routed} == counts


@pytest.mark.parametrize("one", [r for r in catalogue.releases() if r.published_bytes], ids=lambda r: r.name)
def test_estimates_come_near_what_was_published(one: Release) -> None:
    """Sizes are published to two or three digits; ggml-org's file leaves something out that is not known."""
    tolerance = 0.12 if one.name.startswith("ggml-org") else 0.015
    footprint = of_release(one)
    assert footprint.weights_bytes == pytest.approx(one.published_bytes, rel=tolerance)
    assert footprint.file_bytes == one.published_bytes


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("GLM-4.5-AWQ", 53, 0.5),
        ("GLM-4.6-AWQ", 50, 0.5),
        ("GLM-4.5-Air-AWQ-FP16Mix", 24, 0.5),
        ("GLM-4.5-Air-GPTQ-Int4-Int8Mix", 20, 0.5),
        ("GLM-4.5-GPTQ-Int4-Int8Mix", 55, 0.6),  # which matrices have 8 bits is not known of this one
        ("GLM-4.6-GPTQ-Int4-Int8Mix", 69, 2.7),  # nor of this one
    ],
)
def test_quantized_releases_have_as_many_elements_as_the_hub_counts(name: str, billions: int, tolerance: float) -> None:
    """Of whatever type: an int32 word of codes or zero points is one, a scale is one. From the hub's collections."""
    one = release(name)
    storage = footprints._storage(one)
    config = storage.config
    shapes = [(0, *item) for item in footprints._top_tensors(config).items()]
    for i in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        shapes += [(i, *item) for item in footprints._release_shapes(storage, i)]
    count = 0
    for i, tensor, shape in shapes:
        form = footprints._release_form(storage, i, tensor, shape)
        elements = math.prod(shape)
        if form.group_bits:
            groups = elements // form.group_columns
            zeros = groups * form.bits // 32
            elements = elements * form.bits // 32 + groups + zeros + (shape[1] if form.column_bits else 0)
        count += elements * (config.n_routed_experts if ".experts." in tensor else 1)
    assert count / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize("one", catalogue.releases(), ids=lambda r: r.name)
def test_every_release_has_a_footprint_that_adds_up(one: Release) -> None:
    footprint = of_release(one)
    assert 0.9 * footprint.weights_bytes < footprint.nbytes < 1.25 * footprint.weights_bytes
    parts = [part for layer in footprint.layers for part in layer.parts] + list(footprint.top)
    assert {part.component for part in parts} <= set(COMPONENTS)
    assert all(part.nbytes > 0 or part.component == "embeddings" for part in parts)
    assert (footprint.mtp is None) == (one.mtp == "none")
    assert footprint.holds_mtp == (one.mtp != "none")


def test_quantizing_at_load_leaves_what_is_quantized_and_keeps_8_bits_where_4_would_hurt() -> None:
    footprint = of_release(release("GLM-4.5-Air-FP8"), "int4")
    schemes = {part.component: part.scheme for layer in footprint.layers for part in layer.parts}
    assert (schemes["attention"], schemes["dense"], schemes["router"], schemes["norms"]) == (
        "f32",
        "int4",
        "f32",
        "f32",
    )
    assert {part.scheme for part in footprint.layers[1].parts if part.component == "attention"} == {"int4", "f32"}
    expert = footprint.layers[1].expert
    assert expert is not None
    assert (expert.scheme, expert.is_integer) == ("int4", True)
    assert expert.nbytes == 17_301_504 * 9 // 16
    assert {part.scheme for part in footprint.top if part.component == "head"} == {"int8"}
    assert footprint.mtp is not None
    assert footprint.mtp.expert is not None
    assert footprint.mtp.expert.scheme == "int8"
    kept = of_release(release("GLM-4.5-Air:Q4_K_M"))
    assert of_release(release("GLM-4.5-Air:Q4_K_M"), "int8").layers == kept.layers


def test_blocks_of_a_gguf_are_numbered_with_mtp() -> None:
    """llama.cpp gives more bits to some of GLM-4.5's 93 blocks, the MTP block among the last twelve."""
    footprint = of_release(release("GLM-4.5:Q4_K_M"))
    layers = [*footprint.layers, footprint.mtp]
    more = [i for i, layer in enumerate(layers) if layer and layer.expert and "Q6_K" in layer.expert.scheme]
    assert more == [*range(3, 11), *range(13, 81, 3), *range(81, 93)]


def test_a_recipe_says_what_each_matrix_is_stored_in() -> None:
    footprint = of_release(release("GLM-5.2-Int4-Int8Mix"))
    layer, mtp = footprint.layers[6], footprint.mtp  # one with an indexer
    assert layer.expert is not None
    assert layer.expert.scheme == "compressed int4 group 128"
    attention = {part.scheme: part.params for part in layer.parts if part.component == "attention"}
    assert attention["bf16"] == 4096 * 2048 + 128 * 6144 + 32 * 6144  # the indexer
    assert set(attention) == {"bf16", "compressed int8 group 128"}
    assert mtp is not None
    assert mtp.expert is not None
    assert mtp.expert.scheme == "compressed int8 per row"
    assert {part.scheme for part in mtp.parts if part.component == "mtp"} == {"bf16"}
    assert [part.scheme for part in footprint.top] == ["bf16", "f32", "bf16"]


def test_unknown_quant_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int3'"):
        of_release(release("GLM-4.5-Air-FP8"), "int3")


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_forms_that_are_multiplied_as_integers(form: Form) -> None:
    assert form.is_integer == (form.scheme is not None and takes_int8(form.scheme))


# What a loaded model holds


def compare(path: Path, quant: Any) -> Footprint:
    checkpoint = open_checkpoint(path)
    footprint = of_checkpoint(checkpoint, quant)
    plan = plan_here(checkpoint, quant, Wants(context=64, draft=1 if footprint.holds_mtp else 0))
    engine = loader.load_engine(checkpoint, plan)
    assert planned_bytes(footprint) == held_bytes(engine.runner.model)
    for allocation in loader.allocations(plan, engine.runner.model, engine.runner.kv_cache, engine.offloads):
        # The draft layer's keys and values have no cache before there is speculation.
        assert allocation.planned_bytes == allocation.actual_bytes, allocation
    assert footprint.is_exact
    assert footprint.weights_bytes == checkpoint.tensors.nbytes
    assert footprint.file_bytes == sum(file.stat().st_size for file in checkpoint.tensors.files)
    return footprint


@needs_native
@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_plan_of_safetensors_is_what_the_loaded_model_holds(name: str, quant: str, tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS[name]).to(torch.bfloat16 if name != "glm45" else torch.float32)
    compare(tiny.save(model, tmp_path), quant)


@needs_native
@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
def test_plan_of_an_mtp_layer_is_what_the_loaded_model_holds(quant: str, tmp_path: Path) -> None:
    footprint = compare(tiny.save(tiny.build_model(use_qk_norm=True), tmp_path, mtp=True), quant)
    assert footprint.holds_mtp
    assert {part.component for part in footprint.mtp.parts} >= {"embeddings", "head", "mtp", "shared"}  # type: ignore


@needs_native
@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
@pytest.mark.parametrize("style", ["compressed-tensors", "deepseek"])
def test_plan_of_fp8_is_what_the_loaded_model_holds(style: str, quant: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(**tiny.FP8_SIZES), tmp_path / "source")
    (tmp_path / "fp8").mkdir()
    footprint = compare(tiny.quantize_fp8(source, tmp_path / "fp8", style=style), quant)
    expert = footprint.layers[1].expert
    assert expert is not None
    kept = "fp8_channel" if style == "compressed-tensors" else "fp8_block128"
    assert expert.scheme == (kept if quant == "keep" else quant)


@needs_native
@pytest.mark.parametrize("quant", ["keep", "int4"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_plan_of_gguf_is_what_the_loaded_model_holds(dtype: str, quant: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(), tmp_path / "source", mtp=True)
    tiny_gguf.convert(source, tmp_path / "model.gguf", dtype)
    compare(tmp_path / "model.gguf", quant)


@needs_native
@pytest.mark.parametrize(
    "file_type", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0"]
)
def test_plan_of_a_mixed_gguf_is_what_the_loaded_model_holds(file_type: str, tmp_path: Path) -> None:
    """As llama.cpp would mix it, widths of 96 and 288 falling back to types of 32 as Air's 1408 does."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "moe_intermediate_size": 96, "num_hidden_layers": 9}
    source = tiny.save(tiny.build_model(**sizes), tmp_path / "source")
    roles = {"lm_head": "output", "v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}

    def type_of(name: str, columns: int) -> str:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        return tensor_type(file_type, roles.get(name.split(".")[-2], ""), columns, layer, 9)

    tiny_gguf.convert(source, tmp_path / "model.gguf", type_of=type_of)
    footprint = compare(tmp_path / "model.gguf", "keep")
    family = Family("Tiny", open_checkpoint(tmp_path / "model.gguf").config)
    like = replace(release("GLM-4.5-Air:Q4_K_M"), family=family, quant=file_type, mtp="none")
    assert of_release(like).layers == footprint.layers
    assert of_release(like).top == footprint.top
    schemes = [layer.expert.scheme for layer in footprint.layers if layer.expert]
    if file_type == "Q4_K_M":
        assert set(schemes) == {"Q4_K + Q5_0", "Q4_K + Q8_0"}
        attention = [part.scheme for part in footprint.layers[0].parts if part.component == "attention"]
        assert sorted(attention) == ["Q4_K", "Q5_0", "Q6_K", "f32"]


@needs_native
@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
def test_plan_of_the_demo_is_what_the_loaded_model_holds(quant: str) -> None:
    path = cached_demo(demo_dir())
    if path is None:
        pytest.skip("the demo model is not in the cache; `glmlocal show demo` fetches it")
    compare(path, quant)


@needs_native
def test_plan_of_a_tied_quantized_table_is_what_the_loaded_model_holds(tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(tie_word_embeddings=True), tmp_path / "source")
    tiny_gguf.convert(source, tmp_path / "model.gguf", "Q8_0")
    footprint = compare(tmp_path / "model.gguf", "keep")
    assert [part.component for part in footprint.top] == ["head", "norms"]
    assert footprint.total_params == sum(
        ref.num_elements for ref in open_checkpoint(tmp_path / "model.gguf").tensors.values()
    )


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@needs_native
def test_an_incomplete_fp8_mtp_layer_counts_its_scales_as_bytes_alone(tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(**tiny.FP8_SIZES), tmp_path / "source", mtp=True)
    (tmp_path / "fp8").mkdir()
    directory = tiny.quantize_fp8(source, tmp_path / "fp8", style="deepseek")
    whole = of_checkpoint(open_checkpoint(directory))
    rewrite(directory, lambda tensors: tensors.pop("model.layers.3.enorm.weight"))
    footprint = compare(directory, "keep")
    assert footprint.total_params == whole.total_params - 160
    assert footprint.mtp is not None
    assert whole.mtp is not None
    assert footprint.mtp.checkpoint_bytes == whole.mtp.checkpoint_bytes - 160 * 4


@needs_native
def test_an_incomplete_mtp_layer_is_in_the_file_and_not_held(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path, mtp=True)
    rewrite(directory, lambda tensors: tensors.pop("model.layers.3.enorm.weight"))
    footprint = compare(directory, "keep")
    assert footprint.mtp is not None
    assert not footprint.holds_mtp
    left = [ref for name, ref in open_checkpoint(directory).tensors.items() if name.startswith("model.layers.3.")]
    assert footprint.mtp.checkpoint_bytes == sum(ref.nbytes for ref in left)
    assert footprint.mtp.params == sum(ref.num_elements for ref in left)
    assert {part.scheme for part in footprint.mtp.parts} == {"F32"}
    assert set(footprint.mtp_kv_bytes.values()) == {0}


def test_a_declared_mtp_layer_that_is_not_there_is_none(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path, mtp=True)
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])
    footprint = of_checkpoint(open_checkpoint(directory))
    assert footprint.mtp is None
    assert set(footprint.mtp_kv_bytes.values()) == {0}


def test_experts_that_differ_are_counted_as_the_largest(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model().bfloat16(), tmp_path)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name].float()}))
    footprint = of_checkpoint(open_checkpoint(directory))
    first, second = footprint.layers[1].expert, footprint.layers[2].expert
    assert first is not None
    assert second is not None
    assert first.nbytes == second.nbytes + 2 * 32 * 64
    assert not footprint.is_exact


@needs_native
def test_an_expert_is_of_integers_only_if_all_its_matrices_are(tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(), tmp_path / "source")
    types = {"down_proj": "BF16"}
    tiny_gguf.convert(source, tmp_path / "m.gguf", "Q8_0", type_of=lambda name, columns: types.get(name.split(".")[-2]))
    expert = compare(tmp_path / "m.gguf", "keep").layers[1].expert
    assert expert is not None
    assert (expert.scheme, expert.is_integer) == ("Q8_0 + bf16", False)


def test_a_checkpoint_that_cannot_be_loaded_has_no_footprint(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path)
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate\.weight"):
        of_checkpoint(open_checkpoint(directory))


def test_planning_needs_no_torch() -> None:
    code = "import glmlocal.models.footprints as f, glmlocal.catalogue as c, sys; f.of_release(c.releases()[0])"
    assert (
        subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )


def test_two_mtp_layers_are_one_with_the_experts_of_both() -> None:
    parts = (Part("attention", "bf16", 3, 6, 6), Part("norms", "f32", 1, 4, 4))
    layer = Layer(parts, Part("routed", "bf16", 5, 10, 10), 4)
    both = joined([layer, layer])
    assert both is not None
    assert (both.num_experts, both.nbytes, both.params) == (8, 2 * layer.nbytes, 2 * layer.params)
    assert [part.nbytes for part in both.parts] == [12, 8]
    assert (joined([]), joined([layer])) == (None, layer)


def test_what_is_downloaded_is_the_weights_and_the_text_files_beside_them() -> None:
    release = catalogue.find("GLM-4.5-Air-BF16")
    assert isinstance(release, Release)
    footprint = of_release(release)
    assert footprint.file_bytes == footprint.weights_bytes + 20_000_000
