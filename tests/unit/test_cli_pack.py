"""The commands around packs: pack, pack --verify, ls, show, verify, rm, and their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny
from glmlocal.cli import pack as cli_pack
from glmlocal.cli.main import main
from glmlocal.kernels import cpu
from glmlocal.packing import here, partial
from glmlocal.resolve import resolve

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels, whose layout a pack has")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model().bfloat16(), tmp_path_factory.mktemp("root") / "GLM-tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "home"


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_pack_and_everything_that_knows_packs(source: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(source), "--quant", "int4", "--json"]) == 0
    out = home / "packs" / "GLM-tiny-int4"
    plan, *progress, done = events(capsys.readouterr().out)
    assert (plan["event"], plan["quant"], plan["layers"], plan["experts"]) == ("plan", "int4", 2, 8)
    assert (done["event"], done["path"]) == ("done", str(out))
    assert done["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert progress[-1]["done_bytes"] == progress[-1]["total_bytes"] == plan["source_bytes"]
    assert resolve("GLM-tiny-int4") == out

    assert main(["ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["format"], row["quant"], row["complete"]) == ("GLM-tiny-int4", "pack", "int4", True)
    assert main(["show", "GLM-tiny-int4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["problem"] is None
    assert next(t for t in shown["tensors"] if t["kind"] == "routed experts")["dtypes"].keys() == {"pack.int4"}
    assert main(["plan", "GLM-tiny-int4", "--json"]) == 0
    capsys.readouterr()

    assert main(["pack", "--verify", "GLM-tiny-int4", "--json"]) == 0
    assert events(capsys.readouterr().out)[0]["damaged"] == []
    data = bytearray((out / "experts.pack").read_bytes())
    data[-1] ^= 1
    (out / "experts.pack").write_bytes(data)
    assert main(["pack", "--verify", str(out)]) == 2
    assert "damaged: experts.pack: the record of layer 2, expert 7" in capsys.readouterr().err
    assert main(["verify", "GLM-tiny-int4", "--json"]) == 2
    (found,) = events(capsys.readouterr().out)
    assert found["damaged"] == [{"file": "experts.pack", "layer": 2, "expert": 7, "tensor": None}]

    assert main(["rm", "GLM-tiny-int4", "--yes"]) == 0
    assert not list((home / "packs").iterdir())


def test_auto_is_what_plan_chooses(source: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(source)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(home / "packs" / "GLM-tiny-keep")  # all of it fits this machine
    assert "as bf16" in captured.err


def test_an_unfinished_pack_is_listed_goes_on_and_can_be_removed(
    source: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    command = ["pack", str(source), "--quant", "keep"]
    with monkeypatch.context() as patch:
        patch.setattr(partial.PartialPack, "publish", interrupt)
        assert main(command) == 130
    capsys.readouterr()
    assert main(["ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["complete"], row["path"]) == ("GLM-tiny-keep", False, None)
    assert main([*command, "--json"]) == 0
    _, first, *_ = events(capsys.readouterr().out)
    assert first["event"] == "progress"
    assert first["done_bytes"] == first["total_bytes"]  # nothing was made again
    with monkeypatch.context() as patch:
        patch.setattr(partial.PartialPack, "publish", interrupt)
        assert main(["pack", str(source), "--quant", "int8"]) == 130
    assert main(["rm", "GLM-tiny-int8", "--yes"]) == 0
    assert [path.name for path in (home / "packs").iterdir()] == ["GLM-tiny-keep"]


def test_rm_of_what_was_packed_says_that_the_pack_stays(source: Path) -> None:
    assert main(["pack", str(source), "--quant", "int8"]) == 0
    assert here.made_of(str(source)) == ["GLM-tiny-int8"]
    assert here.made_of("other") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "SOURCE", "--out", "OUT"], "exists and is no packed model"),
        (["pack", "--verify", "SOURCE"], "is no packed model"),
        (["pack", "--verify", "SOURCE", "--out", "x"], "leave out --out"),
        (["pack", "SOURCE", "--quant", "int3"], "invalid choice"),
        (["pack", "SOURCE", "--threads", "0"], "at least 1"),
        (["pack", "nothing-here"], "there is no"),
        (["pull", "org/name", "--out", "x"], "give --pack"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"SOURCE": str(source), "OUT": str(tmp_path)}
    assert main([words.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_default_names() -> None:
    assert cli_pack.default_out("zai-org/GLM-4.5-Air", "int4").name == "GLM-4.5-Air-int4"
    assert cli_pack.default_out("unsloth/GLM-4.5-Air-GGUF:Q4_K_M", "keep").name == "GLM-4.5-Air-GGUF-Q4_K_M-keep"
    assert cli_pack.default_out("models/air.gguf", "keep").name == "air-keep"
