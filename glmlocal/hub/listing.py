"""What a hub says about a repository: which files, how large, with which hash. The protocol that both hubs speak."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glmlocal.errors import DownloadError
from glmlocal.formats.index import quoted

MAX_FILE_BYTES = 1 << 46  # 64 TiB: more than any filesystem here gives one file
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository at one revision."""

    path: str  # in the repository, with forward slashes; not checked yet: ``select`` does that
    size_bytes: int
    digest: str  # SHA-256 in 64 hex digits, or git's SHA-1 in 40 for small files; names the blob in the cache

    def hasher(self) -> hashlib._Hash:
        """What its bytes are fed to; the result is ``digest``."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository's files at one revision."""

    repo_id: str
    revision: str  # as it was asked for: a branch, a tag or a commit
    commit: str  # what names the snapshot: hex digits
    files: tuple[HubFile, ...]


class Hub(Protocol):
    """Where repositories are. Everything raises DownloadError."""

    @property
    def name(self) -> str: ...

    @property
    def cache_dir(self) -> Path: ...

    @property
    def offline(self) -> bool:
        """Whether nothing may be asked of it."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Credentials, for requests to the hub itself and to nobody else."""
        ...

    def list_files(self, repo_id: str, revision: str | None) -> Listing: ...

    @property
    def token_variable(self) -> str:
        """The environment variable that a person sets."""
        ...

    def url(self, listing: Listing, path: str) -> str: ...

    def page(self, repo_id: str) -> str:
        """The repository's page, for a person."""
        ...


def hub_file(path: Any, size: Any, digest: Any, where: str) -> HubFile:
    """A file of a listing, once its values are of the right kind and range. Raises DownloadError."""
    if not isinstance(path, str) or not path:
        raise DownloadError(f"{where} lists a file called {quoted(path)}; try again later or another hub (--hub)")
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise DownloadError(f"{where} says that {quoted(path)} has {quoted(size)} bytes; try again or another hub")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise DownloadError(f"{where} gives {quoted(digest)} as the hash of {quoted(path)}; try again or another hub")
    return HubFile(path, size, digest)
