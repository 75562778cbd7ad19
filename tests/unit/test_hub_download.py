"""Downloads from a hub that misbehaves: the right result or one clear line, and no byte twice that need not be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glmlocal.errors import DownloadError
from glmlocal.hub import download, partial, pull, ranges, unsynced
from glmlocal.hub.cache import RepoCache
from glmlocal.hub.download import Progress
from glmlocal.hub.http import NotThere
from glmlocal.hub.listing import Hub
from glmlocal.hub.names import Source
from glmlocal.hub.partial import merged
from hub.pulling import (
    PATIENCE,
    QUICK,
    REPO,
    fetch,
    fetch_twice_at_once,
    huggingface,
    journalled,
    modelscope,
    visible_files,
)
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "glm4_moe"}',
    BIG: random.Random(1).randbytes(1_000_001),
    "tokenizer.json": random.Random(2).randbytes(5000),
    "empty.md": b"",
    "pytorch_model.bin": b"never fetched",
}
WANTED = {path: FILES[path] for path in ("config.json", BIG, "tokenizer.json")}
Connect = Callable[..., Hub]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(token="right") as server:
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "a b 模型" / "hub"


@pytest.fixture(params=["huggingface", "modelscope"])
def connect(request: pytest.FixtureRequest) -> Connect:
    return {"huggingface": huggingface, "modelscope": modelscope}[request.param]


def assert_nothing_is_visible(cache: Path) -> None:
    assert visible_files(cache) == {}
    assert not list(cache.glob("models--*/refs/*"))


def fails(hub: Hub, **more: Any) -> str:
    with pytest.raises(DownloadError) as error:
        fetch(hub, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# What goes well


def test_only_what_is_needed_arrives_and_every_byte_once(server: HubServer, cache: Path, connect: Connect) -> None:
    snapshot = fetch(connect(server, cache))
    assert visible_files(cache) == WANTED
    assert (snapshot / BIG).read_bytes() == FILES[BIG]
    for path, data in WANTED.items():
        assert merged(server.served[path]) == [(0, len(data))]
        assert server.served_bytes(path) == len(data)
    assert len(server.served[BIG]) > 10  # in ranges
    assert all(path.suffix == ".unsynced" for path in RepoCache(cache, REPO).work.glob("*"))


def test_a_second_pull_asks_for_the_listing_and_nothing_else(server: HubServer, cache: Path, connect: Connect) -> None:
    fetch(connect(server, cache))
    before = len(server.requests)
    fetch(connect(server, cache))
    assert all("/api/" in target and "FilePath" not in target for _, target, _ in server.requests[before:])


def test_a_new_revision_fetches_only_what_changed(server: HubServer, cache: Path) -> None:
    first = fetch(huggingface(server, cache))
    server.add(REPO, FILES | {"config.json": b'{"model_type": "glm4_moe", "x": 1}'})
    second = fetch(huggingface(server, cache))
    assert first != second
    assert (first / "config.json").read_bytes() == FILES["config.json"]
    assert server.served_bytes(BIG) == len(FILES[BIG])


def test_the_token_goes_to_the_hub_and_to_nobody_else(server: HubServer, cache: Path) -> None:
    fetch(huggingface(server, cache, "right"))
    with_token = [target for _, target, headers in server.requests if "authorization" in headers]
    without = [target for _, target, headers in server.requests if "authorization" not in headers]
    assert with_token
    assert not any(target.startswith("/cdn/") for target in with_token)
    assert all(target.startswith("/cdn/") for target in without)


def test_the_hub_is_asked_once_where_a_large_file_is(server: HubServer, cache: Path) -> None:
    fetch(huggingface(server, cache), options=replace(QUICK, connections=1))
    assert sum("/resolve/" in target and BIG in target for _, target, _ in server.requests) == 1


def test_progress_ends_with_everything_complete(server: HubServer, cache: Path) -> None:
    seen: list[list[Progress]] = []
    fetch(huggingface(server, cache), on_progress=lambda files: seen.append(list(files)))
    assert all(file.is_complete and file.done_bytes == file.size_bytes for file in seen[-1])
    assert {file.path: file.size_bytes for file in seen[-1]} == {path: len(data) for path, data in WANTED.items()}


def test_the_rate_is_limited_over_all_connections(server: HubServer, cache: Path) -> None:
    start = time.monotonic()
    fetch(huggingface(server, cache), options=replace(QUICK, limit_bytes_per_s=2_000_000))
    assert 0.4 < time.monotonic() - start < 5.0


# What may pass


@pytest.mark.parametrize(
    "fault",
    [
        {"cut_after": 1000},
        {"cut_after": 0},
        {"cut_after": 50_000, "times": 5},
        {"status": 503},
        {"status": 500, "times": 2},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"status": 408},
        {"wrong_range": True},
        {"ignore_range": True, "times": 1000},
        {"ignore_range": True, "after": 3, "times": 1000},
        {"flip_at": 500_000},
        {"flip_at": 0},
        {"flip_at": 1_000_000},
    ],
    ids=str,
)
def test_what_passes_is_tried_again(fault: dict[str, Any], server: HubServer, cache: Path, connect: Connect) -> None:
    server.fail(BIG, **fault)
    fetch(connect(server, cache))
    assert visible_files(cache) == WANTED


def test_retry_after_is_honoured_by_all_connections(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_WAITING", -1.0)  # all of them from the start
    monkeypatch.setattr(ranges, "_LOOK_AT_S", 0.0)
    server.fail(BIG, status=429, headers={"Retry-After": "1"})
    server.fail(BIG, bytes_per_s=50_000, times=8)  # so that the others are still at it
    times: list[float] = []
    server.on_request = lambda handler: times.append(time.monotonic()) if BIG in handler.path else None
    fetch(huggingface(server, cache), options=replace(QUICK, range_bytes=10_000))
    # What was under way when the first was told to wait may still come.
    assert not [when - times[0] for when in times if 0.4 < when - times[0] < 0.95]
    assert times[-1] - times[0] > 0.95


def test_a_server_without_ranges_is_read_once_and_from_the_start(server: HubServer, cache: Path) -> None:
    server.fail(BIG, ignore_range=True)  # found out
    server.fail(BIG, ignore_range=True, cut_after=300_000, times=2)
    server.fail(BIG, ignore_range=True, times=1000)
    fetch(huggingface(server, cache), options=replace(QUICK, connections=1))
    assert visible_files(cache) == WANTED
    whole = [t for _, t, headers in server.requests if "/cdn/" in t and BIG in t and "range" not in headers]
    assert len(whole) == 3


def test_a_server_without_ranges_sends_a_file_once(server: HubServer, cache: Path) -> None:
    server.fail(BIG, ignore_range=True, times=1000)
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED
    assert sum("/cdn/" in t and BIG in t and "range" not in headers for _, t, headers in server.requests) == 1


def test_a_dropped_connection_goes_on_where_it_was(server: HubServer, cache: Path) -> None:
    server.fail(BIG, cut_after=10_000, times=3)
    fetch(huggingface(server, cache))
    assert server.served_bytes(BIG) <= len(FILES[BIG]) + 3 * 65536  # at most what was on its way


def test_patience_is_counted_from_the_last_new_byte(server: HubServer, cache: Path) -> None:
    """More broken connections than attempts, each of which brought something."""
    server.fail(BIG, cut_after=10_000, times=6)
    fetch(huggingface(server, cache), options=replace(QUICK, connections=1, range_bytes=1 << 20))
    assert visible_files(cache) == WANTED


def test_an_expired_address_of_the_cdn_is_asked_for_again(server: HubServer, cache: Path) -> None:
    server.fail(BIG, expired_signature=True, after=3, times=2)
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


def test_a_slow_hub_is_waited_for(server: HubServer, cache: Path) -> None:
    server.fail(BIG, bytes_per_s=100_000, times=2)
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


def test_a_listing_that_fails_once_is_asked_for_again(server: HubServer, cache: Path, connect: Connect) -> None:
    server.fail("api", status=503)
    server.fail("api", status=429, headers={"Retry-After": "0"})
    fetch(connect(server, cache))
    assert visible_files(cache) == WANTED


def test_a_branch_that_moves_meanwhile_does_not_matter_where_commits_stay(server: HubServer, cache: Path) -> None:
    hub = huggingface(server, cache)
    plan = pull.prepare(Source("huggingface", REPO), hub, QUICK)
    server.add(REPO, FILES | {BIG: b"other" * 100_000})
    pull.pull(plan, QUICK)
    assert visible_files(cache) == WANTED


# What does not pass


def test_a_branch_that_moves_where_there_are_no_commits_is_found_out(server: HubServer, cache: Path) -> None:
    hub = modelscope(server, cache)
    plan = pull.prepare(Source("modelscope", REPO), hub, QUICK)
    for content, message in ((b"longer" * 200_000, "master has moved"), (bytes(1_000_001), "master has moved")):
        server.add(REPO, FILES | {BIG: content})
        with pytest.raises(DownloadError, match=message):
            pull.pull(plan, QUICK)
        assert_nothing_is_visible(cache)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"flip_at": 500_000, "times": 2}, "twice with another hash"),
        ({"extra_bytes": 10, "times": 100}, "has moved or the hub is damaged"),
        ({"extra_bytes": -10, "times": 100}, "has moved or the hub is damaged"),
        ({"extra_bytes": 10, "ignore_range": True, "times": 100}, "has moved or the hub is damaged"),
        ({"extra_bytes": -10, "ignore_range": True, "times": 100}, "has moved or the hub is damaged"),
        ({"ignore_range": True, "cut_after": 500_000, "times": 1000}, "tried 3 times"),
        ({"overlong_range": True, "times": 100}, "is served with more bytes"),
        ({"cut_after": 0, "times": 100}, "tried 3 times for model.safetensors"),
        ({"status": 503, "times": 100}, "answers 503"),
        ({"status": 404, "times": 100}, "there is no zai-org/GLM-test/model.safetensors"),
        ({"status": 403, "times": 100}, "may not read"),
        ({"redirect_to_itself": True, "times": 1000}, "redirects in a circle"),
        ({"wrong_range": True, "times": 100}, "another part"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_one_clear_line(
    fault: dict[str, Any], message: str, server: HubServer, cache: Path
) -> None:
    server.fail(BIG, **fault)
    assert message in fails(huggingface(server, cache))
    assert_nothing_is_visible(cache)


def test_a_wrong_small_file_is_found_by_gits_hash(server: HubServer, cache: Path) -> None:
    server.fail("config.json", flip_at=3, times=2)
    assert "config.json" in fails(huggingface(server, cache))
    assert_nothing_is_visible(cache)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "gated: ask for access at .*/zai-org/gated and set HF_TOKEN"),
        ("old", r"refuses your token for zai-org/gated \(expired or revoked\?\); set HF_TOKEN"),
    ],
)
def test_gated_repositories(token: str | None, message: str, server: HubServer, cache: Path) -> None:
    server.add("zai-org/gated", FILES, gated=True)
    source = Source("huggingface", "zai-org/gated")
    with pytest.raises(DownloadError, match=message):
        fetch(huggingface(server, cache, token), source)
    fetch(huggingface(server, cache, "right"), source)
    assert visible_files(cache) == WANTED


def test_gated_on_modelscope(server: HubServer, cache: Path) -> None:
    server.add("zai-org/gated", FILES, gated=True)
    source = Source("modelscope", "zai-org/gated")
    with pytest.raises(DownloadError, match="may not read zai-org/gated"):
        fetch(modelscope(server, cache), source)
    with pytest.raises(DownloadError, match="MODELSCOPE_API_TOKEN"):
        fetch(modelscope(server, cache, "old"), source)
    fetch(modelscope(server, cache, "right"), source)


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        (Source("huggingface", "zai-org/nope"), None, "does not exist or needs a login"),
        (Source("huggingface", "zai-org/nope"), "right", "there is no zai-org/nope"),
        (Source("huggingface", REPO, None, "v9"), None, "does not exist at that revision"),
        (Source("modelscope", "zai-org/nope"), None, "there is no zai-org/nope"),
        (Source("modelscope", REPO, None, "v9"), None, "there is no zai-org/GLM-test@v9"),
    ],
    ids=str,
)
def test_what_is_not_there(source: Source, token: str | None, message: str, server: HubServer, cache: Path) -> None:
    connect = huggingface if source.hub == "huggingface" else modelscope
    with pytest.raises(DownloadError, match=re.escape(message)) as error:
        fetch(connect(server, cache, token), source)
    assert isinstance(error.value, NotThere) == (source.repo_id != REPO or source.hub == "modelscope")


def test_no_network_and_offline_mode(server: HubServer, cache: Path, connect: Connect) -> None:
    assert "HF_HUB_OFFLINE is set" in fails(connect(server, cache, offline=True))
    hub = connect(server, cache)
    nowhere = replace(hub, endpoint="http://127.0.0.1:9")  # type: ignore[type-var]
    assert "cannot reach 127.0.0.1" in fails(nowhere)
    unknown = replace(hub, endpoint="http://no-such-host.invalid")  # type: ignore[type-var]
    assert "cannot reach no-such-host.invalid" in fails(unknown)


def test_a_listing_that_may_be_cut_short_is_not_believed(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmlocal.hub.modelscope._LISTING_LIMIT", len(FILES))
    assert "which ModelScope does not list in full" in fails(modelscope(server, cache))


def test_something_that_is_no_hub(server: HubServer, cache: Path) -> None:
    server.fail("api", status=200)
    assert "check HF_ENDPOINT" in fails(huggingface(server, cache))


def test_a_list_that_goes_on_elsewhere_does_not_get_the_token(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.page_size = 2
    assert len(huggingface(server, cache, "right").list_files(REPO, None).files) == len(FILES)
    monkeypatch.setattr(HubServer, "url", HubServer.cdn)  # what the server says of itself
    hub = replace(huggingface(server, cache, "right"), endpoint=f"http://127.0.0.1:{server.port}")
    before = len(server.requests)
    assert "another host" in fails(hub)
    assert len(server.requests) == before + 2


# Stopped, and gone on with


def overlap(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> int:
    return sum(max(min(a[1], b[1]) - max(a[0], b[0]), 0) for a in merged(left) for b in merged(right))


def test_after_a_failure_nothing_that_was_journalled_is_fetched_again(server: HubServer, cache: Path) -> None:
    server.fail(BIG, cut_after=20_000, after=6, times=1000)
    hub = huggingface(server, cache)
    impatient = replace(QUICK, patience=replace(PATIENCE, attempts=1))
    rounds = 0
    while True:
        kept = [extent for extents in journalled(cache).values() for extent in extents]
        server.forget_served()
        server.faults[BIG][-1].after = 2
        try:
            fetch(hub, options=impatient)
            break
        except DownloadError:
            assert_nothing_is_visible(cache)
        finally:
            assert overlap(kept, server.served[BIG]) == 0
        rounds += 1
        assert rounds < 50
        if rounds == 8:
            server.faults.clear()
    assert rounds > 3
    assert visible_files(cache) == WANTED


def test_an_interrupt_keeps_everything_that_arrived(server: HubServer, cache: Path) -> None:
    server.fail(BIG, bytes_per_s=300_000, times=100)

    def interrupt(files: object) -> None:
        if sum(file.done_bytes for file in files) > 200_000:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(huggingface(server, cache), on_progress=interrupt)
    assert_nothing_is_visible(cache)
    (kept,) = journalled(cache).values()
    assert sum(end - begin for begin, end in merged(kept)) > 150_000
    server.faults.clear()
    server.forget_served()
    fetch(huggingface(server, cache))
    assert overlap(kept, server.served[BIG]) == 0
    assert visible_files(cache) == WANTED


def test_damage_on_this_disk_between_two_attempts_is_found(server: HubServer, cache: Path) -> None:
    server.fail(BIG, cut_after=0, after=8, times=100)
    fails(huggingface(server, cache))
    (data,) = cache.glob("models--*/.glmlocal/*.partial")
    (kept,) = journalled(cache).values()
    with open(data, "r+b") as file:
        file.seek(kept[0][0])
        file.write(bytes([FILES[BIG][kept[0][0]] ^ 255]))
    server.faults.clear()
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


def test_a_file_that_somebody_cuts_meanwhile_is_fetched_again(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are read back after all were written; then there are none."""
    server.fail(BIG, cut_after=0, after=8, times=100)
    fails(huggingface(server, cache))
    server.faults.clear()
    read, cuts = partial.PartialFile.read, list[int]()

    def cut(file: partial.PartialFile, offset: int, out: Any) -> int:
        if not cuts and file.size_bytes == len(FILES[BIG]):
            cuts.append(offset)
            os.truncate(file.path, 0)
        return read(file, offset, out)

    monkeypatch.setattr(partial.PartialFile, "read", cut)
    fetch(huggingface(server, cache))
    assert cuts
    assert visible_files(cache) == WANTED


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EDQUOT, "is full; free some space"),
        (errno.EIO, "cannot store the model in .*: Input/output error"),
        (errno.EFBIG, "cannot store the model in"),
    ],
)
def test_a_disk_that_refuses_is_one_line(
    number: int, message: str, server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "pwrite", refuse)
        assert re.search(message, fails(huggingface(server, cache)))
    assert_nothing_is_visible(cache)
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


