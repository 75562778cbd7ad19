"""pull --pack against a hub on loopback: shard by shard, killed and resumed, and never the whole checkpoint at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import releases
import tiny
import tiny_gguf
from glmlocal.errors import CheckpointError, DownloadError
from glmlocal.hub import headers, pull
from glmlocal.hub.listing import HubFile
from glmlocal.hub.names import Source
from glmlocal.kernels import cpu
from glmlocal.models.weights import Quant
from glmlocal.packing import streaming
from glmlocal.packing.job import plan_job
from glmlocal.packing.streaming import Stream, pull_packed, remote_headers
from hub.pulling import QUICK, REPO, SOURCE, fetch, huggingface
from hub.server import HubServer
from packs import CountedWrites, files_of, killed_at, pack

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels, whose layout a pack has")

NUM_SHARDS = 6


@pytest.fixture(autouse=True)
def small_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that reading headers is not reading the whole of these little files."""
    monkeypatch.setattr(headers, "_FIRST_BYTES", 1024)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In six shards, whose borders cut experts apart."""
    root = tmp_path_factory.mktemp("release")
    sizes = {"hidden_size": 80, "moe_intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 24}
    return in_shards(tiny.save(tiny.build_model(**sizes).bfloat16(), root, mtp=True))


def in_shards(source: Path) -> Path:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    step = -(-len(names) // NUM_SHARDS)
    weight_map = {}
    for i in range(NUM_SHARDS):
        file = f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        part = {name: tensors[name] for name in names[i * step : (i + 1) * step]}
        save_file(part, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


@pytest.fixture
def server(release: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in release.iterdir()})
        yield hub


def pulled(server: HubServer, cache: Path, target: Path, quant: Quant = "int4", source: Source = SOURCE) -> Path:
    plan = pull.prepare(source, huggingface(server, cache), QUICK)
    with remote_headers(plan, QUICK) as checkpoint:
        job = plan_job(checkpoint, quant, model="tiny", source="tiny")
        return pull_packed(Stream(plan, checkpoint, job, quant, target), QUICK, threads=2)


def shards_in(cache: Path, release: Path) -> int:
    """Bytes of shards in the cache."""
    sizes = {path.stat().st_size for path in release.glob("*.safetensors")}
    return sum(size for path in cache.rglob("blobs/*") if (size := path.stat().st_size) in sizes)


@pytest.mark.parametrize("quant", ["keep", "int4"])
def test_the_pack_is_that_of_the_whole_checkpoint(
    server: HubServer, release: Path, tmp_path: Path, quant: Quant
) -> None:
    want = files_of(pack(release, tmp_path / "local", quant))
    assert files_of(pulled(server, tmp_path / "hf", tmp_path / "pack", quant)) == want
    assert not list((tmp_path / "hf").rglob("blobs/*"))  # nothing is left
    for shard in release.glob("*.safetensors"):
        assert server.served_bytes(shard.name) < 1.25 * shard.stat().st_size  # once, and its header before


@pytest.mark.parametrize("kind", ["gptq asymmetric", "packed int4", "mlx 4-bit"])
def test_quantized_matrices_whose_tensors_are_in_several_shards(kind: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(**releases.SIZES), tmp_path / "source")
    (tmp_path / "release").mkdir()
    directory = in_shards(releases.quantize_release(source, tmp_path / "release", releases.STYLES[kind]))
    with HubServer() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()})
        want = files_of(pack(directory, tmp_path / "local"))
        assert files_of(pulled(hub, tmp_path / "hf", tmp_path / "pack", "keep")) == want


def refusing(most_bytes: int) -> Callable[[dict[Path, int]], None]:
    """A disk of such a size."""

    def check(needs: dict[Path, int]) -> None:
        if sum(needs.values()) > most_bytes:
            raise DownloadError(f"no room for {sum(needs.values())} bytes")

    return check


def needs_of(server: HubServer, tmp_path: Path) -> list[int]:
    """What is asked of the disk: with a shard ahead; then without one, where that is too much."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def check(needs: dict[Path, int]) -> None:
            asked.append(sum(needs.values()))
            raise DownloadError("no room")

        patch.setattr(streaming, "check_space", check)
        with pytest.raises(DownloadError):
            pulled(server, tmp_path / "hf-needs", tmp_path / "needs")
    return asked


