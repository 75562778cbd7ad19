"""What MODEL may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from glmlocal.demo import cache
from glmlocal.errors import ConfigError
from glmlocal.resolve import resolve


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some models in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "glm"))
    for name in ("demo", "tiny-glm", "models/GLM-4.5-Air", "home/m", "Größe 模型"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("air.gguf", "Big.GGUF", "models/air-Q4_0-00001-of-00002.gguf", "notes.txt", "tiny-glm/config.json"):
        (tmp_path / name).touch()
    (tmp_path / "tiny-glm/model.safetensors").touch()
    return tmp_path


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Calls for the built-in demo, with their ``progress``."""
    calls: list[bool] = []

    def ensure_demo(*, progress: bool) -> Path:
        calls.append(progress)
        return Path("/cache/demo.gguf")

    monkeypatch.setattr(cache, "ensure_demo", ensure_demo)
    return calls


@pytest.mark.parametrize(
    "model", ["tiny-glm", "models/GLM-4.5-Air", "air.gguf", "Big.GGUF", "./air.gguf", "Größe 模型", "."]
)
def test_existing_directories_and_gguf_files_are_themselves(model: str, here: Path) -> None:
    assert resolve(model) == Path(model)
    assert resolve(Path(model)) == Path(model)
    assert resolve(str(here / model)) == here / model


def test_tilde_works_where_no_shell_expands_it(here: Path) -> None:
    assert resolve("~/m") == here / "home/m"


def test_demo_is_the_built_in_and_dot_slash_demo_the_directory(built: list[bool]) -> None:
    assert resolve("demo") == resolve("demo", progress=False) == Path("/cache/demo.gguf")
    assert built == [True, False]
    assert resolve("./demo") == resolve(Path("demo")) == resolve("demo/") == Path("demo")
    assert built == [True, False]


@pytest.mark.parametrize(
    "model",
    [
        "GLM-4.5-Air",
        "GLM-4.6-FP8",
        "glm-4.7",
        "GLM4.5",
        "zai-org/GLM-4.5-Air",
        "unsloth/GLM-4.5-Air-GGUF:Q4_K_M",
        "someone/something",
    ],
)
def test_names_of_the_hub_say_how_to_get_them(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(model)
    if "/" in model:
        assert str(error.value) == f"{model} is not on this disk; fetch it with `glmlocal pull {model}`"
    else:  # what it stands for is the catalogue's to say
        assert model.casefold() in str(error.value).casefold()


def test_name_of_the_hub_beside_its_directory_mentions_that(here: Path) -> None:
    (here / "GLM-4.5-Air-AWQ").mkdir()
    (here / "zai-org").mkdir()
    (here / "zai-org/GLM-4.5-Air-AWQ").mkdir()
    with pytest.raises(ConfigError, match=r"did you mean zai-org/GLM-4.5-Air-AWQ\?"):
        resolve("zai-org/GLM-4.5-Air")


@pytest.mark.parametrize(
    ("model", "suggestion"),
    [
        ("dmeo", "did you mean demo?"),
        ("Demo", "did you mean demo?"),
        ("airr.gguf", "did you mean air.gguf?"),
        ("big.gguf", "did you mean Big.GGUF?"),
        ("./tiny-gml", "did you mean tiny-glm?"),
        ("models/GLM-4.5-Air2", "did you mean models/GLM-4.5-Air?"),
        ("models/glm-4.5-air", "did you mean models/GLM-4.5-Air?"),
        ("models/air-Q4_0-00002-of-00002.gguf", "did you mean models/air-Q4_0-00001-of-00002.gguf?"),
        ("nodir/air.gguf", "give a directory, a .gguf file or `demo`"),
        ("air.gguf/x", "give a directory, a .gguf file or `demo`"),
        ("qqqqq", "give a directory, a .gguf file or `demo`"),
        ("/nowhere/at/all", "give a directory, a .gguf file or `demo`"),
    ],
)
def test_near_misses_are_suggested(model: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(model)
    assert str(error.value) == f"there is no {model!r}; {suggestion}"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "name is empty"),
        ("  ", "name is empty"),
        ("notes.txt", "'notes.txt' is a file, but not a .gguf"),
        ("tiny-glm/config.json", "did you mean its directory, 'tiny-glm'?"),
        ("tiny-glm/model.safetensors", "did you mean its directory, 'tiny-glm'?"),
        ("/dev/null", "neither a directory nor a file"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "null byte"),
        ("loop.gguf", "symbolic links"),
    ],
)
def test_everything_else_is_one_clear_line(model: str, message: str, here: Path) -> None:
    os.symlink("loop.gguf", here / "loop.gguf")
    with pytest.raises(ConfigError) as error:
        resolve(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
