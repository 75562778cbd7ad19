"""A bare family name: the planner says which release, why, how large and how fast."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from huggingface_hub import constants

from glmlocal import catalogue
from glmlocal.cli import pull
from glmlocal.cli.main import main
from glmlocal.cli.pull_choice import Choice, choose_release
from glmlocal.errors import ConfigError
from glmlocal.hub.known import list_releases
from glmlocal.hub.names import Source
from glmlocal.planner import probe
from glmlocal.planner.machine import Nvme
from glmlocal.resolve import resolve
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
    assert choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=ram_gib), told.append).words == wanted


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
    assert found.hub_id == "zai-org/GLM-4.5-Air-FP8"
    assert found.words == "zai-org/GLM-4.5-Air-FP8 --quant int4"
    assert "GLM-4.5-Air-FP8, loaded with --quant int4, is the finest" in told[0]


def test_where_memory_holds_none_the_fastest_is_packed() -> None:
    told: list[str] = []
    small = machine(ram_gib=24, nvme=Nvme(1 << 40, 5.0))
    found = choose_release("GLM-4.5-Air", "huggingface", small, told.append)
    assert (found.hub_id, found.quant, found.must_be_packed) == ("unsloth/GLM-4.5-Air-GGUF:Q2_K", "keep", True)
    (text,) = told
    assert "none of the 5 releases tried fits into memory" in text
    assert "GLM-4.5-Air-GGUF:Q2_K runs fastest with experts read from the disk" in text
    assert "the finest that this machine holds" not in text
    assert "`glmlocal pull GLM-4.5-Air --pack` fetches and packs at once, which takes 41.57 GiB of disk" in text
    assert found.next_step.endswith("`glmlocal pack unsloth/GLM-4.5-Air-GGUF:Q2_K --quant keep` to run it")


def test_where_nothing_fits_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"smallest tried is GLM-4.5-Air-GGUF:Q2_K.*are missing.*--compare"):
        choose_release("GLM-4.5-Air", "huggingface", machine(ram_gib=24), lambda text: None)


def test_a_hub_that_has_none_of_them_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"this version does not run; to fetch it .* name a release: GLM-5-BF16"):
        choose_release("GLM-5", "huggingface", machine(ram_gib=2000), lambda text: None)
    monkeypatch.setattr(catalogue, "releases", lambda: ())
    with pytest.raises(ConfigError, match=r"no release of GLM-4\.6 is known on modelscope; try the other hub"):
        list_releases("GLM-4.6", "modelscope")


def test_on_another_hub_only_what_is_there_is_chosen() -> None:
    found = choose_release("GLM-4.5-Air", "modelscope", machine(ram_gib=512), lambda text: None)
    assert found.hub_id == "ZhipuAI/GLM-4.5-Air"


def test_what_was_chosen_is_asked_for_and_never_fetched_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=96))
    args = argparse.Namespace(model="GLM-4.5-Air", hub="huggingface", revision=None)
    source, choice = pull.find_source(args)
    assert choice == Choice("unsloth/GLM-4.5-Air-GGUF:Q4_K_M", "keep")
    assert source == Source("huggingface", "unsloth/GLM-4.5-Air-GGUF", "Q4_K_M")
    assert "67.99 GiB" in capsys.readouterr().err
    exact, choice = pull.find_source(argparse.Namespace(**{**vars(args), "model": "GLM-4.5-Air-FP8"}))
    assert choice is None
    assert exact.repo_id == "zai-org/GLM-4.5-Air-FP8"
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=8))
    assert main(["pull", "GLM-4.5-Air"]) == 2
    assert "no release of GLM-4.5-Air fits" in capsys.readouterr().err


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Source]:
    """A person at a terminal of a machine of 64 GiB without any models; what is fetched lands in the list."""
    fetched: list[Source] = []

    def fetch(source: Source, options: object, **more: object) -> Path:
        assert more["must_ask"]
        fetched.append(source)
        return tmp_path

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path))
    monkeypatch.setattr(pull, "somebody_is_there", lambda: True)
    monkeypatch.setattr(pull, "fetch", fetch)
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=64))
    return fetched


def test_running_a_family_offers_the_planners_choice_and_loads_it_as_planned(
    nothing_here: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(model="GLM-4.5-Air", quant="keep", plan=None)
    pull.offer_to_pull(args)
    assert nothing_here == [Source("huggingface", "zai-org/GLM-4.5-Air-FP8")]
    assert args.quant == "int4"
    assert "the next time: zai-org/GLM-4.5-Air-FP8 --quant int4" in capsys.readouterr().err


@pytest.mark.parametrize(("quant", "plan"), [("int8", None), ("keep", Path("plan.json"))])
def test_what_the_user_decided_stays(quant: str, plan: Path | None, nothing_here: list[Source]) -> None:
    args = argparse.Namespace(model="GLM-4.5-Air", quant=quant, plan=plan)
    pull.offer_to_pull(args)
    assert len(nothing_here) == 1
    assert args.quant == quant


def test_no_is_an_answer(nothing_here: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "fetch", lambda *args, **more: None)
    with pytest.raises(ConfigError, match=r"fetch the one that suits .* `glmlocal pull GLM-4\.5-Air`"):
        pull.offer_to_pull(argparse.Namespace(model="GLM-4.5-Air", quant="keep"))


def test_without_a_terminal_the_error_is_short_and_names_the_command(
    nothing_here: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "somebody_is_there", lambda: False)
    pull.offer_to_pull(argparse.Namespace(model="GLM-4.5-Air", quant="keep"))
    with pytest.raises(ConfigError) as caught:
        resolve("GLM-4.5-Air")
    assert str(caught.value) == (
        "no release of GLM-4.5-Air is on this disk; fetch the one that suits this machine with "
        "`glmlocal pull GLM-4.5-Air`; `glmlocal plan GLM-4.5-Air --compare` shows all of them"
    )
    assert nothing_here == []


def test_what_would_have_to_be_packed_is_not_fetched_to_be_run(
    nothing_here: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "runtime_machine", lambda ram=None: machine(ram_gib=24, nvme=Nvme(1 << 40, 5.0)))
    with pytest.raises(ConfigError, match=r"out of a pack only; make one with `glmlocal pull GLM-4\.5-Air --pack`"):
        pull.offer_to_pull(argparse.Namespace(model="GLM-4.5-Air", quant="keep"))
    assert nothing_here == []


def test_a_familys_pack_is_named(nothing_here: list[Source], tmp_path: Path) -> None:
    for name in ("GLM-4.5-Air-GGUF-Q2_K-keep", "GLM-4.5-AirX-int4", "GLM-4.5-Air-begun"):
        (tmp_path / "packs" / name).mkdir(parents=True)
        if "begun" not in name:
            (tmp_path / "packs" / name / "experts.pack").touch()
    with pytest.raises(ConfigError, match=r"of its releases GLM-4\.5-Air-GGUF-Q2_K-keep is here, packed: name it"):
        resolve("glm-4.5-air")
    pull.offer_to_pull(argparse.Namespace(model="GLM-4.5-Air", quant="keep"))
    assert nothing_here == []


def test_after_a_pull_the_command_to_run_it_is_told(
    nothing_here: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "GLM-4.5-Air"]) == 0
    assert "run it with `glmlocal chat zai-org/GLM-4.5-Air-FP8 --quant int4`" in capsys.readouterr().err
