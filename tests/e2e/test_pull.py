"""pull, ls, rm and verify as processes of their own, against a hub on loopback: killed, raced, without room."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import crafted
from glmlocal.hub.partial import merged
from hub.pulling import REPO, journalled, visible_files
from hub.server import HubServer, git_sha1
from pty_terminal import Terminal

BIG = "model.safetensors"
FILES: dict[str, bytes] = {
    "config.json": json.dumps(crafted.TINY).encode(),
    BIG: crafted.safetensors_bytes(crafted.tiny_tensors(crafted.TINY)),
    "tokenizer.json": b"{}",
    "README.md": b"not needed",
}
WANTED = {path: data for path, data in FILES.items() if path != "README.md"}
_PULL_IN_SMALL_RANGES = """
import sys
from dataclasses import replace
from glmlocal.cli.main import main
from glmlocal.hub import download
from glmlocal.cli import pull
options = download.Options(connections=4, range_bytes=200_000, sync_every_s=0.2, report_every_s=0.02)
pull.transfer_options = lambda args: options
sys.exit(main(["pull", *sys.argv[1:]]))
"""

# Kills itself before it changes the disk for the n-th time below a directory.
_KILLED_AT_STEP = """
import os, signal, sys
home, left = sys.argv.pop(1), int(sys.argv.pop(1))
CHANGES = {"os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
def step(event, arguments):
    global left
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (event in CHANGES or opens) and any(home in str(each) for each in arguments):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(step)
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "with spaces 和中文"


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    hubs = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}
    return os.environ | hubs | {"HF_HOME": str(home / "hf"), "GLMLOCAL_HOME": str(home / "glm"), **more}


def glmlocal(server: HubServer, home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmlocal", *arguments]
    env = environment(server, home, **environ)
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=200, text=True, env=env
    )


def start_pull(server: HubServer, home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PULL_IN_SMALL_RANGES, REPO, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(server, home))


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("glmlocal: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def hf_cache(home: Path) -> Path:
    return home / "hf" / "hub"


def test_pulled_once_it_is_found_by_us_and_by_huggingface_hub(server: HubServer, home: Path) -> None:
    result = glmlocal(server, home, "pull", REPO, "--json")
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["event"] == "plan"
    assert events[0]["to_fetch_bytes"] == sum(map(len, WANTED.values()))
    assert {event["path"] for event in events if event["event"] == "file"} == set(WANTED)
    assert [e["done_bytes"] for e in events if e["event"] == "progress"][-1] == events[0]["total_bytes"]
    assert events[-1]["event"] == "done"
    assert visible_files(hf_cache(home)) == WANTED

    server.requests.clear()
    find = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}, local_files_only=True))"
    env = environment(server, home)
    found = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=True, env=env)
    assert found.stdout.strip() == events[-1]["path"]
    shown = glmlocal(server, home, "show", REPO, "--json")
    assert json.loads(shown.stdout)["path"] == events[-1]["path"]
    assert server.requests == []


def test_offline_what_is_here_is_used(server: HubServer, home: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in error_line(glmlocal(server, home, "pull", REPO, HF_HUB_OFFLINE="1"))
    online = glmlocal(server, home, "pull", REPO)
    server.requests.clear()
    offline = glmlocal(server, home, "pull", REPO, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, online.stdout)
    as_json = glmlocal(server, home, "pull", REPO, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(as_json.stdout) == {"event": "done", "path": online.stdout.strip()}
    assert server.requests == []


def test_what_huggingface_hub_downloaded_is_used(server: HubServer, home: Path) -> None:
    load = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r})"
    plainly = environment(server, home) | {"HF_HUB_DISABLE_XET": "1"}  # our hub names a Xet store that it has not
    subprocess.run([sys.executable, "-c", load], capture_output=True, check=True, env=plainly)
    assert json.loads(glmlocal(server, home, "show", REPO, "--json").stdout)["format"] == "safetensors"
    server.forget_served()
    result = glmlocal(server, home, "pull", REPO)
    assert result.returncode == 0, result.stderr
    assert not server.served
    assert "of it here already" in result.stderr


