"""The Hugging Face hub's API, with the settings of ``huggingface_hub``: token, endpoint, cache, offline mode.

Plain HTTPS, because the requests must be tried again, ranged and counted in our way, and because huggingface_hub has
changed its HTTP library with every major version. ``GET /api/models/{id}/revision/{revision}`` names the commit,
``GET /api/models/{id}/tree/{commit}?recursive=true`` lists it (pages by ``Link`` headers; ``lfs.oid`` is a SHA-256,
``oid`` git's SHA-1), ``GET /{id}/resolve/{commit}/{path}`` redirects to the bytes. Source: huggingface_hub's hf_api.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from glmlocal.errors import DownloadError
from glmlocal.formats.index import quoted
from glmlocal.hub.environment import constants, patient_as_told
from glmlocal.hub.http import DEFAULT_PATIENCE, MAX_API_BYTES, Patience, check_status, get_bytes, new_client, retry
from glmlocal.hub.listing import HubFile, Listing, hub_file

if TYPE_CHECKING:
    import httpx

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_PAGES = 200  # of 1,000 files
_MAX_FILES = 200_000


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """A hub as ``connect`` found it in the environment."""

    endpoint: str
    cache_dir: Path
    token: str | None = field(repr=False)
    offline: bool
    patience: Patience = DEFAULT_PATIENCE
    name: str = "huggingface"
    token_variable: str = "HF_TOKEN"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def page(self, repo_id: str) -> str:
        return f"{self.endpoint}/{repo_id}"

    def url(self, listing: Listing, path: str) -> str:
        return f"{self.endpoint}/{listing.repo_id}/resolve/{listing.commit}/{quote(path)}"

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        """The files of a branch, tag or commit (None: of ``main``)."""
        if self.offline:
            raise DownloadError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be looked up; unset it to download")
        revision = revision or "main"
        with new_client(self.patience) as client:
            what = f"{repo_id}@{revision}" if revision != "main" else repo_id
            about = f"{self.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
            info, _ = self._get_json(client, about, what, repo_id)
            commit = info.get("sha") if isinstance(info, dict) else None
            if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
                raise DownloadError(
                    f"{self.endpoint} names {quoted(commit)} as the commit of {what}: that is no Hugging Face hub; "
                    "check HF_ENDPOINT"
                )
            files = tuple(self._files(client, repo_id, commit, what))
        return Listing(repo_id, revision, commit, files)

    def _files(self, client: httpx.Client, repo_id: str, commit: str, what: str) -> Iterator[HubFile]:
        url, num_entries = f"{self.endpoint}/api/models/{repo_id}/tree/{commit}?recursive=true&expand=false", 0
        for _ in range(_MAX_PAGES):
            page, response = self._get_json(client, url, what, repo_id)
            if not isinstance(page, list):
                raise DownloadError(f"{self.endpoint} lists {what} as a JSON {type(page).__name__}; try again later")
            num_entries += len(page)
            if num_entries > _MAX_FILES:
                break
            for entry in page:
                if isinstance(entry, dict) and entry.get("type") == "file":
                    lfs = entry.get("lfs")
                    of_lfs = lfs if isinstance(lfs, dict) else {}
                    digest, size = of_lfs.get("oid", entry.get("oid")), of_lfs.get("size", entry.get("size"))
                    yield hub_file(entry.get("path"), size, digest, f"{self.endpoint}/{repo_id}")
            following = response.links.get("next", {}).get("url")
            if following is None:
                return
            url = str(response.url.join(following))
            if urlsplit(url)[:2] != urlsplit(self.endpoint)[:2]:  # the token would go there
                raise DownloadError(f"{self.endpoint} continues the list of {what} on another host, {quoted(url)}")
        raise DownloadError(
            f"the list of {what} goes on after {num_entries:,} files, more than any model has; try again later or "
            "another hub (--hub)"
        )

    def _get_json(self, client: httpx.Client, url: str, what: str, repo_id: str) -> tuple[Any, httpx.Response]:
        def check(response: httpx.Response) -> None:
            self.check(response, what, repo_id)

        body, response = retry(lambda: get_bytes(client, url, self.headers, check, MAX_API_BYTES), self.patience)
        try:
            return json.loads(body), response
        except (ValueError, RecursionError):
            raise DownloadError(
                f"{self.endpoint} answers {quoted(body[:40])}, not JSON, to a question about {what}; "
                "check HF_ENDPOINT and the network's login page"
            ) from None

    def check(self, response: httpx.Response, what: str, repo_id: str) -> None:
        """Raise TryAgain or DownloadError unless the answer is a success."""
        page = self.page(repo_id)
        check_status(response, what, has_token=bool(self.token), page=page, token_variable=self.token_variable)


def connect(patience: Patience = DEFAULT_PATIENCE) -> HuggingFace:
    """The hub of HF_ENDPOINT, with the token, cache and offline mode that every tool of Hugging Face would use."""
    known = constants()
    from huggingface_hub import get_token

    token = None if known.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return HuggingFace(
        endpoint=known.ENDPOINT,
        cache_dir=Path(known.HF_HUB_CACHE),
        token=token,
        offline=known.HF_HUB_OFFLINE,
        patience=patient_as_told(patience),
    )
