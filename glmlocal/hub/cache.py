"""The directory of one repository in huggingface_hub's cache layout, which other tools read and write too.

models--org--name/blobs/<digest>               the bytes, named by their hash
models--org--name/snapshots/<commit>/<path>    relative links to blobs
models--org--name/refs/<revision>              the commit that a branch or tag was
models--org--name/.glmlocal/<digest>.*         ours: downloads in progress, invisible to the others
.locks/models--org--name/glmlocal.lock         held by whoever changes any of this

ModelScope's files are kept in the same layout, in a directory of their own. Source of the layout: huggingface_hub's
file_download.py and docs/manage-cache.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import GlmlocalError
from glmlocal.formats.index import read_json_object
from glmlocal.formats.safetensors import INDEX_FILE, read_weight_map
from glmlocal.hub.listing import HubFile, Listing
from glmlocal.hub.select import Selection, select
from glmlocal.locks import locked

_DIRECTORY = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PARTS = ("blobs", "snapshots", "refs", ".no_exist", ".glmlocal")  # of a repository's directory
_DEFAULT_REVISIONS = ("main", "master")


@dataclass(frozen=True, slots=True)
class RepoCache:
    """Where one repository's files are. Nothing is created before it is written."""

    cache_dir: Path
    repo_id: str

    @property
    def directory(self) -> Path:
        return self.cache_dir / self._name

    @property
    def _name(self) -> str:
        return "models--" + self.repo_id.replace("/", "--")

    def blob(self, file: HubFile) -> Path:
        return self.directory / "blobs" / file.digest

    @property
    def work(self) -> Path:
        """Ours alone: partial files, their journals, and marks of what may not be on the disk yet."""
        return self.directory / ".glmlocal"

    def partial(self, file: HubFile) -> Path:
        """Where its bytes gather; the journal lies beside it."""
        return self.work / f"{file.digest}.partial"

    def snapshot(self, commit: str) -> Path:
        return self.directory / "snapshots" / commit

    def snapshots(self) -> list[Path]:
        """All of them, the one last changed first."""
        with suppress(OSError):
            found = [path for path in (self.directory / "snapshots").iterdir() if path.is_dir()]
            return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
        return []

    def has(self, file: HubFile) -> bool:
        """Whether its blob is there in full, as far as its size tells; ``verify`` hashes."""
        try:
            return self.blob(file).stat().st_size == file.size_bytes
        except OSError:
            return False

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a revision was when it was last looked up, or is itself; None: of the default branch."""
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        for name in _DEFAULT_REVISIONS if revision is None else (revision,):
            with suppress(OSError, UnicodeDecodeError):
                commit = (self.directory / "refs" / name).read_text("ascii").strip()
                if _COMMIT.fullmatch(commit):
                    return commit
        if revision is None and (snapshots := self.snapshots()):
            return snapshots[0].name
        return None

    def is_published(self, listing: Listing, files: Iterable[HubFile]) -> bool:
        """Whether ``publish`` would find nothing to do."""
        snapshot = self.snapshot(listing.commit)
        links = all((snapshot / f.path).exists() and (snapshot / f.path).samefile(self.blob(f)) for f in files)
        return links and self.commit_of(listing.revision) == listing.commit

    def publish(self, listing: Listing, files: Iterable[HubFile]) -> Path:
        """Make complete files visible under their names: the links first, then the ref. Returns the snapshot.

        Raises OSError, also where a directory of the snapshot is a link to somewhere else.
        """
        snapshot = self.snapshot(listing.commit)
        for file in files:
            link = snapshot / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.parent.resolve().is_relative_to(self.directory.resolve()):
                raise OSError(errno.ELOOP, f"{link.parent} is a link that leads out of it", str(link.parent))
            target = os.path.relpath(self.blob(file), link.parent)
            if not (link.is_symlink() and os.readlink(link) == target):
                self._put(link, functools.partial(os.symlink, target))
        if listing.revision != listing.commit:
            ref = self.directory / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            if not ref.is_file() or ref.read_text("ascii", "replace") != listing.commit:
                self._put(ref, lambda path: path.write_text(listing.commit, "ascii"))
        return snapshot

    def _put(self, path: Path, make: Callable[[Path], object]) -> None:
        """Make it under another name, then put it in place in one step."""
        self.work.mkdir(exist_ok=True)
        new = self.work / "new"  # one at a time: the lock is held
        new.unlink(missing_ok=True)
        make(new)
        os.replace(new, path)

    @contextmanager
    def locked(self, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Held against every other process of ours that changes this repository; ``on_wait`` comes before a wait."""
        path = self.cache_dir / ".locks" / self._name / "glmlocal.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, on_wait):
            yield

    def sweep(self) -> None:
        """Remove what is left of downloads that were finished. The lock must be held."""
        with suppress(OSError):
            for path in self.leftovers():
                path.unlink()
            self.work.rmdir()  # when empty

    def leftovers(self) -> list[Path]:
        """What ``sweep`` removes: a process that is killed at the end leaves it."""

        def is_left(path: Path) -> bool:
            is_finished = (self.directory / "blobs" / path.name.split(".")[0]).exists()
            # A mark says something of a finished file, all the rest of one that is not.
            return path.name == "new" or is_finished == (path.suffix != ".unsynced")

        with suppress(OSError):
            return [path for path in self.work.iterdir() if is_left(path)]
        return []

    def partial_bytes(self) -> int:
        """On disk for downloads that have not finished."""
        return sum(map(blocks_bytes, self.work.glob("*.partial")))


