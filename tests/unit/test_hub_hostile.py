"""Hubs, networks and caches that mean harm: one clear line, nothing outside the cache, no token for others."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmlocal.errors import DownloadError
from glmlocal.hub import http as hub_http
from glmlocal.hub.cache import RepoCache, remove, snapshot_files
from glmlocal.hub.listing import Hub
from glmlocal.hub.names import Source
from glmlocal.hub.unsynced import boot_id
from hub import server as hub_server
from hub.pulling import PATIENCE, REPO, fetch, fetch_twice_at_once, huggingface, modelscope, visible_files
from hub.server import HubServer

BIG = "model.safetensors"
FILES = {"config.json": b'{"model_type": "glm4_moe"}', BIG: bytes(range(256)) * 500}
Connect = Callable[..., Hub]
Entries = list[dict[str, Any]]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(token="right") as server:
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "outside.txt").write_text("mine")
    return tmp_path / "cache" / "hub"


@pytest.fixture(params=["huggingface", "modelscope"])
def connect(request: pytest.FixtureRequest) -> Connect:
    return {"huggingface": huggingface, "modelscope": modelscope}[request.param]


def refused(hub: Hub, cache: Path) -> str:
    """The one line; nothing has become visible, and nothing has changed outside the cache."""
    with pytest.raises(DownloadError) as error:
        fetch(hub)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert visible_files(cache) == {}
    outside = [path for path in cache.parents[1].rglob("*") if cache not in path.parents]
    assert sorted(path.name for path in outside) == ["cache", "hub", "outside.txt"] or sorted(
        path.name for path in outside
    ) == ["outside.txt"]
    assert (cache.parents[1] / "outside.txt").read_text() == "mine"
    return line


def rewritten(change: Callable[[Entries], Any]) -> Callable[[Any], Any]:
    """For ``HubServer.rewrite``: another list of files, in the shape of either hub."""

    def rewrite(answer: Any) -> Any:
        if isinstance(answer, list):
            return change(answer)
        if isinstance(answer, dict) and isinstance(answer.get("Data"), dict):
            return answer | {"Data": {"Files": change(answer["Data"]["Files"])}}
        return answer

    return rewrite


def with_file(path: Any, **more: Any) -> Callable[[Any], Any]:
    """One file more, of a name that either hub would give it."""
    extra = {"type": "file", "oid": "a" * 40, "size": 3, "path": path}
    extra |= {"Path": path, "Type": "blob", "Size": 3, "Sha256": "a" * 64}
    return rewritten(lambda entries: [*entries, extra | more])


@pytest.mark.parametrize(
    "path",
    [
        "../outside.txt",
        "a/../../outside.txt",
        "/etc/passwd",
        "//host/share",
        "..",
        ".",
        "",
        "a//b",
        "a\\..\\..\\outside.txt",
        "C:\\outside.txt",
        "a\x00b",
        "a\nb",
        "\x1b[2J",
        "\x9b2J",
        "\u202egpj.exe",
        "\u2028",
        "\ud800",
        "x" * 300,
        "ü" * 200,
        "/".join(["x" * 100] * 40),
        None,
        5,
        ["a"],
        {"a": 1},
        True,
    ],
    ids=ascii,
)
def test_names_that_are_not_safe(path: Any, connect: Connect, server: HubServer, cache: Path) -> None:
    server.rewrite = with_file(path)
    refused(connect(server, cache), cache)


@pytest.mark.parametrize(
    "size", [-1, 1 << 60, 10**400, 1.5, float("nan"), float("inf"), "3", None, True, [3]], ids=repr
)
def test_sizes_that_cannot_be(size: Any, connect: Connect, server: HubServer, cache: Path) -> None:
    server.rewrite = with_file("a.json", size=size, Size=size)
    refused(connect(server, cache), cache)


@pytest.mark.parametrize("digest", ["", "a" * 39, "A" * 64, "../" + "a" * 61, "a" * 63 + "\n", None, 7, ["a" * 64]])
def test_hashes_that_cannot_be(digest: Any, connect: Connect, server: HubServer, cache: Path) -> None:
    server.rewrite = with_file("a.json", oid=digest, Sha256=digest)
    refused(connect(server, cache), cache)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"7",
        b'"text"',
        b"[1, null, [], {}]",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b"\xff\xfe\x00",
        b"<html>log in</html>",
        b'{"sha": "../../x", "Code": 200, "Data": "text"}',
        b'{"sha": 5, "Code": "\x1b[2J", "Message": {"a": "\\u001b[2J"}}',
        b'{"sha": "\\u001b[2J", "Code": 500, "Message": "\\u001b[2J\\n\\u202e"}',
        b'{"sha": "%s", "Code": 200, "Data": {"Files": {"a": 1}}}' % (b"a" * 40),
        b'{"sha": "%s", "Code": 200, "Data": {"Files": [1, null, []]}}' % (b"a" * 40),
    ],
    ids=lambda body: repr(body[:30]),
)
def test_answers_that_are_no_listing(body: bytes, connect: Connect, server: HubServer, cache: Path) -> None:
    server.rewrite = lambda answer: body
    refused(connect(server, cache), cache)


def test_a_list_that_never_ends(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that lead to themselves; the number of requests has an end, and so has that of files in one page."""
    send = hub_server._Handler._json

    def circular(handler: Any, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        following = {"Link": f'<{server.url}{handler.path}>; rel="next"'} if "/tree/" in handler.path else {}
        send(handler, value, {**(headers or {}), **following}, status)

    monkeypatch.setattr(hub_server._Handler, "_json", circular)
    assert "goes on after 400 files" in refused(huggingface(server, cache), cache)
    assert len(server.requests) == 201
    monkeypatch.setattr("glmlocal.hub.huggingface._MAX_FILES", 7)
    assert "goes on after 8 files" in refused(huggingface(server, cache), cache)
    assert len(server.requests) == 201 + 5


def test_a_list_of_more_bytes_than_any_has(connect: Connect, server: HubServer, cache: Path) -> None:
    server.rewrite = lambda answer: b" " * (65 << 20)
    assert "sends more than the 67,108,864 bytes expected" in refused(connect(server, cache), cache)


def test_an_answer_that_drips_has_an_end(
    connect: Connect, server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(handler: Any, value: Any, headers: Any = None, status: int = 200) -> None:
        handler._head(200, {"Content-Length": "1000000"})
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.01)

    monkeypatch.setattr(hub_server._Handler, "_json", drip)
    monkeypatch.setattr("glmlocal.hub.http._MAX_ANSWER_S", 0.2)
    assert "has not ended its answer" in refused(connect(server, cache), cache)


# Redirects


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "data:application/json,[]",
        "http://[",
        "http:///",
        "//",
        "\x7f",
        "/a b",
    ],
)
def test_redirects_of_the_list_to_nowhere(location: str, connect: Connect, server: HubServer, cache: Path) -> None:
    server.redirect = lambda handler: location if handler.path.startswith("/api/") else None
    refused(connect(server, cache, "right"), cache)
    assert len(server.requests) < 10


