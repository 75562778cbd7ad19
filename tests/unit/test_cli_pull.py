"""``glmlocal pull`` at a terminal: what is said and asked before anything comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import crafted
from glmlocal.cli import pull as cli_pull
from glmlocal.cli.main import main
from glmlocal.hub import pull
from hub.pulling import REPO
from hub.server import HubServer

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 5000}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub of the environment, and a person at a terminal who must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli_pull, "somebody_is_there", lambda: True)
    monkeypatch.setattr(cli_pull, "confirm", lambda question, default: pytest.fail(question))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.add(REPO, FILES)
        yield server


def test_a_disk_without_room_is_said_before_the_question(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pull, "_SPARE_BYTES", 1 << 60)
    assert main(["pull", REPO]) == 2
    assert "is too small" in capsys.readouterr().err
    assert not server.served


def test_what_comes_where_to_and_the_room_there_are_said_and_asked(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pull, "free_bytes", lambda path: 7 << 30)
    asked: list[str] = []
    monkeypatch.setattr(cli_pull, "confirm", lambda question, default: asked.append(question))
    assert main(["pull", REPO]) == 0
    line, *others = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{REPO}@")
    assert line.endswith(f"2 files, 4.885 KiB; into {tmp_path}/hub/models--zai-org--GLM-test, where 7 GiB are free")
    assert asked == ["Fetch it?"]
    assert others == ["nothing was fetched"]
    assert not server.served


def test_what_is_here_is_not_asked_about(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", REPO, "--yes"]) == 0
    assert main(["pull", REPO]) == 0
    assert "4.885 KiB of it here already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("zai-org/GLM-4.5-Ari-FP8", "did you mean the release GLM-4.5-Air-FP8"),
        ("zai-org/nope", None),
        (f"{REPO}@v9", None),  # the repository is there
    ],
)
def test_a_hint_where_a_release_has_nearly_the_name(
    model: str, hint: str | None, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", model]) == 2
    err = capsys.readouterr().err
    assert ("did you mean" in err) == (hint is not None)
    assert (hint or "") in err


def test_a_family_of_which_nothing_is_here_is_shown_as_it_was_released(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = crafted.write_checkpoint(tmp_path / "r", crafted.TINY, crafted.tiny_tensors(crafted.TINY), shards=2)
    server.add("zai-org/GLM-4.5-Air", {path.name: path.read_bytes() for path in release.iterdir()})
    assert main(["show", "glm-4.5-air", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == f"{server.url}/zai-org/GLM-4.5-Air"
    assert facts["problem"] is None
    assert not (tmp_path / "hub").exists()
