"""What goes wrong with a pack's disk, as a client of ``glmlocal serve`` sees it: one request fails with a line that
says what to do, the next is answered as ever. The process and the pack are real, the model is tiny."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import packed
import tiny
from glmlocal.formats.expert_pack import PACK_FILE
from glmlocal.kernels import cpu
from served import TESTS, Process, served

pytestmark = pytest.mark.skipif(not cpu.available, reason="packs need the native kernels")

QUESTION = {"prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offloaded")
    return packed.pack(tiny.save(tiny.build_model(7), directory / "source"), directory / "packed", "int4")


@contextmanager
def serving(model: Path, directory: Path, **environment: str) -> Iterator[Process]:
    """A copy of the model, which tests may spoil, in ``directory``/packed; ``directory``/fault breaks its disk."""
    shutil.copytree(model, directory / "packed")
    places = {
        "GLMLOCAL_HOME": str(directory / "home"),
        "OFFLOADED_SLOTS": "3",
        "OFFLOADED_FAULT": str(directory / "fault"),
    }
    program = (str(TESTS / "offloaded.py"),)
    with served(directory, str(directory / "packed"), program=program, **{**places, **environment}) as server:
        yield server


def ask(server: Process, **fields: object) -> httpx.Response:
    return server.http.post("/v1/completions", json={**QUESTION, **fields})


def answer(server: Process) -> str:
    response = ask(server)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def failure(server: Process, **fields: object) -> str:
    response = ask(server, **fields)
    assert response.status_code == 500, response.text
    return str(response.json()["error"]["message"])


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a healthy server with all experts in slots answers."""
    with serving(model, tmp_path_factory.mktemp("healthy"), OFFLOADED_SLOTS="99") as server:
        return answer(server)


def test_a_disk_with_io_errors(model: Path, right: str, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        assert answer(server) == right
        (tmp_path / "fault").write_text("EIO")
        message = failure(server)
        assert "layer " in message
        assert "EIO" in message
        assert "check the disk" in message
        events = ask(server, stream=True).text
        assert "check the disk" in events, "a stream that has begun ends with the error"
        (tmp_path / "fault").unlink()
        assert answer(server) == right
        assert server.http.get("/health").status_code == 200
        assert "Traceback" not in server.log.read_text("utf-8")


def test_a_file_that_becomes_shorter(model: Path, right: str, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        assert answer(server) == right
        path = tmp_path / "packed" / PACK_FILE
        os.truncate(path, path.stat().st_size // 8192 * 4096)
        message = failure(server)
        assert "become shorter" in message or "was changed" in message
        assert server.http.get("/health").status_code == 200, "it lives, and says the same again"
        assert "Traceback" not in server.log.read_text("utf-8")


def test_a_flipped_bit(model: Path, right: str, tmp_path: Path) -> None:
    """In all records of one layer, before the server starts: the header is whole, so it starts."""
    spoiled = tmp_path / "spoiled"
    shutil.copytree(model, spoiled)
    size = (spoiled / PACK_FILE).stat().st_size
    with open(spoiled / PACK_FILE, "r+b") as file:
        file.seek(size - 4096)
        for at in range(size - 4096, size - size // 4, -4096):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))
    with serving(spoiled, tmp_path) as server:
        message = failure(server)
        assert "is damaged" in message
        assert "layer " in message
        assert "Traceback" not in server.log.read_text("utf-8")


def test_a_pack_replaced_or_overwritten_while_it_is_used(model: Path, right: str, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        path = tmp_path / "packed" / PACK_FILE
        assert answer(server) == right
        (tmp_path / "other").write_bytes(b"\0" * 4096)
        kept = tmp_path / "kept"
        os.link(path, kept)
        os.replace(tmp_path / "other", path)
        assert answer(server) == right, "the old file lives as long as it is open"
        with open(kept, "r+b") as file:
            file.write(b"x")
        message = failure(server)
        assert "was changed while it is in use" in message
        assert "start again" in message


def test_a_full_disk_loses_a_hint_and_nothing_else(model: Path, right: str, tmp_path: Path) -> None:
    """Serving writes only the route trace, at the end: where it cannot, answers and the exit are as ever."""
    (tmp_path / "home").write_text("a file where a directory is wanted")
    with serving(model, tmp_path) as server:
        assert answer(server) == right
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.exit_code() == 0
        server.process.stdin = None
        assert "Traceback" not in server.log.read_text("utf-8")
