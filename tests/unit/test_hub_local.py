"""The cache's layout, what of it is found without a network, and what is removed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache

import crafted
from glmlocal.catalogue import Family
from glmlocal.cli.main import main
from glmlocal.errors import ConfigError, DownloadError
from glmlocal.hub import local, pull, unsynced, verify
from glmlocal.hub.cache import RepoCache, remove, snapshot_files
from glmlocal.hub.known import list_releases
from glmlocal.hub.names import Source
from glmlocal.resolve import resolve
from hub.pulling import QUICK, fetch, huggingface, modelscope
from hub.server import HubServer

ST, GGUF = "zai-org/GLM-ST", "unsloth/GLM-GGUF"
TENSORS = crafted.tiny_tensors(crafted.TINY)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    release = crafted.write_checkpoint(tmp_path / "release", crafted.TINY, TENSORS, shards=3)
    gguf = crafted.tiny_gguf(crafted.TINY, TENSORS).encode()
    with HubServer() as server:
        server.add(ST, {path.name: path.read_bytes() for path in release.iterdir()} | {"tokenizer.json": b"{}"})
        server.add(GGUF, {"X-F32.gguf": gguf, "sub/X-Q8_0-00001-of-00001.gguf": gguf[::-1], "config.json": b"{}"})
        yield server


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "glm"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf"


def test_a_sharded_release_arrives_whole_and_opens_by_name(server: HubServer, caches: Path) -> None:
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    assert resolve(ST) == snapshot
    assert local.find(Source("huggingface", ST)).selection.size_bytes == sum(
        f.size_bytes for f in snapshot_files(snapshot)
    )
    assert (caches / "models--zai-org--GLM-ST" / "refs" / "main").read_text() == snapshot.name


def test_links_are_relative_and_other_tools_agree(server: HubServer, caches: Path) -> None:
    fetch(huggingface(server, caches), Source("huggingface", ST))
    fetch(huggingface(server, caches), Source("huggingface", GGUF, "Q8_0"))
    for repo in scan_cache_dir(caches).repos:
        (revision,) = repo.revisions
        assert all(not os.readlink(file.file_path).startswith("/") for file in revision.files)
        assert revision.refs == {"main"}
    assert not scan_cache_dir(caches).warnings
    found = try_to_load_from_cache(GGUF, "sub/X-Q8_0-00001-of-00001.gguf", cache_dir=caches)
    assert isinstance(found, str)
    assert Path(found).is_file()


def test_quantizations_are_pulled_and_found_one_by_one(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    first = fetch(hub, Source("huggingface", GGUF, "F32"))
    assert first.name == "X-F32.gguf"
    assert resolve(GGUF) == resolve(f"{GGUF}:f32") == first
    with pytest.raises(local.NotPulled, match=r"glmlocal pull unsloth/GLM-GGUF:Q8_0"):
        resolve(f"{GGUF}:Q8_0")
    second = fetch(hub, Source("huggingface", GGUF, "Q8_0"))
    assert resolve(f"{GGUF}:Q8_0") == second
    with pytest.raises(ConfigError, match="several models"):
        resolve(GGUF)
    assert {str(model.source) for model in local.models()} == {f"{GGUF}:F32", f"{GGUF}:Q8_0"}


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_snapshot_that_is_not_whole_is_not_found(lost: str, server: HubServer, caches: Path) -> None:
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    (snapshot / lost).resolve().unlink()  # the link stays
    with pytest.raises(local.NotPulled, match=r"is on this disk, but not whole; fetch it with `glmlocal pull"):
        resolve(ST)
    assert list(local.models()) == []
    fetch(huggingface(server, caches), Source("huggingface", ST))
    assert resolve(ST) == snapshot


def test_revisions_are_kept_apart(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    old = fetch(hub, Source("huggingface", ST))
    files = server.repos[ST].commits[old.name]
    server.add(ST, files | {"tokenizer.json": b'{"new": 1}'}, ref="v2/x")
    new = fetch(hub, Source("huggingface", ST, revision="v2/x"))
    assert resolve(ST) == resolve(f"{ST}@main") == resolve(f"{ST}@{old.name}") == old
    assert resolve(f"{ST}@v2/x") == new != old
    with pytest.raises(local.NotPulled):
        resolve(f"{ST}@v3")


def test_of_commits_without_a_branch_the_newest_is_the_model(server: HubServer, caches: Path) -> None:
    hub, snapshots = huggingface(server, caches), list[Path]()
    for number in range(3):
        commit = server.add(ST, next(iter(server.repos[ST].commits.values())) | {"tokenizer.json": b"%d" % number})
        snapshots.append(fetch(hub, Source("huggingface", ST, revision=commit)))
    for age_s, snapshot in ((10, snapshots[0]), (0, snapshots[1]), (20, snapshots[2])):
        os.utime(snapshot, (0, time.time() - age_s))
    assert resolve(ST) == snapshots[1]


def test_a_blob_of_another_length_is_fetched_again(server: HubServer, caches: Path) -> None:
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    config = (snapshot / "config.json").read_bytes()
    os.truncate((snapshot / "config.json").resolve(), 5)
    server.forget_served()
    assert fetch(huggingface(server, caches), Source("huggingface", ST)) == snapshot
    assert (snapshot / "config.json").read_bytes() == config
    assert list(server.served) == ["config.json"]


def test_what_a_kill_left_goes_with_the_next_pull(server: HubServer, caches: Path) -> None:
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    cache = RepoCache(caches, ST)
    cache.work.mkdir(exist_ok=True)
    digest = (snapshot / "config.json").resolve().name
    (cache.work / "new").symlink_to("nowhere")
    for name in (f"{digest}.partial", f"{digest}.journal", "0" * 64 + ".partial", "0" * 64 + ".boot.unsynced"):
        (cache.work / name).touch()
    assert {path.name for path in cache.leftovers()} == {
        "new",
        f"{digest}.partial",
        f"{digest}.journal",
        "0" * 64 + ".boot.unsynced",
    }
    server.add(ST, server.repos[ST].commits[snapshot.name] | {"tokenizer.json": b'{"new": 1}'})
    fetch(huggingface(server, caches), Source("huggingface", ST))
    assert cache.leftovers() == []
    assert (cache.work / ("0" * 64 + ".partial")).exists()


def test_a_branch_that_moves_to_what_is_here_already_is_noted(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    old = fetch(hub, Source("huggingface", ST))
    commit = server.add(ST, server.repos[ST].commits[old.name] | {"tokenizer.json": b'{"new": 1}'})
    server.repos[ST].refs["main"] = old.name
    new = fetch(hub, Source("huggingface", ST, revision=commit))
    assert resolve(ST) == old
    assert [ref.name for ref in (caches / "models--zai-org--GLM-ST" / "refs").iterdir()] == ["main"]
    server.repos[ST].refs["main"] = commit
    assert fetch(hub, Source("huggingface", ST)) == new
    assert resolve(ST) == new


def test_a_quantization_of_before_the_branch_moved_is_still_the_model(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    old = fetch(hub, Source("huggingface", GGUF, "F32"))
    server.add(GGUF, server.repos[GGUF].commits[old.parent.name] | {"README.md": b"new"})
    new = fetch(hub, Source("huggingface", GGUF, "Q8_0"))
    assert old.parent != new.parent.parent
    assert resolve(f"{GGUF}:F32") == old
    assert resolve(f"{GGUF}:Q8_0") == new
    with pytest.raises(local.NotPulled):
        resolve(f"{GGUF}:F32@main")


def test_what_is_there_needs_no_writable_cache(
    server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    monkeypatch.setattr(RepoCache, "locked", lambda *args: pytest.fail("wanted to write"))
    assert fetch(huggingface(server, caches), Source("huggingface", ST)) == snapshot


def test_nothing_of_the_hub_imports_torch() -> None:
    modules = [
        "cache",
        "download",
        "headers",
        "known",
        "local",
        "modelscope",
        "names",
        "partial",
        "pull",
        "select",
        "verify",
    ]
    imports = "; ".join(f"import glmlocal.hub.{module}" for module in modules)
    check = f"{imports}; import glmlocal.cli.pull, glmlocal.cli.ls, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_modelscope_has_a_cache_of_its_own(server: HubServer, caches: Path, tmp_path: Path) -> None:
    source = Source("modelscope", ST)
    snapshot = fetch(modelscope(server, local.cache_dir("modelscope")), source)
    assert tmp_path / "glm" in snapshot.parents
    assert not caches.exists()
    assert resolve(ST) == snapshot


def test_verifying_one_quantization_does_not_mind_the_other(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    first = fetch(hub, Source("huggingface", GGUF, "F32"))
    second = fetch(hub, Source("huggingface", GGUF, "Q8_0"))
    first.resolve().unlink()
    kept = verify.kept_files(Source("huggingface", GGUF, "Q8_0"))
    assert (kept.missing, [file.path for file in kept.files]) == ((), ["sub/X-Q8_0-00001-of-00001.gguf"])
    hashed: list[int] = []
    assert verify.damaged(kept, hashed.append) == []
    assert hashed[-1] == kept.size_bytes
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.resolve().write_bytes(data)
    (damaged,) = verify.damaged(kept)
    verify.discard(kept, [damaged])
    assert not second.exists()


@pytest.mark.parametrize(("hub", "is_commit"), [("huggingface", True), ("modelscope", False)])
def test_what_is_not_whole_is_repaired_from_where_it_came(
    hub: str, is_commit: bool, server: HubServer, caches: Path
) -> None:
    """A commit of Hugging Face's; ModelScope has none that could be asked for again."""
    connect, source = {"huggingface": huggingface, "modelscope": modelscope}[hub], Source(hub, ST)  # type: ignore[arg-type]
    snapshot = fetch(connect(server, local.cache_dir(source.hub)), source)
    assert verify.kept_files(source).missing == ()
    shard = snapshot / "model-00002-of-00003.safetensors"
    shard.resolve().unlink()
    kept = verify.kept_files(source)
    assert kept.missing == (shard.name,)
    assert kept.revision == (snapshot.name if is_commit else None)
    shard.unlink()
    (missing,) = verify.kept_files(source).missing  # the link too is gone: it is found by the index
    assert shard.name in missing


