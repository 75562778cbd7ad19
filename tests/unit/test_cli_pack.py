"""The commands around packs: pack, pack --verify, ls, show, verify, rm, and their names."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny
from glmlocal.cli import pack as cli_pack
from glmlocal.cli import rm_replaced
from glmlocal.cli.main import main
from glmlocal.hub.cache import blocks_bytes
from glmlocal.kernels import cpu
from glmlocal.packing import here, partial
from glmlocal.resolve import resolve
from glmlocal.units import format_bytes

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


# rm --replaced

REPO = "zai-org/GLM-4.5-Air"


@pytest.fixture
def pulled(source: Path, tmp_path: Path) -> Path:
    """The snapshot of a model in Hugging Face's cache."""
    directory = tmp_path / "hf" / "models--zai-org--GLM-4.5-Air"
    snapshot = directory / "snapshots" / ("a" * 40)
    (directory / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, directory / "blobs" / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_what_packs_replaced_is_removed_in_one_go(
    pulled: Path, source: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sum(blocks_bytes(path) for path in pulled.parents[1].rglob("*") if "snapshots" not in path.parts)
    for model, quant in ((REPO, "int8"), (REPO, "int4"), (str(source), "keep")):  # the last: the user's own directory
        assert main(["pack", model, "--quant", quant]) == 0
    capsys.readouterr()
    assert main(["rm", "--replaced"]) == 2  # nobody to ask
    asked = capsys.readouterr().err
    assert "give --yes" in asked
    assert f"remove {REPO} (" in asked
    assert "packed as GLM-4.5-Air-int4, GLM-4.5-Air-int8)" in asked
    assert str(source) not in asked
    assert pulled.is_dir()
    assert main(["rm", "--replaced", "--yes"]) == 0
    assert f"removed {REPO}: {format_bytes(before)} freed" in capsys.readouterr().err
    assert not pulled.exists()
    assert (source / "model.safetensors").is_file()
    packs = sorted(path.name for path in (home / "packs").iterdir())
    assert packs == ["GLM-4.5-Air-int4", "GLM-4.5-Air-int8", "GLM-tiny-keep"]
    assert main(["rm", "--replaced", "--yes"]) == 0
    assert "nothing on this disk has been replaced" in capsys.readouterr().err


def test_what_was_fetched_again_and_packed_again_is_replaced(pulled: Path, home: Path) -> None:
    """An older pack of it does not keep it."""
    assert main(["pack", REPO, "--quant", "int4"]) == 0
    older_s = pulled.stat().st_mtime - 10
    os.utime(home / "packs" / "GLM-4.5-Air-int4" / "experts.pack", (older_s, older_s))
    assert main(["rm", "--replaced", "--yes"]) == 0
    assert pulled.is_dir()
    assert main(["pack", REPO, "--quant", "int8"]) == 0
    assert main(["rm", "--replaced", "--yes"]) == 0
    assert not pulled.exists()


@pytest.mark.parametrize(
    "why", ["damaged", "another pack is damaged", "fetched again", "a family's name", "a directory", "no"]
)
def test_what_may_still_be_needed_stays(
    why: str, pulled: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["pack", REPO, "--quant", "int8"]) == 0
    assert main(["pack", REPO, "--quant", "int4"]) == 0
    command = ["rm", "--replaced", "GLM-4.5-Air-int8", "--yes"]
    match why:
        case "damaged" | "another pack is damaged":
            file = home / "packs" / f"GLM-4.5-Air-{'int8' if why == 'damaged' else 'int4'}" / "experts.pack"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "fetched again":
            later_s = (home / "packs" / "GLM-4.5-Air-int4" / "experts.pack").stat().st_mtime + 10
            os.utime(pulled, (later_s, later_s))
        case "a family's name":  # which of its releases it was then, nobody knows
            packs = [
                replace(pack, header=replace(pack.header, source="GLM-4.5-Air")) for pack in here.packs() if pack.header
            ]
            monkeypatch.setattr(here, "packs", lambda: iter(packs))
        case "a directory":  # that is called so, and was packed rather than what was pulled
            (home / REPO).mkdir(parents=True)
            monkeypatch.chdir(home)
        case "no":
            command.remove("--yes")
            monkeypatch.setattr(rm_replaced, "confirm", lambda question, default: default)
    capsys.readouterr()
    assert main(command) == (2 if "damaged" in why else 0)
    assert (pulled / "model.safetensors").is_file()
    assert ("stays, to pack it again" in capsys.readouterr().err) == ("damaged" in why)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["rm"], "name what to remove"), (["rm", "--replaced", "nope", "--yes"], "there is no whole pack 'nope'")],
)
def test_rm_of_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