def test_redirects_of_the_list_in_a_circle(connect: Connect, server: HubServer, cache: Path) -> None:
    server.redirect = lambda handler: handler.path + "&again=1"
    assert "redirects in a circle" in refused(connect(server, cache), cache)
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("connect", "what"),
    [(huggingface, "/api/"), (huggingface, "/resolve/"), (modelscope, "Recursive"), (modelscope, "FilePath")],
)
def test_another_host_is_not_shown_the_token(what: str, connect: Connect, server: HubServer, cache: Path) -> None:
    """Whatever of the hub is redirected: there as well as on the way back."""

    def redirect(handler: Any) -> str | None:
        is_home = handler.headers["Host"].startswith("127.0.0.1")
        if what not in handler.path or "back=1" in handler.path or not is_home:
            return f"{server.url}{handler.path}&back=1" if "?away=1" in handler.path and not is_home else None
        return f"{server.cdn}{handler.path}{'&' if '?' in handler.path else '?'}away=1"

    server.redirect = redirect
    fetch(connect(server, cache, "right"))
    assert visible_files(cache) == FILES
    away = [headers for _, _, headers in server.requests if headers["host"].startswith("localhost")]
    assert away
    assert not any({"authorization", "cookie"} & headers.keys() for headers in away)


def test_from_https_nothing_leads_to_http(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": "http://hub.example/again"})

    client = hub_http.new_client(PATIENCE)
    client._transport = httpx.MockTransport(answer)
    client._mounts = {}
    with client, pytest.raises(DownloadError, match=r"http://hub\.example/again .*not https"):
        hub_http.get_bytes(client, "https://hub.example/api", {}, lambda response: None, 100)
    assert asked == ["https://hub.example/api"]
    for scheme, target in (("http", "http://a"), ("http", "https://a"), ("https", "https://a")):
        hub_http.refuse_downgrade(scheme, httpx.URL(target))


# Caches


def test_without_locks_two_pulls_fetch_everything_once(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS without lockd, or on Lustre."""
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if cache in Path(os.readlink(f"/proc/self/fd/{descriptor}")).parents:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    server.fail(BIG, bytes_per_s=500_000, times=2)
    assert fetch_twice_at_once(server, cache)
    assert server.served_bytes(BIG) == len(FILES[BIG])
    assert visible_files(cache) == FILES


@pytest.mark.parametrize("suffix", [".partial", ".journal", f".{boot_id()}.unsynced"])
def test_links_among_the_partial_files_are_not_followed(suffix: str, server: HubServer, cache: Path) -> None:
    """Who shares a cache with us cannot have us write into files of ours that he names."""
    digest = hashlib.sha256(FILES[BIG]).hexdigest()
    work = RepoCache(cache, REPO).work
    work.mkdir(parents=True)
    mine = cache.parents[1] / "outside.txt"
    hub = huggingface(server, cache)
    if suffix.endswith(".unsynced"):  # then a file is synced before it gets its name
        (work / (digest + suffix)).symlink_to(mine.with_name("made by us"))
        fetch(hub)
        assert visible_files(cache) == FILES
        assert not mine.with_name("made by us").exists()
    else:
        (work / (digest + suffix)).symlink_to(mine)
        assert "symbolic links" in refused(hub, cache)
    assert mine.read_text() == "mine"


def test_a_snapshot_that_leads_out_of_the_cache_is_not_written_through(server: HubServer, cache: Path) -> None:
    server.add("org/name", {"sub/X-Q4_0.gguf": FILES[BIG]})
    hub, source = huggingface(server, cache), Source("huggingface", "org/name")
    listing = hub.list_files("org/name", None)
    outside = cache.parents[1] / "directory"
    outside.mkdir()
    (outside / "X-Q4_0.gguf").write_text("mine")
    snapshot = RepoCache(cache, "org/name").snapshot(listing.commit)
    snapshot.mkdir(parents=True)
    (snapshot / "sub").symlink_to(outside)
    with pytest.raises(DownloadError, match="leads out of it"):
        fetch(hub, source)
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
    assert not list(cache.glob("models--*/refs/*"))


def test_a_link_to_no_blob_has_no_hash_to_be_checked_with(server: HubServer, cache: Path) -> None:
    snapshot = fetch(huggingface(server, cache))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(cache.parents[1] / "outside.txt")
    assert {file.path: file.digest for file in snapshot_files(snapshot)} == {
        "config.json": "",
        BIG: hashlib.sha256(FILES[BIG]).hexdigest(),
    }


@pytest.mark.parametrize("target", ["outside.txt", "..", "."])
def test_links_of_a_snapshot_to_elsewhere_are_put_right(target: str, server: HubServer, cache: Path) -> None:
    hub = huggingface(server, cache)
    snapshot = fetch(hub)
    link = snapshot / "config.json"
    link.unlink()
    link.symlink_to(cache.parents[1] / target)
    fetch(hub)
    assert visible_files(cache) == FILES
    assert (cache.parents[1] / "outside.txt").read_text() == "mine"


def test_removing_a_repository_that_is_a_link_to_another_disk(server: HubServer, cache: Path, tmp_path: Path) -> None:
    """Its files go, what others keep beside them does not."""
    snapshot = fetch(huggingface(server, cache))
    repository, disk = RepoCache(cache, REPO), tmp_path / "disk"
    repository.directory.rename(disk)
    (disk / "notes.txt").write_text("mine")
    repository.directory.symlink_to(disk)
    assert remove(repository, [snapshot / path for path in FILES]) >= len(FILES[BIG])
    assert [path.name for path in disk.iterdir()] == ["notes.txt"]
    assert not os.path.lexists(repository.directory)


@pytest.mark.parametrize("part", ["blobs", "snapshots", ".glmlocal"])
def test_removing_follows_no_link_out_of_a_repository(part: str, server: HubServer, cache: Path) -> None:
    snapshot = fetch(huggingface(server, cache))
    repository, outside = RepoCache(cache, REPO), cache.parents[1] / "directory"
    if (repository.directory / part).exists():
        shutil.rmtree(repository.directory / part)
    outside.mkdir()
    (outside / "x").write_text("mine")
    (repository.directory / part).symlink_to(outside)
    remove(repository, [snapshot / path for path in FILES])
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
    assert not repository.directory.exists()