def repositories(cache_dir: Path) -> Iterator[RepoCache]:
    """Every model repository of a cache, by name."""
    try:
        names = sorted(os.listdir(cache_dir))
    except OSError:
        return
    for name in names:
        if (match := _DIRECTORY.fullmatch(name)) and (cache_dir / name).is_dir():
            yield RepoCache(cache_dir, f"{match[1]}/{match[2]}")


def snapshot_files(snapshot: Path) -> list[HubFile]:
    """The files of a snapshot whose bytes are there. One that is no link to a blob has the digest \"\"."""
    files = []
    for root, _, names in os.walk(snapshot):
        for name in names:
            path = Path(root, name)
            with suppress(OSError):
                size = path.stat().st_size  # fails for a link to a blob that is gone
                name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
                digest = name if _DIGEST.fullmatch(name) else ""
                files.append(HubFile(path.relative_to(snapshot).as_posix(), size, digest))
    return sorted(files, key=lambda file: file.path)


def local_selection(snapshot: Path, repo_id: str, quant: str | None = None) -> Selection:
    """The model that a snapshot holds, if it is whole, from names and sizes only.

    Raises CheckpointError or DownloadError if it is not whole, ConfigError if ``quant`` is not there or is needed.
    """
    files = snapshot_files(snapshot)
    return select(files, repo_id, quant, shards_of(snapshot) if quant is None else ())


def shards_of(snapshot: Path) -> frozenset[str]:
    """The files that the snapshot's safetensors index names; nothing if there is none. Raises CheckpointError."""
    index = snapshot / INDEX_FILE
    return frozenset(read_weight_map(index).values()) if index.is_file() else frozenset()


def is_glm(snapshot: Path, selection: Selection) -> bool:
    """Whether a model looks like one of GLM's; other tools keep all kinds of models in the same cache."""
    if selection.format == "gguf":
        return True  # its header would have to be read
    try:
        model_type = read_json_object(snapshot / "config.json").get("model_type")
    except (OSError, GlmlocalError):
        return False
    return isinstance(model_type, str) and model_type.startswith("glm")


def remove(cache: RepoCache, links: Iterable[Path]) -> int:
    """Remove links, then the blobs that nothing refers to any more; returns the bytes freed. The lock must be held."""
    snapshots = cache.directory / "snapshots"
    for link in links:
        link.unlink(missing_ok=True)
    for root, _, _ in os.walk(snapshots, topdown=False):
        with suppress(OSError):
            os.rmdir(root)  # only where nothing is left
    kept = {file.digest for snapshot in cache.snapshots() for file in snapshot_files(snapshot)}
    freed = 0
    if not kept:
        freed = sum(blocks_bytes(path) for path in cache.directory.rglob("*") if not path.is_symlink())
        _remove_repository(cache.directory)
        return freed
    for blob in (cache.directory / "blobs").iterdir():
        if blob.name not in kept:
            freed += blocks_bytes(blob)
            blob.unlink()
    return freed


def _remove_repository(directory: Path) -> None:
    """With what is known to belong to one: the directory may be somebody's link to another disk."""
    for part in (directory / name for name in _PARTS):
        if part.is_symlink():
            part.unlink()
        elif part.is_dir():
            shutil.rmtree(part)
    if directory.is_symlink():
        directory.unlink()
    else:
        with suppress(OSError):
            directory.rmdir()


def blocks_bytes(path: Path) -> int:
    """What a file takes on its disk, holes not counted; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