def test_damaged_files_are_removed_under_the_lock(server: HubServer, caches: Path) -> None:
    fetch(huggingface(server, caches), Source("huggingface", ST))
    kept = verify.kept_files(Source("huggingface", ST))
    blob = kept.cache.blob(kept.files[0])
    thread = threading.Thread(target=verify.discard, args=(kept, kept.files[:1]))
    with kept.cache.locked():
        thread.start()
        thread.join(0.2)
        assert blob.exists()
    thread.join(10)
    assert not blob.exists()


def test_copies_without_a_hash_are_named_and_not_called_right(
    server: HubServer, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As somebody leaves them who copies a cache without its links."""
    snapshot = fetch(huggingface(server, caches), Source("huggingface", ST))
    copied = snapshot / "config.json"
    data = copied.read_bytes()
    copied.unlink()
    copied.write_bytes(data)
    assert main(["verify", ST]) == 0
    out, err = capsys.readouterr()
    assert "6 files" in out
    assert "1 of them not checked, the others right" in out
    assert err == "not checked, a copy whose hash nothing says: config.json\n"
    assert main(["verify", ST, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["unchecked"] == ["config.json"]
    assert (facts["damaged"], facts["missing"], facts["repaired"]) == ([], [], False)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_what_the_disk_cannot_read_back_is_damaged(
    number: int, server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(huggingface(server, caches), Source("huggingface", ST))
    kept = verify.kept_files(Source("huggingface", ST))
    has_digest = unsynced.has_digest

    def read(path: Path, *arguments: Any) -> bool:
        if path.name == "config.json":
            raise OSError(number, os.strerror(number))
        return has_digest(path, *arguments)

    monkeypatch.setattr(unsynced, "has_digest", read)
    if number == errno.EIO:
        assert [file.path for file in verify.damaged(kept)] == ["config.json"]
    else:  # that is no damage
        with pytest.raises(OSError, match="denied"):
            verify.damaged(kept)


def test_removing_one_quantization_leaves_the_other(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    kept = fetch(hub, Source("huggingface", GGUF, "F32"))
    gone = fetch(hub, Source("huggingface", GGUF, "Q8_0"))
    blob = gone.resolve()
    model = local.find(Source("huggingface", GGUF, "Q8_0"))
    freed = remove(model.cache, [model.snapshot / file.path for file in model.selection.files])
    assert not blob.exists()
    assert not gone.parent.exists()
    assert freed >= model.selection.size_bytes
    assert resolve(GGUF) == kept
    remove(model.cache, [kept])
    assert not model.cache.directory.exists()


def test_bytes_that_another_revision_needs_are_not_removed(server: HubServer, caches: Path) -> None:
    hub = huggingface(server, caches)
    old = fetch(hub, Source("huggingface", ST))
    server.add(ST, server.repos[ST].commits[old.name] | {"tokenizer.json": b'{"new": 1}'})
    new = fetch(hub, Source("huggingface", ST))
    remove(RepoCache(caches, ST), [old / file.path for file in snapshot_files(old)])
    assert not old.exists()
    assert local.find(Source("huggingface", ST)).snapshot == new
    assert len(list((caches / "models--zai-org--GLM-ST" / "blobs").iterdir())) == len(snapshot_files(new))


def test_models_of_other_kinds_are_not_listed(server: HubServer, caches: Path) -> None:
    server.add("google/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 2000})
    fetch(huggingface(server, caches), Source("huggingface", "google/bert"))
    assert list(local.models()) == []


def test_an_unfinished_download_is_known(server: HubServer, caches: Path) -> None:
    server.fail("model-00002-of-00003.safetensors", cut_after=0, after=1, times=100)
    with pytest.raises(DownloadError):
        fetch(huggingface(server, caches), Source("huggingface", ST), replace(QUICK, range_bytes=5000))
    with pytest.raises(local.NotPulled, match="a download has begun"):
        resolve(ST)


def test_space_is_counted_per_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = os.statvfs(tmp_path)
    free = system.f_bavail * system.f_frsize
    monkeypatch.setattr(pull, "_SPARE_BYTES", 0)
    third = free // 3
    pull.check_space({tmp_path / "not yet": third, tmp_path: third})
    with pytest.raises(DownloadError, match="is too small"):
        pull.check_space({tmp_path / "not yet": 2 * third, tmp_path: 2 * third})
    pull.check_space({tmp_path: 0})


FAMILY = Family("GLM-9", {"model_type": "glm4_moe"})


@dataclass
class FakeRelease:
    name: str
    huggingface: str | None
    modelscope: str | None = None
    quant: str | None = None
    published_bytes: int | None = 2 << 30
    runs: bool = True
    format: str = "bf16"
    family: Family = FAMILY

    @property
    def hub_ids(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.huggingface, self.modelscope)))


def test_names_of_the_catalogue(server: HubServer, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a catalogue of this test's own: what the names stand for is not the subject here."""
    releases = (FakeRelease("GLM-9-BF16", ST), FakeRelease("GLM-9-GGUF:Q8_0", GGUF, quant="Q8_0"))
    by_name = {release.name.lower(): release for release in releases} | {"glm-9": FAMILY}
    monkeypatch.setattr("glmlocal.catalogue.find", lambda name: by_name.get(name.lower()))
    monkeypatch.setattr("glmlocal.catalogue.releases", lambda: releases)
    monkeypatch.setattr("glmlocal.catalogue.near_misses", lambda name: ("GLM-9-BF16",))
    with pytest.raises(local.FamilyNotPulled, match=r"suits this machine with `glmlocal pull GLM-9`"):
        resolve("GLM-9")
    with pytest.raises(ConfigError, match=r"GLM-9 is a family of releases; .*GLM-9-BF16 \(2 GiB\), GLM-9-GGUF:Q8_0"):
        list_releases("GLM-9", "huggingface")
    with pytest.raises(local.NotPulled, match=f"glmlocal pull {ST}"):
        resolve("glm-9-bf16")
    with pytest.raises(ConfigError, match="did you mean GLM-9-BF16"):
        resolve("GLM-9-BF17")
    hub = huggingface(server, caches)
    snapshot = fetch(hub, Source("huggingface", ST))
    assert resolve("GLM-9-BF16") == resolve("GLM-9") == snapshot
    fetch(hub, Source("huggingface", GGUF, "Q8_0"))
    with pytest.raises(ConfigError, match=f"several releases of GLM-9 are on this disk; .*{ST}, {GGUF}:Q8_0"):
        resolve("GLM-9")


def test_the_environment_means_what_it_means_to_huggingface_hub(tmp_path: Path) -> None:
    """Each in a process of its own, as huggingface_hub reads it once."""
    (tmp_path / "token").write_text("hf_file\n")
    show = (
        "from glmlocal.hub import huggingface\nhub = huggingface.connect()\n"
        "print([hub.token, str(hub.cache_dir), hub.endpoint, hub.offline, hub.patience.read_s, hub.patience.connect_s])"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {"X": "sub"}
    usual = {"HF_HOME": str(tmp_path / "home")}

    def found(**environ: str) -> subprocess.CompletedProcess[str]:
        env = clean | usual | environ
        return subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=False, env=env)

    hub = "https://huggingface.co"
    for environ, expected in (
        ({}, [None, str(tmp_path / "home" / "hub"), hub, False, 30.0, 15.0]),
        (
            {
                "HF_TOKEN_PATH": str(tmp_path / "token"),
                "HF_HUB_CACHE": str(tmp_path / "$X"),
                "TRANSFORMERS_OFFLINE": "1",
            },
            ["hf_file", str(tmp_path / "sub"), hub, True, 30.0, 15.0],
        ),
        (
            {
                "HF_TOKEN": "hf_env",
                "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
                "HF_ENDPOINT": "https://mirror/",
                "HF_HUB_DOWNLOAD_TIMEOUT": "7",
                "HF_HUB_ETAG_TIMEOUT": "3",
            },
            [None, str(tmp_path / "home" / "hub"), "https://mirror", False, 7.0, 3.0],
        ),
    ):
        result = found(**environ)
        assert result.stdout.strip() == str(expected), result.stderr
    assert "ConfigError: huggingface_hub cannot use" in found(HF_HUB_DOWNLOAD_TIMEOUT="soon").stderr
