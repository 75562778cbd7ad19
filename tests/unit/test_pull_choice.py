"""A bare family name: the planner says which release, why, how large and how fast."""

from __future__ import annotations

import argparse

import pytest

from glmlocal.cli import pull
from glmlocal.cli.main import main
from glmlocal.cli.pull_choice import choose_release
from glmlocal.errors import ConfigError
from glmlocal.hub.names import Source
from glmlocal.planner import probe
from planned import machine


@pytest.mark.parametrize(
    ("ram_gib", "wanted"),
    [
        (56, "unsloth/GLM-4.5-Air-GGUF:Q3_K_M"),
        (96, "unsloth/GLM-4.5-Air-GGUF:Q4_K_M"),
        (128, "zai-org/GLM-4.5-Air-FP8"),
        (512, "zai-org/GLM-4.5-Air"),
    ],
)
def test_more_memory_gets_a_finer_release(ram_gib: int, wanted: str) -> None:
    told: list[str] = []
    assert choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=ram_gib), told.append) == wanted


def test_it_says_which_why_how_large_and_how_fast() -> None:
    told: list[str] = []
    choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=96), told.append)
    (text,) = told
    assert "GLM-4.5-Air-GGUF:Q4_K_M is the finest that this machine holds" in text
    assert "download 67.99 GiB" in text
    assert "tok/s" in text
    assert "of 96 GiB" in text
    assert "glmlocal plan GLM-4.5-Air --compare" in text


def test_quantizing_while_loading_is_said() -> None:
    told: list[str] = []
    found = choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=64), told.append)
    assert found == "zai-org/GLM-4.5-Air-FP8"
    assert "GLM-4.5-Air-FP8, loaded with --quant int4, is the finest" in told[0]


def test_where_nothing_fits_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"smallest tried is GLM-4.5-Air-GGUF:Q2_K.*are missing.*--compare"):
        choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=24), lambda text: None)


def test_a_hub_that_has_none_of_them_is_said() -> None:
    with pytest.raises(ConfigError, match="name one of them"):
        choose_release("GLM-5", "huggingface", machine(ram_gib=2000), lambda text: None)


def test_on_another_hub_only_what_is_there_is_chosen() -> None:
    found = choose_release("GLM-4.5-Air", "modelscope", machine(ram_gib=512), lambda text: None)
    assert found == "ZhipuAI/GLM-4.5-Air"


def test_what_was_chosen_is_asked_for_and_never_fetched_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=96))
    args = argparse.Namespace(model="GLM-4.5-Air", hub="huggingface", revision=None)
    source, was_chosen = pull.find_source(args)
    assert was_chosen
    assert source == Source("huggingface", "unsloth/GLM-4.5-Air-GGUF", "Q4_K_M")
    assert "67.99 GiB" in capsys.readouterr().err
    exact, was_chosen = pull.find_source(argparse.Namespace(**{**vars(args), "model": "GLM-4.5-Air-FP8"}))
    assert not was_chosen
    assert exact.repo_id == "zai-org/GLM-4.5-Air-FP8"
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=8))
    assert main(["pull", "GLM-4.5-Air"]) == 2
    assert "no release of GLM-4.5-Air fits" in capsys.readouterr().err
