"""The catalogue: what it knows agrees with itself, and people's spellings find it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.errors import CheckpointError
from glmlocal.formats.forms import FORMS
from glmlocal.models.config import ModelConfig
from glmlocal.models.dsa_config import DsaConfig

FAMILIES = (
    *("GLM-4.5", "GLM-4.5-Base", "GLM-4.5-Air", "GLM-4.5-Air-Base", "GLM-4.6", "GLM-4.7"),
    *("GLM-5", "GLM-5.1", "GLM-5.2"),
)


def found_name(name: str) -> str | None:
    found = catalogue.find(name)
    return None if found is None else found.name


def test_all_families_are_there_and_their_configs_can_be_read() -> None:
    assert tuple(family.name for family in catalogue.families()) == FAMILIES
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", catalogue.as_of())
    for family in catalogue.families():
        if family.runs:
            assert ModelConfig.from_hf(family.config).eos_token_id == (151329, 151336, 151338)
        else:
            assert DsaConfig.from_hf(family.config).kv_lora_rank == 512
            with pytest.raises(CheckpointError, match="GlmMoeDsaForCausalLM"):
                ModelConfig.from_hf(family.config)


def test_every_family_has_its_original_release_and_the_instruct_ones_fp8() -> None:
    for name in FAMILIES:
        original = catalogue.find(f"zai-org/{name}")
        assert isinstance(original, Release)
        assert (original.name, original.format, original.family.name) == (f"{name}-BF16", "bf16", name)
        if not name.endswith("-Base"):
            assert original.modelscope == f"ZhipuAI/{name}"
            fp8 = catalogue.find(f"{name}-FP8")
            assert isinstance(fp8, Release)
            assert fp8.format == ("fp8_block128" if name.startswith("GLM-5") else "fp8_channel")
            assert fp8.hub_ids == (f"zai-org/{name}-FP8", f"ZhipuAI/{name}-FP8")


def test_releases_are_told_apart_and_found_by_every_name_that_is_theirs_alone() -> None:
    releases = catalogue.releases()
    assert len({release.name.lower() for release in releases}) == len(releases)
    ids = [hub_id.lower() for release in releases for hub_id in release.hub_ids]
    assert len(set(ids)) == len(ids)
    for release in releases:
        assert catalogue.find(release.name) is release
        assert release.hub_ids
        for hub_id in release.hub_ids:
            assert catalogue.find(hub_id.upper()) is release
            assert release in catalogue.in_repository(hub_id.partition(":")[0])


@pytest.mark.parametrize("release", catalogue.releases(), ids=lambda release: release.name)
def test_what_a_release_says_makes_sense(release: Release) -> None:
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w-]+)?", hub_id) for hub_id in release.hub_ids)
    assert (release.published_bytes is None) == (release.published_source is None)
    assert set(release.recipe.values()) <= set(FORMS)
    assert (release.format == "gguf") == (release.quant is not None) == (not release.recipe)
    assert release.format != "mlx" or release.mtp == "none"
    assert release.runs != release.family.name.startswith("GLM-5")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("GLM-4.5-Air", "GLM-4.5-Air"),
        (" glm-4.5-air ", "GLM-4.5-Air"),
        ("glm-4.5-air-fp8", "GLM-4.5-Air-FP8"),
        ("ZHIPUAI/glm-4.5-air-fp8", "GLM-4.5-Air-FP8"),
        ("zai-org/GLM-4.5-Air", "GLM-4.5-Air-BF16"),
        ("unsloth/GLM-4.5-Air-GGUF:Q4_K_M", "GLM-4.5-Air-GGUF:Q4_K_M"),
        ("GLM-4.5-Air:q4_k_m", "GLM-4.5-Air-GGUF:Q4_K_M"),
        ("GLM-4.5-Air-Q4_K_M", "GLM-4.5-Air-GGUF:Q4_K_M"),
        ("bartowski/zai-org_GLM-4.7-GGUF:Q3_K_L", "bartowski/zai-org_GLM-4.7-GGUF:Q3_K_L"),
        ("QuantTrio/GLM-4.5-Air-AWQ-FP16Mix", "GLM-4.5-Air-AWQ-FP16Mix"),
        ("tclf90/GLM-4.5-GPTQ-Int4-Int8Mix", "GLM-4.5-GPTQ-Int4-Int8Mix"),
        ("GLM-4.6-4bit", "GLM-4.6-MLX-4bit"),
        ("unsloth/GLM-4.5-Air-GGUF", None),  # which of its files?
        ("GLM-4.5-Air-GGUF:Q9_K", None),
        ("SmolLM2", None),
        ("", None),
    ],
)
def test_a_name_as_typed(typed: str, name: str | None) -> None:
    assert found_name(typed) == name


def test_a_family_is_not_one_of_its_releases() -> None:
    assert isinstance(catalogue.find("GLM-4.5"), Family)
    assert isinstance(catalogue.find("ZhipuAI/GLM-4.5"), Release)


def test_a_repository_of_several_files() -> None:
    quants = [release.quant for release in catalogue.in_repository("unsloth/glm-4.5-air-gguf")]
    assert len(quants) > 10
    assert {"Q4_K_M", "Q8_0", "BF16"} <= set(quants)
    assert [release.name for release in catalogue.in_repository("zai-org/GLM-4.7")] == ["GLM-4.7-BF16"]
    assert catalogue.in_repository("nobody/nothing") == ()


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("GLM-4.5-Aire", "GLM-4.5-Air"),
        ("GLM4.5-Air", "GLM-4.5-Air"),
        ("zai/GLM-4.6-FP8", "GLM-4.6-FP8"),
        ("GLM-4.5-Air-AWQ", "GLM-4.5-Air-AWQ-FP16Mix"),
        ("unsloth/GLM-4.5-Air-GGUF:Q4_K", "GLM-4.5-Air-GGUF:Q4_K_M"),
        ("unsloth/GLM-4.6-GGUF", "GLM-4.6-GGUF:Q8_0"),
    ],
)
def test_near_misses_are_near_and_can_be_found(typed: str, first: str) -> None:
    near = catalogue.near_misses(typed)
    assert first in near
    assert len(near) <= 3
    assert all(catalogue.find(name) is not None for name in near)
    assert catalogue.find(typed) is None


def test_nothing_is_near_to_nonsense() -> None:
    assert catalogue.near_misses("zai-org/nope") == ()  # one owner's repositories are no more alike for that
    assert catalogue.near_misses("xyzzy") == catalogue.near_misses(" ") == ()


def test_reading_it_imports_nothing_large() -> None:
    code = "from glmlocal import catalogue; catalogue.releases(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "rich", "httpx", "difflib"} & set(done.stdout.split())
