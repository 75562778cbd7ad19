"""What may not have reached the disk when the machine went down is hashed before anybody believes it."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from glmlocal.cli.ls import list_models
from glmlocal.errors import DownloadError
from glmlocal.hub import local, partial, pull, unsynced, verify
from glmlocal.hub.cache import RepoCache
from glmlocal.hub.unsynced import boot_id, in_doubt, mark, marks, settle
from hub.pulling import QUICK, REPO, SOURCE, fetch, huggingface, journalled, visible_files
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "glm4_moe"}',
    BIG: random.Random(1).randbytes(300_000),
    "tokenizer.json": random.Random(2).randbytes(5000),
}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "glm"))
    return tmp_path / "hf"


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The machine has been down when this returns."""

    def go_down() -> None:
        monkeypatch.setattr(unsynced, "boot_id", lambda: "another")
        monkeypatch.setattr(partial, "boot_id", lambda: "another")

    return go_down


@pytest.fixture
def pulled(server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch) -> RepoCache:
    """A model of which nothing is surely on disk."""
    with monkeypatch.context() as patch:
        patch.setattr("glmlocal.hub.download._Download._sync_placed", lambda self: None)
        fetch(huggingface(server, caches))
        for thread in threading.enumerate():
            if thread.name == "pull-sync_files":
                thread.join()
    server.forget_served()
    cache = RepoCache(caches, REPO)
    assert len(marks(cache.work)) == len(FILES)
    return cache


def blob_of(cache: RepoCache, path: str) -> Path:
    (link,) = cache.directory.glob(f"snapshots/*/{path}")
    return link.resolve()


def lose_tail(blob: Path) -> None:
    """As ext4 leaves a file whose last blocks were not written: its length is right, and there are zeros."""
    size = blob.stat().st_size
    os.truncate(blob, size // 2)
    os.truncate(blob, size)


def test_the_boot_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    boot_id.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *args: (_ for _ in ()).throw(FileNotFoundError()))
        elsewhere = boot_id()
    boot_id.cache_clear()
    assert elsewhere.startswith("since-1")
    assert unsynced._MARK.fullmatch(f"{'a' * 64}.{elsewhere}.unsynced")


def test_a_mark_is_on_disk_before_the_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[Path, int]] = []
    monkeypatch.setattr(unsynced, "sync", lambda path: order.append((path, len(list(path.iterdir())))))
    directory = tmp_path / "models--a--b" / ".glmlocal"
    made = mark(directory, ["a" * 64, "b" * 40])
    assert order == [(directory, 2), (directory.parent, 1), (tmp_path, 1)]
    assert marks(directory) == made
    assert mark(directory, ["a" * 64]) == made[:1]  # again, by the next attempt


def test_a_mark_is_not_made_through_a_link(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{'a' * 64}.{boot_id()}.unsynced").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        mark(work, ["a" * 64])
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "name", ["x.unsynced", f"{'a' * 64}.unsynced", f"{'A' * 64}.boot.unsynced", f"{'a' * 64}.partial"]
)
def test_what_is_no_mark_of_ours_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert marks(tmp_path) == []


@pytest.mark.parametrize("boot", ["", "x", "..", "é", "a.b"])
def test_a_mark_with_a_strange_boot_is_a_doubt(boot: str, pulled: RepoCache) -> None:
    for each in marks(pulled.work):
        each.path.rename(pulled.work / f"{each.digest}.{boot}.unsynced")
    assert len(in_doubt(pulled)) == len(FILES)
    assert settle(pulled) == []
    assert marks(pulled.work) == []


def test_in_the_same_boot_nothing_is_hashed(pulled: RepoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsynced, "has_digest", lambda *args: pytest.fail("hashed"))
    assert local.find(SOURCE).path.is_dir()
    assert len(marks(pulled.work)) == len(FILES)  # too young: an fsync might take long
    assert not any(row.get("in_doubt") for row in list_models())


