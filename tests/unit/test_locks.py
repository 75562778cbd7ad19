"""Locks between processes, and on filesystems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from glmlocal.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from glmlocal.locks import locked
with locked(Path(sys.argv[1]), lambda: print("waiting", flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def next_word(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def no_locks(monkeypatch: pytest.MonkeyPatch, directory: Path, number: int) -> None:
    """As if ``directory`` were on a filesystem without locks."""
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if directory in Path(os.readlink(f"/proc/self/fd/{descriptor}")).parents:
            raise OSError(number, os.strerror(number))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.timeout(60)  # without a word of the wait it would wait for ever
@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_second_process_waits_until_the_first_is_gone(end: str, tmp_path: Path) -> None:
    path = tmp_path / "和 lock"
    first = holder(path)
    assert next_word(first) == "held"
    second = holder(path)
    assert next_word(second) == "waiting"
    if end == "killed":
        first.send_signal(signal.SIGKILL)
    else:
        assert first.stdin is not None
        first.stdin.close()
    assert next_word(second) == "held"
    for process in (first, second):
        process.kill()
        process.wait(20)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
    with locked(path, lambda: pytest.fail("nobody holds it")):
        pass


def test_who_will_not_wait_need_not(tmp_path: Path) -> None:
    def refuse() -> None:
        raise BlockingIOError(errno.EWOULDBLOCK, "held")

    descriptors = len(os.listdir("/proc/self/fd"))
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError, match="held"), locked(tmp_path / "lock", refuse):
        pytest.fail("held twice")
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_processes_of_one_machine_still_wait(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, local = tmp_path / "shared", tmp_path / "local"
    shared.mkdir()
    local.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(local))
    no_locks(monkeypatch, shared, number)
    waited, held = threading.Event(), threading.Event()

    def second() -> None:
        with locked(shared / "a", waited.set):
            held.set()

    thread = threading.Thread(target=second)
    with locked(shared / "a"), locked(shared / "b", lambda: pytest.fail("another lock")):
        thread.start()
        assert waited.wait(10)
        assert not held.is_set()
    thread.join(10)
    assert held.is_set()
    assert len(list(local.iterdir())) == 2


def test_other_errors_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch, tmp_path, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pytest.fail("held")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / "lock"):
        pytest.fail("held")


def test_a_lock_that_is_a_link_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock"):
        pytest.fail("held")
    assert not (tmp_path / "elsewhere").exists()
