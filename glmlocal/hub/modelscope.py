"""ModelScope's API over plain HTTPS: its SDK would bring dozens of packages, and two requests are all that is needed.

``GET /api/v1/models/{id}/repo/files?Revision=…&Recursive=True`` lists (``Data.Files[]``: Path, Type, Size, Sha256), and
``GET /api/v1/models/{id}/repo?Revision=…&FilePath=…`` gives the bytes, with ranges. Errors may come with HTTP 200 and a
``Code`` and ``Message`` in the JSON. A listing names no commit, so a snapshot is named by a hash of what was listed;
a branch that moves meanwhile shows as a wrong SHA-256. Source: modelscope_hub's _legacy_api.py and _download.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from glmlocal.errors import DownloadError
from glmlocal.formats.index import quoted
from glmlocal.hub.environment import constants, patient_as_told
from glmlocal.hub.http import (
    DEFAULT_PATIENCE,
    MAX_API_BYTES,
    Patience,
    TryAgain,
    check_status,
    get_bytes,
    new_client,
    retry,
)
from glmlocal.hub.listing import HubFile, Listing, hub_file
from glmlocal.paths import cache_home
from glmlocal.text.files import one_line

if TYPE_CHECKING:
    import httpx

_LISTING_LIMIT = 3000  # files; the server stops there without saying so (modelscope_hub.constants)


@dataclass(frozen=True, slots=True)
class ModelScope:
    """A hub as ``connect`` found it in the environment."""

    endpoint: str
    cache_dir: Path
    token: str | None = field(repr=False)
    offline: bool = False
    patience: Patience = DEFAULT_PATIENCE
    name: str = "modelscope"
    token_variable: str = "MODELSCOPE_API_TOKEN"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Cookie": f"m_session_id={self.token}", "Authorization": f"Bearer {self.token}"} if self.token else {}

    def page(self, repo_id: str) -> str:
        return f"{self.endpoint}/models/{repo_id}"

    def url(self, listing: Listing, path: str) -> str:
        query = urlencode({"Revision": listing.revision, "FilePath": path})
        return f"{self.endpoint}/api/v1/models/{listing.repo_id}/repo?{query}"

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        """The files of a branch or tag (None: of ``master``)."""
        if self.offline:
            raise DownloadError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be looked up; unset it to download")
        revision = revision or "master"
        query = urlencode({"Revision": revision, "Recursive": "True"})
        url = f"{self.endpoint}/api/v1/models/{repo_id}/repo/files?{query}"
        what = f"{repo_id}@{revision}" if revision != "master" else repo_id

        def attempt() -> Any:
            body, _ = get_bytes(client, url, self.headers, lambda r: self.check(r, what, repo_id), MAX_API_BYTES)
            return self._data(body, what)

        with new_client(self.patience) as client:
            data = retry(attempt, self.patience)
        entries = data.get("Files") if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise DownloadError(f"{self.endpoint} does not list {what}; check the name at {self.page(repo_id)}")
        if len(entries) >= _LISTING_LIMIT:
            raise DownloadError(f"{what} has {_LISTING_LIMIT} files or more, which ModelScope does not list in full")
        files = tuple(
            hub_file(entry.get("Path"), entry.get("Size"), entry.get("Sha256"), self.page(repo_id))
            for entry in entries
            if isinstance(entry, dict) and entry.get("Type") != "tree"
        )
        return Listing(repo_id, revision, _snapshot_name(files), files)

    def _data(self, body: bytes, what: str) -> Any:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise TryAgain(
                f"{self.endpoint} answers {quoted(body[:40])}, not JSON, to a question about {what}"
            ) from None
        if not isinstance(answer, dict) or answer.get("Code", 200) != 200:
            reason = one_line(answer.get("Message", "")) if isinstance(answer, dict) else ""
            raise DownloadError(f"{self.endpoint} refuses {what}: {reason or 'no reason given'}; check the name")
        return answer.get("Data")

    def check(self, response: httpx.Response, what: str, repo_id: str) -> None:
        """Raise TryAgain or DownloadError unless the answer is a success."""
        page = self.page(repo_id)
        check_status(response, what, has_token=bool(self.token), page=page, token_variable=self.token_variable)


def connect(patience: Patience = DEFAULT_PATIENCE) -> ModelScope:
    """The hub of MODELSCOPE_ENDPOINT with the token of MODELSCOPE_API_TOKEN; HF_HUB_OFFLINE holds here too."""
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "").strip() or "https://www.modelscope.cn"
    return ModelScope(
        endpoint=(endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/"),
        cache_dir=cache_home() / "modelscope",
        token=os.environ.get("MODELSCOPE_API_TOKEN") or None,
        offline=constants().HF_HUB_OFFLINE,
        patience=patient_as_told(patience),
    )


def _snapshot_name(files: tuple[HubFile, ...]) -> str:
    """40 hex digits, like a commit: the same files have the same name."""
    lines = sorted(f"{file.digest} {file.path}" for file in files)
    text = "\n".join(lines).encode("utf-8", "surrogatepass")  # JSON can hold half a character; ``select`` refuses it
    return hashlib.sha256(text).hexdigest()[:40]