@pytest.mark.parametrize("when", [0, 1, 5, 12])
def test_a_disk_that_fills_up_is_one_line_and_can_be_gone_on_with(
    when: int, server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.pwrite, 0

    def full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal count
        count += 1
        if count > when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "pwrite", full)
        assert "is full; free some space and run the same command again" in fails(huggingface(server, cache))
    assert_nothing_is_visible(cache)
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


def test_a_journal_that_cannot_be_written_is_not_believed(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def torn(descriptor: int, data: bytes) -> int:
        if data.startswith(b"{"):
            return write(descriptor, data)
        return write(descriptor, data[:-2])

    with monkeypatch.context() as patch:
        patch.setattr(partial.os, "write", torn)
        server.fail(BIG, bytes_per_s=1_000_000, times=100)
        assert "is full" in fails(huggingface(server, cache))
    server.faults.clear()
    fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "_SPARE_BYTES", 1 << 60)
    assert "bytes) are missing; free some" in fails(huggingface(server, cache))
    assert server.served_bytes(BIG) == 0


def test_one_process_waits_for_the_other_and_fetches_nothing_twice(server: HubServer, cache: Path) -> None:
    server.fail(BIG, bytes_per_s=1_000_000, times=6)
    assert fetch_twice_at_once(server, cache)
    assert server.served_bytes(BIG) == len(FILES[BIG])
    assert visible_files(cache) == WANTED


