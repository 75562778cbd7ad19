"""A checkpoint that is still on its hub, opened by its headers: what ``show`` and ``plan`` need, without the weights.

The headers are fetched by ranged requests and written into sparse files of the true sizes, in a directory that lives as
long as the checkpoint is looked at; ``formats`` opens that directory like any other. Tensor bytes are not there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.errors import DownloadError
from glmlocal.formats.gguf_file import HeaderIncomplete, parse_gguf
from glmlocal.formats.index import Checkpoint, open_checkpoint
from glmlocal.formats.safetensors import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, read_weight_map
from glmlocal.hub.http import DEFAULT_PATIENCE, Patience, check_status, new_client, retry
from glmlocal.hub.listing import Hub, HubFile, Listing
from glmlocal.hub.names import Source
from glmlocal.hub.select import Selection, select
from glmlocal.units import KIB, MIB

if TYPE_CHECKING:
    import httpx

_THREADS = 8
_FIRST_BYTES = 512 * KIB  # a shard's header of GLM-4.5 is about 200 KB
_MAX_GGUF_HEADER_BYTES = 128 * MIB
_TEXT_MAX_BYTES = 64 * MIB
_NOT_NEEDED = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})  # large, and nothing to do with shapes


@contextmanager
def remote_checkpoint(source: Source, hub: Hub, patience: Patience = DEFAULT_PATIENCE) -> Iterator[Checkpoint]:
    """The checkpoint of a model on a hub: config, tensor names, types, shapes and sizes as they would be on this disk.

    Raises DownloadError, ConfigError for a quantization that is not there, CheckpointError for damaged headers.
    """
    listing = hub.list_files(source.repo_id, source.revision)
    with (
        tempfile.TemporaryDirectory(prefix="glmlocal-headers-", ignore_cleanup_errors=True) as name,
        new_client(patience, _THREADS) as client,
    ):
        # The name of the snapshot, so that whatever shows the path shows the model.
        directory = Path(name) / f"models--{source.repo_id.replace('/', '--')}" / "snapshots" / listing.commit
        remote = _Remote(client, hub, listing, patience)
        selection = _select(remote, directory, source.quant)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda file: _write(remote, file, directory / file.path), selection.files))
        checkpoint = open_checkpoint(directory / selection.first if selection.first else directory)
        try:
            yield checkpoint
        finally:
            checkpoint.tensors.close()


class _Remote:
    """Reads beginnings of files of one listing."""

    def __init__(self, client: httpx.Client, hub: Hub, listing: Listing, patience: Patience) -> None:
        self.client, self.hub, self.listing, self.patience = client, hub, listing, patience

    def beginning(self, file: HubFile, num_bytes: int) -> bytes:
        """The first ``num_bytes``, or all if there are fewer."""
        num_bytes = min(num_bytes, file.size_bytes)
        return retry(lambda: self._attempt(file, num_bytes), self.patience) if num_bytes else b""

    def _attempt(self, file: HubFile, num_bytes: int) -> bytes:
        headers = {**self.hub.headers, "Range": f"bytes=0-{num_bytes - 1}"}
        body = bytearray()
        with self.client.stream("GET", self.hub.url(self.listing, file.path), headers=headers) as response:
            self._check(response, file)
            for chunk in response.iter_raw():
                body += chunk[: num_bytes - len(body)]
                if len(body) == num_bytes:  # a server that ignores Range would send gigabytes
                    break
        if len(body) < num_bytes:
            raise DownloadError(f"{file.path} of {self.listing.repo_id} is shorter than listed; run this again")
        return bytes(body)

    def _check(self, response: httpx.Response, file: HubFile) -> None:
        check_status(
            response,
            f"{self.listing.repo_id}/{file.path}",
            has_token=bool(self.hub.headers),
            page=self.hub.page(self.listing.repo_id),
            token_variable=self.hub.token_variable,
        )


def _select(remote: _Remote, directory: Path, quant: str | None) -> Selection:
    files = {file.path: file for file in remote.listing.files}
    shards: frozenset[str] = frozenset()
    if INDEX_FILE in files and SINGLE_FILE not in files and quant is None:
        _write(remote, files[INDEX_FILE], directory / INDEX_FILE)
        shards = frozenset(read_weight_map(directory / INDEX_FILE).values())
    return select(remote.listing.files, remote.listing.repo_id, quant, shards)


def _write(remote: _Remote, file: HubFile, path: Path) -> None:
    """As much of the file as the parsers look at, and a hole for the rest."""
    if path.name in _NOT_NEEDED or path.exists():
        return
    lower = path.name.lower()
    read = _safetensors_header if lower.endswith(".safetensors") else _gguf_header if lower.endswith(".gguf") else _all
    data = read(remote, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.write(data)
        out.truncate(file.size_bytes)


def _all(remote: _Remote, file: HubFile) -> bytes:
    if file.size_bytes > _TEXT_MAX_BYTES:
        raise DownloadError(
            f"{file.path} of {remote.listing.repo_id} has {file.size_bytes:,} bytes: too many for such a file"
        )
    return remote.beginning(file, file.size_bytes)


def _safetensors_header(remote: _Remote, file: HubFile) -> bytes:
    data = remote.beginning(file, _FIRST_BYTES)
    length = 8 + int.from_bytes(data[:8], "little")
    # A length that cannot be is for the parser to refuse: it does so before it reads on.
    return data if length <= len(data) or length > 8 + MAX_HEADER_BYTES else remote.beginning(file, length)


def _gguf_header(remote: _Remote, file: HubFile) -> bytes:
    num_bytes = _FIRST_BYTES
    while True:
        data = remote.beginning(file, num_bytes)
        try:
            parse_gguf(Path(file.path), data, file.size_bytes)
        except HeaderIncomplete:
            num_bytes = min(4 * num_bytes, _MAX_GGUF_HEADER_BYTES)
            continue
        return data
