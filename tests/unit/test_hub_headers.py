"""A checkpoint on a hub, opened by its headers, is the one that would lie on this disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import crafted
from glmlocal.errors import CheckpointError, ConfigError, DownloadError
from glmlocal.formats.gguf_file import HeaderIncomplete, parse_gguf
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.hub import headers
from glmlocal.hub.headers import remote_checkpoint
from glmlocal.hub.names import Source
from hub.pulling import PATIENCE, huggingface, modelscope
from hub.server import HubServer

TENSORS = crafted.tiny_tensors(crafted.TINY)
BALLAST = {"model.layers.9.ballast": np.zeros((1000, 1000), np.float32)}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def content(checkpoint: Checkpoint) -> tuple[object, ...]:
    refs = {name: (r.file.name, r.offset, r.nbytes, r.shape, r.dtype) for name, r in checkpoint.tensors.items()}
    sizes = [(file.name, file.stat().st_size) for file in checkpoint.tensors.files]
    return checkpoint.config, refs, sizes, checkpoint.gguf_metadata


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_safetensors(shards: int, hub: str, server: HubServer, tmp_path: Path) -> None:
    directory = crafted.write_checkpoint(tmp_path / "x", crafted.TINY, TENSORS | BALLAST, shards)
    server.add("org/name", {path.name: path.read_bytes() for path in directory.iterdir()})
    connect = huggingface if hub == "huggingface" else modelscope
    source = Source("huggingface", "org/name")
    with (
        remote_checkpoint(source, connect(server, tmp_path / "cache"), PATIENCE) as remote,
        open_checkpoint(directory).tensors as tensors,
    ):
        assert content(remote) == content(open_checkpoint(directory))
        assert len(tensors) == len(remote.tensors)
        where = remote.directory
    assert not where.exists()
    assert sum(server.served_bytes(path.name) for path in directory.iterdir()) < 3_000_000  # of more than 4


def test_gguf_with_a_header_longer_than_the_first_request(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_FIRST_BYTES", 300)
    model = crafted.tiny_gguf(crafted.TINY, TENSORS | {})
    tokens = (crafted.STRING, [f"token {i}" for i in range(500)])
    path = model.with_keys(tokenizer__ggml__tokens=(crafted.ARRAY, tokens)).write(tmp_path / "X-F32.gguf")
    server.add("org/name", {"a/X-F32.gguf": path.read_bytes(), "X-Q8_0.gguf": b"x" * 2000})
    source = Source("huggingface", "org/name", "F32")
    with remote_checkpoint(source, huggingface(server, tmp_path), PATIENCE) as remote:
        assert content(remote) == content(open_checkpoint(path))
    assert server.served_bytes("X-Q8_0.gguf") == 0


def test_a_gguf_header_is_complete_or_says_that_it_is_not(tmp_path: Path) -> None:
    data = crafted.tiny_gguf(crafted.TINY, TENSORS).encode()
    whole = parse_gguf(tmp_path, data, len(data))
    header = min(ref.offset for ref in whole.tensors)
    for num_bytes in range(0, header - 32, 7):
        with pytest.raises(HeaderIncomplete):
            parse_gguf(tmp_path, data[:num_bytes], len(data))
    assert parse_gguf(tmp_path, data[:header], len(data)) == whole
    with pytest.raises(CheckpointError, match="ends inside"):
        parse_gguf(tmp_path, data[: header // 2], header // 2)  # that is all there is


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"\xff" * 8, "claims a header of"), (b"\0" * 8, "has no header"), (b"version ", "git-lfs pointer")],
)
def test_hostile_headers_are_refused_without_fetching_them(
    start: bytes, message: str, server: HubServer, tmp_path: Path
) -> None:
    server.add("org/name", {"config.json": b"{}", "model.safetensors": start + bytes(5_000_000)})
    with (
        pytest.raises(CheckpointError, match=message),
        remote_checkpoint(Source("huggingface", "org/name"), huggingface(server, tmp_path), PATIENCE),
    ):
        pass
    assert server.served_bytes("model.safetensors") < 1_500_000


def test_a_server_without_ranges_does_not_send_the_weights(server: HubServer, tmp_path: Path) -> None:
    server.add("org/name", {"config.json": b"{}", "model.safetensors": bytes(60_000_000)})
    server.fail("model.safetensors", ignore_range=True, times=10)
    with (
        pytest.raises(CheckpointError, match="has no header"),
        remote_checkpoint(Source("huggingface", "org/name"), huggingface(server, tmp_path), PATIENCE),
    ):
        pass
    assert server.served_bytes("model.safetensors") < 30_000_000  # what the sockets hold, and no more


def test_faults_on_the_way(server: HubServer, tmp_path: Path) -> None:
    directory = crafted.write_checkpoint(tmp_path / "x", crafted.TINY, TENSORS | BALLAST)
    server.add("org/name", {path.name: path.read_bytes() for path in directory.iterdir()})
    hub, source = huggingface(server, tmp_path), Source("huggingface", "org/name")
    server.fail("model.safetensors", status=503)
    server.fail("model.safetensors", cut_after=100)
    server.fail("model.safetensors", ignore_range=True)
    with remote_checkpoint(source, hub, PATIENCE) as remote:
        assert content(remote) == content(open_checkpoint(directory))
    with (
        pytest.raises(ConfigError, match="no GGUF files"),
        remote_checkpoint(Source("huggingface", "org/name", "Q4_0"), hub, PATIENCE),
    ):
        pass
    with (
        pytest.raises(DownloadError, match="does not exist"),
        remote_checkpoint(Source("huggingface", "org/nope"), hub, PATIENCE),
    ):
        pass