def test_nobody_waits_for_a_slow_disk(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_sync, slow = threading.Event(), os.fsync

    def busy(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "blobs" in name or name.endswith(".partial"):
            assert may_sync.wait(20)
        slow(descriptor)

    monkeypatch.setattr(download.os, "fsync", busy)
    monkeypatch.setattr(partial.os, "fdatasync", busy)
    snapshot = fetch(huggingface(server, cache))
    assert visible_files(cache) == WANTED
    assert set(unsynced.marks(RepoCache(cache, REPO).work)) == {
        unsynced.Mark(
            RepoCache(cache, REPO).work / f"{digest}.{unsynced.boot_id()}.unsynced", digest, unsynced.boot_id()
        )
        for digest in (os.path.basename(os.readlink(path)) for path in snapshot.iterdir())
    }
    may_sync.set()


def test_marks_go_as_files_reach_the_disk(server: HubServer, cache: Path) -> None:
    """Each in its turn, while others come; never before its file is synced and has its name."""
    files = {f"model-{i:05}-of-00006.safetensors": random.Random(i).randbytes(200_000) for i in range(1, 7)}
    index = json.dumps({"weight_map": {path: path for path in files}}).encode()
    server.add(REPO, {"config.json": b"{}", **files, "model.safetensors.index.json": index})
    for path in files:
        server.fail(path, bytes_per_s=400_000, times=100)
    seen = set[tuple[int, int]]()

    def on_progress(progress: Sequence[Progress]) -> None:
        marks = {mark.digest for mark in unsynced.marks(RepoCache(cache, REPO).work)}
        blobs = {blob.name for blob in cache.glob("models--*/blobs/*")}
        of_shards = {hashlib.sha256(data).hexdigest() for data in files.values()}
        assert of_shards - marks <= blobs  # what is not marked was synced, so it has its name
        seen.add((len(of_shards & blobs), len(of_shards & marks)))

    fetch(huggingface(server, cache), options=replace(QUICK, connections=1), on_progress=on_progress)
    assert (0, 6) in seen
    assert any(placed > 0 and marked < 6 for placed, marked in seen)


def test_where_nothing_can_be_marked_a_file_is_on_disk_before_it_gets_its_name(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    order: list[str] = []
    fsync, rename = os.fsync, os.replace

    def watched(descriptor: int) -> None:
        order.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name[:8])
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        order.append("name " + Path(old).name[:8])
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(unsynced, "mark", refused)
        patch.setattr(partial.os, "fsync", watched)
        patch.setattr(partial.os, "replace", renamed)
        snapshot = fetch(huggingface(server, cache))
    for path in snapshot.iterdir():
        digest = os.path.basename(os.readlink(path))[:8]
        assert order.index(f"sync {digest}") < order.index(f"name {digest}")
    assert visible_files(cache) == WANTED


def test_the_disk_starts_when_enough_has_arrived_not_only_each_second(server: HubServer, cache: Path) -> None:
    server.fail(BIG, bytes_per_s=1_000_000, times=100)  # of each of four connections
    lines: list[int] = []

    def on_progress(files: object) -> None:
        lines.append(sum(len(extents) for extents in journalled(cache, synced=True).values()))

    fetch(
        huggingface(server, cache),
        options=replace(QUICK, sync_every_s=1000, sync_bytes=100_000),
        on_progress=on_progress,
    )
    assert len(set(lines)) > 4  # a verified small file is the occasion for one or two
    assert visible_files(cache) == WANTED


def test_no_thread_is_left_behind(server: HubServer, cache: Path) -> None:
    server.fail(BIG, status=404, times=100)
    fails(huggingface(server, cache))
    names = {thread.name for thread in threading.enumerate() if "work" in thread.name or "_files" in thread.name}
    assert not names
    assert download.DEFAULTS.connections == 8
