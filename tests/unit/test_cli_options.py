"""The words that every command shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmlocal.cli import options
from glmlocal.cli.main import Parser
from glmlocal.errors import ConfigError, PlanError
from glmlocal.planner.plan import Wants
from glmlocal.planner.plan_json import as_json
from glmlocal.planner.solve import plan
from glmlocal.units import GIB
from planned import air, machine


def _parse(*words: str) -> Wants:
    parser = Parser(prog="test")
    options.add_machine_options(parser)
    options.add_wish_options(parser)
    return options.wishes(parser.parse_args(words))  # type: ignore[no-any-return]


def test_no_words_are_no_wishes() -> None:
    assert _parse() == Wants()


def test_every_wish_arrives() -> None:
    words = "--context 4096 --batch 2 --kv-dtype fp8 --draft 1 --vram 20GiB --cpu-offload-gb 1.5 --no-offload"
    assert _parse(*words.split()) == Wants(
        context=4096,
        batch=2,
        kv_dtype="fp8",
        draft=1,
        vram_bytes=20 * GIB,
        cpu_offload_bytes=3 * GIB // 2,
        offload=False,
    )
    assert _parse("--draft", "0").draft == 0
    assert _parse("--draft", "auto").draft is None


@pytest.mark.parametrize(
    "words",
    [
        ("--vram", "20"),
        ("--vram=-1GiB",),
        ("--cpu-offload-gb", "nan"),
        ("--cpu-offload-gb", "inf"),
        ("--cpu-offload-gb=-1",),
        ("--cpu-offload-gb", "٣"),
        ("--draft", "4"),
        ("--draft", "²"),
        ("--context", "0"),
        ("--quant", "int3"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="argument --"):
        _parse(*words)


def _engine(*words: str) -> dict[str, object]:
    parser = Parser(prog="test")
    parser.add_argument("--context", type=int)
    options.add_plan_option(parser)
    options.add_engine_options(parser)
    return options.planned(parser.parse_args(words), context=None)


def test_commands_that_run_take_the_same_words() -> None:
    defaults: dict[str, object] = {
        "threads": None,
        "quant": "keep",
        "activations": "auto",
        "kv_dtype": "auto",
        "ram": None,
        "gpus": "auto",
        "link": None,
        "nvme_dir": None,
        "vram_bytes": None,
        "cpu_offload_bytes": None,
        "offload": True,
    }
    assert _engine() == defaults
    assert _engine("--gpus", "none", "--draft", "0") == defaults | {"gpus": "none"}
    for words in (["--nvme", "none"], ["--no-offload"]):
        assert _engine(*words) == defaults | {"offload": False}
    assert _engine("--quant", "auto", "--ram", "16GiB", "--threads", "2") == defaults | {
        "quant": "auto",
        "ram": "16GiB",
        "threads": 2,
    }


@pytest.mark.parametrize(
    "words", ["--gpus 2xH100", "--nvme 2TB@7", "--link pcie4x16", "--vram 20GiB", "--cpu-offload-gb 16", "--draft 1"]
)
def test_words_about_what_does_not_run_yet_are_not_ignored(words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words.split()[0]}: this version"):
        _engine(*words.split())


def test_words_about_gpus_are_taken_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMLOCAL_FAKE_GPU", "2x1GiB")
    words = _engine("--gpus", "1GiB@60", "--vram", "512MiB", "--cpu-offload-gb", "0", "--link", "pcie4x16")
    wanted = {"gpus": "1GiB@60", "vram_bytes": GIB // 2, "cpu_offload_bytes": 0, "link": "pcie4x16"}
    assert wanted.items() <= words.items()
    monkeypatch.setenv("GLMLOCAL_FAKE_GPU", "many")
    with pytest.raises(ConfigError, match="GLMLOCAL_FAKE_GPU is 'many', wanted GPUs"):
        _engine("--vram", "1GiB")


def test_a_saved_plan_decides_everything(tmp_path: Path) -> None:
    saved = plan(air(), machine(ram_gib=256), Wants(context=4096, batch=1))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(as_json(saved)))
    assert _engine("--plan", str(path)) == {"plan": saved}
    assert _engine("--plan", str(path), "--nvme-dir", "/disk") == {"plan": saved, "nvme_dir": Path("/disk")}
    for words in ("--quant int8", "--ram 8GiB", "--context 100", "--gpus none"):
        with pytest.raises(ConfigError, match=f"{words.split()[0]} is decided by --plan already"):
            _engine("--plan", str(path), *words.split())
    path.write_text("{}")
    with pytest.raises(PlanError, match="damaged"):
        _engine("--plan", str(path))
