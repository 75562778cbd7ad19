"""Which files are taken, and which names are refused."""

from __future__ import annotations

import pytest

from glmlocal.errors import ConfigError, DownloadError
from glmlocal.hub.listing import HubFile, hub_file
from glmlocal.hub.select import Selection, quant_label, select

SAFETENSORS = [
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "modeling_glm.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "figures/bench.png",
    "training.pt",
]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
UNSLOTH = [
    "config.json",
    "imatrix_unsloth.dat",
    "mmproj-F16.gguf",
    "GLM-4.5-Air-UD-Q2_K_XL.gguf",
    "Q4_K_M/GLM-4.5-Air-Q4_K_M-00002-of-00002.gguf",
    "Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf",
    "Q4_K_S/GLM-4.5-Air-Q4_K_S-00001-of-00002.gguf",  # its second part is missing
    "UD-Q4_K_XL/GLM-4.5-Air-UD-Q4_K_XL-00001-of-00001.gguf",
    "BF16/GLM-4.5-Air-BF16-00001-of-00001.gguf",
]


def files(*paths: str) -> list[HubFile]:
    return [HubFile(path, 1000 + len(path), "ab" * 32) for path in paths]


def paths(selection: Selection) -> list[str]:
    return [file.path for file in selection.files]


def test_safetensors_take_the_indexed_shards_and_the_text_files() -> None:
    selection = select(files(*SAFETENSORS), "org/name", shards=SHARDS)
    assert paths(selection) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        *SHARDS,
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (selection.format, selection.quant, selection.first) == ("safetensors", None, "")


def test_a_single_file_needs_no_index() -> None:
    selection = select(files("config.json", "model.safetensors", "x.py"), "org/name")
    assert paths(selection) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [((*SHARDS, "model-00003-of-00002.safetensors"), "lacks 'model-00003"), ((), "names no file")],
)
def test_an_index_that_names_what_is_not_there_is_refused(shards: tuple[str, ...], message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        select(files(*SAFETENSORS), "org/name", shards=shards)


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("Q4_K_M", ["Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/GLM-4.5-Air-Q4_K_M-00002-of-00002.gguf"]),
        ("q4_k_m", ["Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/GLM-4.5-Air-Q4_K_M-00002-of-00002.gguf"]),
        ("UD-Q4_K_XL", ["UD-Q4_K_XL/GLM-4.5-Air-UD-Q4_K_XL-00001-of-00001.gguf"]),
        ("Q4_K_XL", ["UD-Q4_K_XL/GLM-4.5-Air-UD-Q4_K_XL-00001-of-00001.gguf"]),
        ("Q2_K_XL", ["GLM-4.5-Air-UD-Q2_K_XL.gguf"]),
        ("bf16", ["BF16/GLM-4.5-Air-BF16-00001-of-00001.gguf"]),
    ],
)
def test_a_quantization_is_its_files_with_all_parts(quant: str, expected: list[str]) -> None:
    selection = select(files(*UNSLOTH), "org/name", quant)
    assert paths(selection) == expected
    assert (selection.format, selection.first) == ("gguf", expected[0])
    assert selection.quant in ("Q4_K_M", "UD-Q4_K_XL", "UD-Q2_K_XL", "BF16")


@pytest.mark.parametrize("quant", ["Q4_K_S", "Q4_K", "K_M", "Q5_K_M", "GLM-4.5-Air"])
def test_a_quantization_that_is_not_whole_or_not_there_is_refused(quant: str) -> None:
    with pytest.raises(ConfigError, match=rf"no '{quant}'.*Q4_K_M \("):
        select(files(*UNSLOTH), "org/name", quant)


def test_without_a_quantization_the_choices_are_named_unless_there_is_only_one() -> None:
    with pytest.raises(ConfigError, match=r"org/name:QUANT with one of .*UD-Q2_K_XL \(.*BF16"):
        select(files(*UNSLOTH), "org/name")
    assert paths(select(files("a-Q4_0.gguf", "mmproj-a.gguf"), "org/name")) == ["a-Q4_0.gguf"]


def test_safetensors_win_where_no_quantization_was_named() -> None:
    both = files("config.json", "model.safetensors", "a-Q4_0.gguf")
    assert select(both, "org/name").format == "safetensors"
    assert select(both, "org/name", "Q4_0").format == "gguf"


@pytest.mark.parametrize(
    ("stem", "label"),
    [
        ("GLM-4.5-Air-Q4_K_M", "Q4_K_M"),
        ("UD-Q4_K_XL/GLM-4.5-Air-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("zai-org_GLM-4.5-Air-IQ4_XS", "IQ4_XS"),
        ("GLM-4.5-Air.Q8_0", "Q8_0"),
        ("glm-4.5-air-bf16", "bf16"),
        ("Q2_K/whatever", "Q2_K"),
        ("model", "model"),
    ],
)
def test_labels_of_quantizations(stem: str, label: str) -> None:
    assert quant_label(stem) == label


@pytest.mark.parametrize(
    "path",
    [
        "../config.json",
        "a/../../config.json",
        "/etc/passwd",
        "a//b.json",
        "./config.json",
        "a/.",
        "config\n.json",
        "\x1b[2Jconfig.json",
        "C:\\config.json",
        "a\x00b",
        "\u202econfig.json",
        "\ud800",
        "x" * 300,
        "/".join(["abcdefgh"] * 200),
        "",
    ],
)
def test_unsafe_names_are_refused_even_where_they_are_not_needed(path: str) -> None:
    with pytest.raises(DownloadError, match="safe name") as error:
        select(files("config.json", "model.safetensors", path), "org/name")
    assert str(error.value).isprintable()


def test_names_of_all_languages_are_fine() -> None:
    select(files("config.json", "model.safetensors", "模型 说明.md", "größe.txt"), "org/name")


def test_duplicates_and_names_that_differ_in_case_only_are_refused() -> None:
    twice = [HubFile("config.json", 1, "ab" * 32), HubFile("config.json", 1, "ab" * 32)]
    with pytest.raises(DownloadError, match="lists a file twice"):
        select([*files("model.safetensors"), *twice], "org/name")
    shards = ("Model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors")
    with pytest.raises(DownloadError, match="not every disk can tell apart"):
        select(files("config.json", "model.safetensors.index.json", *shards), "org/name", shards=shards)
    select(files("config.json", "model.safetensors", "README.md", "Readme.md"), "org/name")  # not needed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "only PyTorch files"),
        (["README.md"], "neither safetensors nor whole GGUF"),
        (["model.safetensors"], "no config.json"),
        (["a-00001-of-00002.gguf"], "neither safetensors nor whole GGUF"),
    ],
)
def test_repositories_without_a_model_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        select(files(*names), "org/name")


@pytest.mark.parametrize(
    ("path", "size", "digest"),
    [
        (None, 1, "ab" * 32),
        ("a", -1, "ab" * 32),
        ("a", True, "ab" * 32),
        ("a", 1e3, "ab" * 32),
        ("a", 1 << 60, "ab" * 32),
        ("a", 1, "AB" * 32),
        ("a", 1, "../../etc"),
        ("a", 1, "ab" * 16),
        ("a", 1, None),
    ],
)
def test_values_of_a_listing_are_checked_before_use(path: object, size: object, digest: object) -> None:
    with pytest.raises(DownloadError, match="hub"):
        hub_file(path, size, digest, "the hub")
