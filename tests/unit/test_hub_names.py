"""What a person may write for a model on a hub."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from glmlocal.errors import ConfigError
from glmlocal.hub.names import HubName, Source, parse_source


class Known:
    """A catalogue of two releases, one of them a GGUF."""

    def find(self, name: str, hub: HubName) -> str | None:
        org = "zai-org" if hub == "huggingface" else "ZhipuAI"
        return {
            "glm-4.5-air": f"{org}/GLM-4.5-Air",
            "zai-org/glm-4.5-air": f"{org}/GLM-4.5-Air",
            "glm-4.5-air:q4_k_m": "unsloth/GLM-4.5-Air-GGUF:Q4_K_M",
        }.get(name.lower())

    def near_misses(self, name: str) -> Sequence[str]:
        return ("GLM-4.5-Air",) if "air" in name.lower() else ()


HF: HubName = "huggingface"


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("org/name", Source(HF, "org/name")),
        ("org/name:Q4_K_M", Source(HF, "org/name", "Q4_K_M")),
        ("org/name@v1.0", Source(HF, "org/name", None, "v1.0")),
        ("org/name:Q4_K_M@refs/pr/3", Source(HF, "org/name", "Q4_K_M", "refs/pr/3")),
        ("GLM-4.5-Air", Source(HF, "zai-org/GLM-4.5-Air")),
        ("glm-4.5-air@main", Source(HF, "zai-org/GLM-4.5-Air", None, "main")),
        ("zai-org/glm-4.5-air", Source(HF, "zai-org/GLM-4.5-Air")),
        ("GLM-4.5-Air:Q4_K_M", Source(HF, "unsloth/GLM-4.5-Air-GGUF", "Q4_K_M")),
        ("GLM-4.5-Air:Q5_0", Source(HF, "zai-org/GLM-4.5-Air", "Q5_0")),
    ],
)
def test_names_are_understood(model: str, source: Source) -> None:
    assert parse_source(model, Known()) == source


def test_the_other_hub_has_its_own_ids() -> None:
    source = parse_source("GLM-4.5-Air", Known(), hub="modelscope", revision="v2")
    assert source == Source("modelscope", "ZhipuAI/GLM-4.5-Air", None, "v2")
    assert source.pull_command == "glmlocal pull ZhipuAI/GLM-4.5-Air@v2 --hub modelscope"


def test_a_source_is_written_as_it_is_read() -> None:
    source = Source(HF, "org/name", "Q4_0", "abc")
    assert parse_source(str(source), Known()) == source


@pytest.mark.parametrize(
    "model",
    [
        "",
        "a/b/c",
        "https://huggingface.co/org/name",
        "org/..",
        "../name",
        "org/-name",
        "org/na me",
        "o\nrg/name",
        "org/ñ",
        "org/name:",
        "org/name@",
        "org/name@/etc",
        "org/name@../../x",
        "org/a--b",
        "org/a..b",
        "org/" + "x" * 96,
    ],
)
def test_everything_else_is_one_clear_line(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_source(model, Known())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "hint"), [("GLM-4.5-Aire", "did you mean GLM-4.5-Air?"), ("dmeo", "demo?"), ("qqq", "write org/name")]
)
def test_unknown_names_get_a_hint(model: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_source(model, Known())
    assert hint in str(error.value)


@pytest.mark.parametrize(
    "pasted",
    [
        "https://huggingface.co/org/name:Q4_K_M",
        "hf.co/org/name:Q4_K_M",
        "https://huggingface.co/org/name:Q4_K_M/tree/main",
        "https://modelscope.cn/models/org/name:Q4_K_M",
    ],
)
def test_an_address_is_answered_with_the_name_in_it(pasted: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean org/name:Q4_K_M\? write org/name"):
        parse_source(pasted, Known())


@pytest.mark.parametrize("revision", ["..", "a/../b", "/x", "a//b", "a b", "\n", "x" * 300, "refs/.."])
def test_a_revision_stays_inside_refs(revision: str) -> None:
    with pytest.raises(ConfigError, match="is no revision"):
        parse_source("org/name", Known(), revision=revision)


def test_two_revisions_are_a_question() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        parse_source("org/name@a", Known(), revision="b")