def test_killed_at_any_moment_it_goes_on_and_nothing_half_done_is_visible(server: HubServer, home: Path) -> None:
    """kill -9 at 20 moments; what was in the journal then is not asked for again."""
    rng = random.Random(int(os.environ.get("GLMLOCAL_TEST_SEED", "7")))
    data = rng.randbytes(6_000_000)
    server.add(REPO, FILES | {BIG: data, "b.json": b"{}"})
    kills, kept = 0, {}
    for attempt in range(40):
        server.forget_served()
        if kills < 20:
            server.faults.clear()
            server.fail(BIG, bytes_per_s=rng.choice([60_000, 150_000, 400_000]), times=1000)
        else:
            server.faults.clear()
        process = start_pull(server, home)
        if kills < 20:
            wait_for_request(server, process)
            time.sleep(rng.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=200)
        for begin, end in server.served[BIG]:
            assert all(end <= b or e <= begin for b, e in kept.get(BIG, [])), (attempt, begin, end)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert visible_files(hf_cache(home)) == {}
        assert not list(hf_cache(home).glob("models--*/refs/*"))
        before, kept = kept, {BIG: journalled_of(hf_cache(home), data)}
        assert size(kept) >= size(before)
    assert kills == 20
    assert 0 < size(kept) < len(data)  # the kills fell into the download
    assert visible_files(hf_cache(home)) == WANTED | {BIG: data}


def wait_for_request(server: HubServer, process: subprocess.Popen[bytes]) -> None:
    """Until the large file is being fetched: starting Python takes longer than everything else."""
    number = len(server.requests)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any("/cdn/" in target and BIG in target for _, target, _ in server.requests[number:]):
            return
        time.sleep(0.01)
    raise AssertionError("the pull asked for nothing")


def journalled_of(cache: Path, data: bytes) -> list[tuple[int, int]]:
    """What the journal of one file vouches for."""
    return merged(journalled(cache).get(hashlib.sha256(data).hexdigest(), []))


def size(kept: dict[str, list[tuple[int, int]]]) -> int:
    return sum(end - begin for extents in kept.values() for begin, end in extents)


def test_killed_at_every_step_of_marking_placing_and_publishing(server: HubServer, home: Path) -> None:
    """Each time one step later, from where the last one left it; whoever looks in between finds nothing half done."""
    env, kills = environment(server, home), 0
    for step in range(60):
        command = [sys.executable, "-c", _KILLED_AT_STEP + _PULL_IN_SMALL_RANGES, str(home), str(step), REPO]
        placed = {path.name for path in hf_cache(home).glob("models--*/blobs/*")}
        server.forget_served()
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=200, env=env)
        visible = visible_files(hf_cache(home))
        assert all(WANTED[path] == data for path, data in visible.items())
        if list(hf_cache(home).glob("models--*/refs/*")):
            assert visible == WANTED
        for path, data in WANTED.items():
            if placed & {hashlib.sha256(data).hexdigest(), git_sha1(data)}:
                assert server.served_bytes(path) == 0
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
    assert kills >= 10
    assert visible_files(hf_cache(home)) == WANTED
    assert list(hf_cache(home).glob("models--*/refs/main"))
    assert all(path.suffix == ".unsynced" for path in hf_cache(home).glob("models--*/.glmlocal/*"))


@pytest.mark.parametrize("killed", ["the first", "the second"])
def test_of_two_processes_one_is_killed(killed: str, server: HubServer, home: Path) -> None:
    """The lock of the dead holds nobody up, and the other goes on from the journal."""
    server.fail(BIG, bytes_per_s=60_000, times=1000)
    first = start_pull(server, home)
    wait_for_request(server, first)
    second = start_pull(server, home)
    time.sleep(0.5)
    victim, other = (first, second) if killed == "the first" else (second, first)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=60)
    server.faults.clear()
    _, stderr = other.communicate(timeout=200)
    assert other.returncode == 0, stderr
    assert visible_files(hf_cache(home)) == WANTED