def test_the_next_shard_comes_while_one_is_packed(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing waits for the fetch of the next: were they in turns, it would wait in vain."""
    original_make, original_fetch = streaming.Maker.make, streaming.fetch_files
    began = [threading.Event() for _ in range(NUM_SHARDS)]
    names = sorted(path.name for path in release.glob("*.safetensors"))
    turns: list[int] = []

    def fetch_files(plan: pull.Pull, files: list[HubFile], *rest: Any) -> None:
        for file in files:
            if file.path in names:
                began[names.index(file.path)].set()
        original_fetch(plan, files, *rest)

    def make(self: streaming.Maker, *args: object) -> None:
        turns.append(len(turns))
        if len(turns) < NUM_SHARDS:
            assert began[len(turns)].wait(10.0), f"shard {len(turns)} is not fetched while the one before is packed"
        original_make(self, *args)  # type: ignore[arg-type]

    want = files_of(pack(release, tmp_path / "local", "int4"))
    monkeypatch.setattr(streaming.Maker, "make", make)
    monkeypatch.setattr(streaming, "fetch_files", fetch_files)
    assert files_of(pulled(server, tmp_path / "hf", tmp_path / "pack")) == want
    assert len(turns) == NUM_SHARDS


def test_packing_that_fails_gives_up_the_fetch_and_keeps_what_came(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(self: streaming.Maker, *args: object) -> None:
        raise CheckpointError("a bad tensor")

    with monkeypatch.context() as patch:
        patch.setattr(streaming.Maker, "make", make)
        with pytest.raises(CheckpointError, match="a bad tensor"):
            pulled(server, tmp_path / "hf", tmp_path / "pack")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
    server.forget_served()
    want = files_of(pack(release, tmp_path / "local", "int4"))
    assert files_of(pulled(server, tmp_path / "hf", tmp_path / "pack")) == want
    first = min(path for path in release.glob("*.safetensors"))
    assert server.served_bytes(first.name) < 0.4 * first.stat().st_size


def test_a_small_disk_has_no_more_than_two_shards_at_once(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, without = needs_of(server, tmp_path)
    assert without < ahead
    monkeypatch.setattr(streaming, "check_space", refusing(without))
    seen: list[int] = []
    original = streaming.Maker.make

    def make(self: streaming.Maker, *args: object) -> None:
        seen.append(shards_in(tmp_path / "hf", release))
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming.Maker, "make", make)
    pulled(server, tmp_path / "hf", tmp_path / "pack")
    sizes = [path.stat().st_size for path in sorted(release.glob("*.safetensors"))]
    assert len(seen) == NUM_SHARDS
    assert max(seen) <= max(one + other for one, other in pairwise(sizes))
    assert max(seen) > max(sizes)  # borders do cut experts apart
    assert seen[-1] < sum(sizes) / 2


def test_killed_in_the_middle_it_goes_on_and_fetches_no_finished_shard_again(
    server: HubServer, release: Path, tmp_path: Path
) -> None:
    want = files_of(pack(release, tmp_path / "local", "int4"))
    with pytest.MonkeyPatch.context() as patch:
        counted = CountedWrites(patch)
        pulled(server, tmp_path / "counted-hf", tmp_path / "counted")
    sizes = {path.name: path.stat().st_size for path in release.glob("*.safetensors")}
    fetched_again = []
    for fraction in (0.3, 0.6, 0.85):
        call = int(counted.count * fraction)
        cache, target = tmp_path / f"hf-{call}", tmp_path / f"pack-{call}"
        killed_at(call, lambda cache=cache, target=target: pulled(server, cache, target))
        assert not target.exists()
        server.forget_served()
        assert files_of(pulled(server, cache, target)) == want
        fetched_again.append(sum(server.served_bytes(name) > 0.4 * size for name, size in sizes.items()))
    assert fetched_again[0] > fetched_again[-1]
    assert fetched_again[-1] <= 2


def test_what_was_pulled_before_is_used_and_stays(server: HubServer, release: Path, tmp_path: Path) -> None:
    path = fetch(huggingface(server, tmp_path / "hf"))
    before = files_of(path)
    server.forget_served()
    want = files_of(pack(release, tmp_path / "local", "int4"))
    assert files_of(pulled(server, tmp_path / "hf", tmp_path / "pack")) == want
    assert files_of(path) == before
    ranges = [end - begin for name in server.served for begin, end in server.served[name]]
    assert max(ranges) < 40_000  # headers only


def test_gguf_in_parts(release: Path, tmp_path: Path) -> None:
    model = tiny.build_model(**{**tiny.CONFIGS["air"], "moe_intermediate_size": 64})
    tiny_gguf.convert(tiny.save(model, tmp_path / "w"), tmp_path / "GLM-test-Q8_0.gguf", "Q8_0", split_bytes=60_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    want = files_of(pack(parts[0], tmp_path / "local"))
    with HubServer() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in parts})
        got = pulled(hub, tmp_path / "hf", tmp_path / "pack", "keep", Source("huggingface", REPO, quant="Q8_0"))
    assert files_of(got) == want


def test_a_disk_without_room_is_seen_first(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(needs: dict[Path, int]) -> None:
        total = sum(needs.values())
        raise DownloadError(f"{total} bytes")

    monkeypatch.setattr(streaming, "check_space", refuse)
    with pytest.raises(DownloadError):
        pulled(server, tmp_path / "hf", tmp_path / "pack")
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_hub_that_fails_loses_nothing(
    server: HubServer, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in release.glob("*.safetensors"))
    original = streaming.fetch_files

    def fetch_files(plan: pull.Pull, files: list[HubFile], *rest: Any) -> None:
        if files and files[0].path == names[3]:
            server.fail(names[3], status=503, times=100)
        original(plan, files, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "fetch_files", fetch_files)
        with pytest.raises(DownloadError, match="503"):
            pulled(server, tmp_path / "hf", tmp_path / "pack")
    server.faults.clear()
    server.forget_served()
    want = files_of(pack(release, tmp_path / "local", "int4"))
    assert files_of(pulled(server, tmp_path / "hf", tmp_path / "pack")) == want
    assert server.served_bytes(names[0]) < 0.4 * (release / names[0]).stat().st_size