def test_what_the_kernel_has_written_meanwhile_is_no_longer_marked(
    pulled: RepoCache, monkeypatch: pytest.MonkeyPatch, reboot: Callable[[], None]
) -> None:
    order: list[Path] = []
    monkeypatch.setattr(unsynced, "sync", order.append)
    blob = blob_of(pulled, BIG)
    os.utime(blob, (0, time.time() - 61))
    local.find(SOURCE)
    assert order == [blob, blob.parent]
    assert {each.digest for each in marks(pulled.work)} == {blob_of(pulled, path).name for path in FILES if path != BIG}
    reboot()
    assert blob.name not in in_doubt(pulled)


def grow_old(cache: RepoCache) -> None:
    """All of its files were written long ago."""
    for path in FILES:
        os.utime(blob_of(cache, path), (0, time.time() - 61))


def test_when_no_mark_is_left_neither_is_their_directory(pulled: RepoCache) -> None:
    grow_old(pulled)
    local.find(SOURCE)
    assert not pulled.work.exists()


def test_the_marks_of_a_pull_that_goes_on_are_left_to_it(pulled: RepoCache) -> None:
    grow_old(pulled)
    with pulled.locked():
        local.find(SOURCE)
        assert len(marks(pulled.work)) == len(FILES)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_directory_that_cannot_be_synced(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network filesystems have no such thing; a disk that fails is another matter."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(unsynced.os, "fsync", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            unsynced.sync(tmp_path)
    else:
        unsynced.sync(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("what", ["locked", "unlink"])
def test_a_disk_that_fails_while_the_doubt_is_settled_is_an_error(
    what: str, pulled: RepoCache, reboot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    reboot()
    with monkeypatch.context() as patch:
        patch.setattr(RepoCache if what == "locked" else Path, what, broken)
        with pytest.raises(OSError, match="Input/output"):
            settle(pulled)
    assert len(in_doubt(pulled)) == len(FILES)


def test_after_a_restart_intact_files_are_hashed_once(
    pulled: RepoCache, reboot: Callable[[], None], capsys: pytest.CaptureFixture[str], server: HubServer
) -> None:
    reboot()
    (row,) = list_models()
    assert row["in_doubt"] is True
    assert row["complete"] is True
    assert local.find(SOURCE).path.is_dir()
    assert "went down while 3 files" in capsys.readouterr().err
    assert not pulled.work.exists() or not marks(pulled.work)
    assert local.find(SOURCE).path.is_dir()
    assert capsys.readouterr().err == ""
    assert not any(row.get("in_doubt") for row in list_models())
    assert not server.served


@pytest.mark.parametrize("path", [BIG, "config.json"])
@pytest.mark.parametrize("by", ["find", "pull", "verify"])
def test_a_file_that_lost_its_tail_is_not_believed_and_fetched_again(
    by: str,
    path: str,
    server: HubServer,
    pulled: RepoCache,
    reboot: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lose_tail(blob_of(pulled, path))
    reboot()
    match by:
        case "find":
            with pytest.raises(local.NotPulled, match="not whole; fetch it with `glmlocal pull"):
                local.find(SOURCE)
        case "verify":
            assert verify.kept_files(SOURCE).missing == (path,)
    fetch(huggingface(server, pulled.cache_dir))
    assert f"damaged: {path}" in capsys.readouterr().err
    assert list(server.served) == [path]
    assert visible_files(pulled.cache_dir) == FILES


def test_a_file_that_is_gone_is_no_doubt(pulled: RepoCache, reboot: Callable[[], None]) -> None:
    blob_of(pulled, BIG).unlink()
    reboot()
    assert settle(pulled) == []
    assert marks(pulled.work) == []


def test_a_kill_while_checking_leaves_the_doubt(
    pulled: RepoCache, reboot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_tail(blob_of(pulled, BIG))
    reboot()
    unlink, removed = Path.unlink, []

    def killed(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            settle(pulled)
    assert [path.parent.name for path in removed] == ["blobs"]
    assert len(in_doubt(pulled)) == len(FILES)
    assert settle(pulled) == []  # gone, and the others are right


def test_in_a_cache_that_cannot_be_written_the_damage_is_named_each_time(
    pulled: RepoCache, reboot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_tail(blob_of(pulled, BIG))
    reboot()

    def refused(*args: object, **more: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(RepoCache, "locked", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        with pytest.raises(local.NotPulled, match="damaged"):
            local.find(SOURCE)


def test_nobody_waits_for_a_pull_that_has_settled_the_doubt_itself(
    pulled: RepoCache, reboot: Callable[[], None]
) -> None:
    reboot()
    waited = threading.Event()
    with pulled.locked():
        thread = threading.Thread(target=settle, args=(pulled, waited.set))
        thread.start()
        assert waited.wait(10)
        unsynced.settle_locked(pulled)
        thread.join(10)  # while the lock is still held
        assert not thread.is_alive()


def test_after_a_restart_only_what_was_synced_is_not_fetched_again(
    server: HubServer, caches: Path, reboot: Callable[[], None]
) -> None:
    hub = huggingface(server, caches)
    server.fail(BIG, bytes_per_s=200_000, times=1000)

    def stop(files: object) -> None:
        synced, noted = (sum(e - b for b, e in journalled(caches, synced=s).get(big, [])) for s in (True, False))
        if 20_000 < synced < noted - 20_000:
            raise KeyboardInterrupt

    big = next(f.digest for f in pull.prepare(SOURCE, hub, QUICK).selection.files if f.path == BIG)
    with pytest.raises(KeyboardInterrupt):
        fetch(hub, options=QUICK, on_progress=stop)
    synced = partial.merged(journalled(caches, synced=True)[big])
    (data,) = caches.glob(f"models--*/.glmlocal/{big}.partial")
    with open(data, "r+b") as file:  # what was not synced is lost
        for begin, end in partial.gaps(synced, len(FILES[BIG])):
            file.seek(begin)
            file.write(bytes(end - begin))
    reboot()
    server.faults.clear()
    server.forget_served()
    fetch(hub)
    assert visible_files(caches) == FILES
    again = partial.merged(server.served[BIG])
    assert again == partial.gaps(synced, len(FILES[BIG]))
    assert server.served_bytes(BIG) == sum(end - begin for begin, end in again)


def test_marks_come_before_names_and_go_after_syncs(
    server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, str]] = []
    replace_, fsync, sync, unlink = os.replace, os.fsync, unsynced.sync, Path.unlink

    def renamed(old: Path, new: Path) -> None:
        if new.parent.name == "blobs":
            assert new.name in {each.digest for each in marks(RepoCache(caches, REPO).work)}
            order.append(("name", new.name))
        replace_(old, new)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        order.append(("file", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def synced_directory(path: Path) -> None:
        sync(path)
        order.extend(("directory", blob.name) for blob in path.iterdir() if path.name == "blobs")

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".unsynced":
            order.append(("mark", path.name.split(".")[0]))
        unlink(path, missing_ok)

    files = {f"model-{i:05}-of-00004.safetensors": random.Random(i).randbytes(100_000) for i in range(1, 5)}
    index = json.dumps({"weight_map": {path: path for path in files}}).encode()
    server.add(REPO, {"config.json": b"{}", **files, "model.safetensors.index.json": index})
    for path in files:
        server.fail(path, bytes_per_s=300_000, times=100)
    monkeypatch.setattr(partial.os, "replace", renamed)
    monkeypatch.setattr(partial.os, "fsync", synced)
    monkeypatch.setattr(unsynced, "sync", synced_directory)
    monkeypatch.setattr(Path, "unlink", unlinked)
    fetch(huggingface(server, caches), options=replace(QUICK, connections=1))
    gone = [digest for what, digest in order if what == "mark"]
    assert len(gone) > 2
    for digest in gone:
        places = [order.index((what, digest)) for what in ("name", "file", "directory", "mark")]
        assert places == sorted(places)


def test_a_disk_that_refuses_to_sync_is_an_error_and_the_mark_stays(
    server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(partial.os, "fdatasync", broken)
    server.fail(BIG, bytes_per_s=500_000, times=1000)
    with pytest.raises(DownloadError, match="Input/output error"):
        fetch(huggingface(server, caches))
    assert visible_files(caches) == {}