def test_two_processes_at_once_fetch_everything_once(server: HubServer, home: Path) -> None:
    server.fail(BIG, bytes_per_s=50_000, times=100)
    processes = [start_pull(server, home) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert any(b"waiting for another process" in err for _, err in outputs)
    assert server.served_bytes(BIG) == len(FILES[BIG])
    assert visible_files(hf_cache(home)) == WANTED


def test_an_interrupt_says_how_to_go_on(server: HubServer, home: Path) -> None:
    server.fail(BIG, bytes_per_s=50_000, times=1000)
    process = start_pull(server, home)
    wait_for_request(server, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"`glmlocal pull zai-org/GLM-test` goes on from here" in stderr
    assert b"Traceback" not in stderr
    assert visible_files(hf_cache(home)) == {}
    rows = json.loads(glmlocal(server, home, "ls", "--json").stdout)
    assert [(row["name"], row["complete"]) for row in rows] == [(REPO, False)]


def mounted(directory: Path, options: str) -> bool:
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(server: HubServer, home: Path) -> None:
    if not mounted(home, "size=2m"):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        line = error_line(glmlocal(server, home, "pull", REPO))
        assert "is too small" in line
        assert "bytes) are missing" in line
        assert server.served_bytes(BIG) == 0
    finally:
        subprocess.run(["umount", str(home)], check=True)


def fill_up(path: Path) -> None:
    """Leave no byte free on the disk of ``path``."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def test_a_disk_that_fills_up_meanwhile_loses_nothing(server: HubServer, home: Path) -> None:
    if not mounted(home, "size=80m"):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        data = random.Random(3).randbytes(6_000_000)
        server.add(REPO, FILES | {BIG: data})
        server.fail(BIG, bytes_per_s=1_000_000, times=1000)
        process = start_pull(server, home)
        wait_for_request(server, process)
        filler = home / "filler"
        fill_up(filler)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 2
        assert b"is full; free some space and run the same command again" in stderr
        assert b"Traceback" not in stderr
        kept = journalled_of(hf_cache(home), data)
        filler.unlink()
        server.faults.clear()
        server.forget_served()
        assert glmlocal(server, home, "pull", REPO).returncode == 0
        assert all(end <= b or e <= begin for begin, end in server.served[BIG] for b, e in kept)
        assert visible_files(hf_cache(home)) == WANTED | {BIG: data}
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_read_only_cache_is_one_clear_line(server: HubServer, home: Path) -> None:
    if not mounted(home, "size=80m,ro"):
        pytest.skip("cannot mount a read-only tmpfs here")
    try:
        assert "cannot write" in error_line(glmlocal(server, home, "pull", REPO))
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_verify_names_what_is_damaged_and_fetches_just_that(server: HubServer, home: Path) -> None:
    glmlocal(server, home, "pull", REPO)
    whole = glmlocal(server, home, "verify", REPO, "--json")
    assert json.loads(whole.stdout)["damaged"] == []
    blob = next(path for path in hf_cache(home).glob("models--*/blobs/*") if path.stat().st_size == len(FILES[BIG]))
    data = bytearray(blob.read_bytes())
    data[1234] ^= 1
    blob.write_bytes(data)
    server.forget_served()
    result = glmlocal(server, home, "verify", REPO)
    assert result.returncode == 0
    assert f"damaged: {BIG}" in result.stderr
    assert list(server.served) == [BIG]
    assert visible_files(hf_cache(home)) == WANTED
    blob.unlink()
    assert f"missing: {BIG}" in glmlocal(server, home, "verify", REPO).stderr
    assert visible_files(hf_cache(home)) == WANTED
    blob.write_bytes(data)
    offline = glmlocal(server, home, "verify", REPO, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in error_line(offline)
    assert f"damaged: {BIG}" in offline.stderr


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_listed_and_removed(hub: str, server: HubServer, home: Path) -> None:
    assert glmlocal(server, home, "pull", REPO, "--hub", hub, "--limit-rate", "50MB").returncode == 0
    (row,) = json.loads(glmlocal(server, home, "ls", "--json").stdout)
    assert (row["name"], row["hub"], row["format"], row["complete"]) == (REPO, hub, "safetensors", True)
    assert row["bytes"] == sum(map(len, WANTED.values()))
    assert REPO in glmlocal(server, home, "ls").stdout
    assert Path(json.loads(glmlocal(server, home, "show", REPO, "--json").stdout)["path"]) == Path(row["path"])
    assert "give --yes" in error_line(glmlocal(server, home, "rm", REPO, "--hub", hub))
    assert Path(row["path"]).exists()
    assert glmlocal(server, home, "rm", REPO, "--hub", hub, "--yes").returncode == 0
    assert not Path(row["path"]).exists()
    assert json.loads(glmlocal(server, home, "ls", "--json").stdout) == []
    assert "is not on this disk" in error_line(glmlocal(server, home, "rm", REPO, "--hub", hub, "--yes"))


def test_without_pulling_show_reads_headers_only(server: HubServer, home: Path) -> None:
    result = glmlocal(server, home, "show", REPO, "--json")
    facts = json.loads(result.stdout)
    assert facts["problem"] is None
    assert facts["bytes"]["files"] == len(FILES[BIG])
    assert facts["path"] == f"{server.url}/{REPO}"
    assert visible_files(hf_cache(home)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", REPO, "-p", "hi"), "fetch it with `glmlocal pull zai-org/GLM-test`"),
        (("pull", "zai-org/nope"), "does not exist or needs a login"),
        (("pull", "zai-org/GLM-4.5-Ari-FP8"), "did you mean the release GLM-4.5-Air-FP8"),
        (("pull", ""), "name is empty"),
        (("pull", f"{REPO}@v9"), "does not exist at that revision"),
        (("pull", f"{REPO}:Q4_0"), "no GGUF files"),
        (("pull", "https://huggingface.co/a/b"), "is no name of a model"),
        (("pull", "a/b/c"), "is no name of a model"),
        (("pull", REPO, "--limit-rate", "fast"), "cannot read 'fast' as a size"),
        (("pull", REPO, "--limit-rate", "0.5KB"), "at least 1KB"),
        (("pull", REPO, "--connections", "0"), "at least 1"),
        (("pull", REPO, "--connections", "1000"), "64 is the limit"),
        (("pull", REPO, "--revision", "../x"), "is no revision"),
        (("pull", "."), "is on this disk already"),
        (("verify", REPO), "is not on this disk"),
        (("rm", REPO, "--yes"), "is not on this disk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(arguments: tuple[str, ...], message: str, server: HubServer, home: Path) -> None:
    assert message in error_line(glmlocal(server, home, *arguments))


@pytest.mark.parametrize(("answer", "pulled"), [("n", False), ("", True)])
def test_a_person_is_asked(answer: str, pulled: bool, server: HubServer, home: Path) -> None:
    environ = {name: value for name, value in environment(server, home).items() if os.environ.get(name) != value}
    terminal = Terminal([sys.executable, "-m", "glmlocal", "pull", REPO], columns=240, **environ)
    terminal.wait("Fetch it? [Y/n]")
    terminal.type(answer + "\r")
    terminal.wait("snapshots" if pulled else "nothing was fetched")
    assert terminal.end() == 0
    assert visible_files(hf_cache(home)) == (WANTED if pulled else {})


def test_chat_offers_a_person_to_pull(server: HubServer, home: Path) -> None:
    environ = {name: value for name, value in environment(server, home).items() if os.environ.get(name) != value}
    terminal = Terminal([sys.executable, "-m", "glmlocal", "chat", REPO, "-p", "hi"], columns=240, **environ)
    terminal.wait("is not on this disk yet")
    terminal.wait("Fetch it? [Y/n]")
    terminal.type("n\r")
    terminal.wait("fetch it with `glmlocal pull zai-org/GLM-test`")
    assert terminal.end() == 2
    assert visible_files(hf_cache(home)) == {}
