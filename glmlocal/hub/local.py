"""What of the hubs is on this disk: found without a network, in Hugging Face's cache and in ours for ModelScope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from glmlocal.errors import CheckpointError, ConfigError, DownloadError, GlmlocalError
from glmlocal.hub import unsynced
from glmlocal.hub.cache import RepoCache, is_glm, local_selection, repositories, snapshot_files
from glmlocal.hub.environment import constants
from glmlocal.hub.known import KnownReleases, hub_ids, list_releases
from glmlocal.hub.names import HUBS, HubName, Source, parse_source
from glmlocal.hub.select import Selection, gguf_models, quant_label
from glmlocal.paths import cache_home


class NotPulled(ConfigError):
    """A model of a hub that is not on this disk, or not whole. ``source`` is what to pull."""

    def __init__(self, source: Source, why: str) -> None:
        super().__init__(f"{source} {why}; fetch it with `{source.pull_command}`")
        self.source = source


class FamilyNotPulled(ConfigError):
    """Only a family was named, and none of its releases is on this disk."""

    def __init__(self, family: str) -> None:
        super().__init__(
            f"no release of {family} is on this disk; fetch the one that suits this machine with "
            f"`glmlocal pull {family}`; `glmlocal plan {family} --compare` shows all of them"
        )
        self.family = family


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One whole model in a cache."""

    source: Source
    cache: RepoCache
    snapshot: Path
    selection: Selection

    @property
    def path(self) -> Path:
        """What ``open_checkpoint`` takes."""
        return self.snapshot / self.selection.first if self.selection.first else self.snapshot

    def is_in_doubt(self) -> bool:
        """Whether the machine went down before one of its files was surely on disk, and nobody has looked since."""
        return not unsynced.in_doubt(self.cache).isdisjoint(file.digest for file in self.selection.files)

    def last_used_s(self) -> float:
        """When one of its files was last read, as far as the filesystem says, or written: seconds since 1970."""
        times = [(self.snapshot / file.path).stat() for file in self.selection.files]
        return max((max(time.st_atime, time.st_mtime) for time in times), default=0.0)


def cache_dir(hub: HubName) -> Path:
    if hub == "modelscope":
        return cache_home() / "modelscope"
    return Path(constants().HF_HUB_CACHE)


def find(source: Source, *, settle: bool = True) -> LocalModel:
    """The model, if it is here and whole. Raises NotPulled; ConfigError where a quantization must be chosen.

    Files that may not have reached the disk before the machine went down are hashed first, unless not to ``settle``.
    """
    cache = RepoCache(cache_dir(source.hub), source.repo_id)
    damaged = unsynced.settle(cache) if settle else []
    commit = cache.commit_of(source.revision)
    snapshots = [cache.snapshot(commit)] if commit and cache.snapshot(commit).is_dir() else []
    if source.revision is None:  # a quantization that was pulled before the branch moved is no less the model
        snapshots += [snapshot for snapshot in cache.snapshots() if snapshot not in snapshots]
    problem: NotPulled | None = None
    for snapshot in snapshots:
        try:
            model = _in(snapshot, cache, source)
            if any(file.digest in damaged for file in model.selection.files):  # in a cache that cannot be written
                raise NotPulled(source, "is on this disk, but damaged")
            return model
        except NotPulled as error:
            problem = problem or error
    begun = " (a download has begun)" if cache.partial_bytes() else ""
    raise problem or NotPulled(source, f"is not on this disk{begun}")


def _in(snapshot: Path, cache: RepoCache, source: Source) -> LocalModel:
    try:
        return LocalModel(source, cache, snapshot, local_selection(snapshot, source.repo_id, source.quant))
    except ConfigError:
        if source.quant is not None:
            raise NotPulled(source, "is not on this disk") from None
        raise
    except (CheckpointError, DownloadError, OSError):
        raise NotPulled(source, "is on this disk, but not whole") from None


def find_by_name(model: str) -> LocalModel:
    """As ``find``, for what a person wrote, on either hub; of a family, the one release that is here."""
    problem: ConfigError | None = None
    for hub in HUBS:
        try:
            return find(parse_source(model, KnownReleases(the_one_here), hub=hub))
        except ConfigError as error:  # the first hub's is the one to tell
            problem = problem or error
    assert problem is not None
    raise problem


def the_one_here(family: str, hub: HubName) -> str:
    """A ``known.Choose``: the family's release that was pulled."""
    here, known = [], hub_ids(family, hub)
    for hub_id in known:
        with suppress(ConfigError):
            find(parse_source(hub_id, KnownReleases(), hub=hub))
            here.append(hub_id)
    if len(here) == 1:
        return here[0]
    if here:
        raise ConfigError(f"several releases of {family} are on this disk; name one of them: {', '.join(here)}")
    if known:
        raise FamilyNotPulled(family)
    list_releases(family, hub)


def models() -> Iterator[LocalModel]:
    """Every whole model of GLM's kind in both caches, by hub and name; the newest snapshot of each first."""
    for hub in HUBS:
        for cache in repositories(cache_dir(hub)):
            current = cache.commit_of(None)
            for snapshot in cache.snapshots():
                revision = None if snapshot.name == current else snapshot.name
                yield from _in_snapshot(Source(hub, cache.repo_id, revision=revision), cache, snapshot)


def unfinished() -> Iterator[tuple[HubName, RepoCache]]:
    """Repositories with downloads that wait to be gone on with."""
    for hub in HUBS:
        for cache in repositories(cache_dir(hub)):
            if cache.partial_bytes():
                yield hub, cache


def _in_snapshot(source: Source, cache: RepoCache, snapshot: Path) -> Iterator[LocalModel]:
    quants: list[str | None] = [quant_label(stem) for stem in gguf_models(snapshot_files(snapshot))]
    for quant in quants or [None]:
        with suppress(GlmlocalError, OSError):  # not whole, or another tool's
            selection = local_selection(snapshot, source.repo_id, quant)
            if is_glm(snapshot, selection):
                yield LocalModel(replace(source, quant=quant), cache, snapshot, selection)
