"""MODEL → what there is to plan for: footprints, finest first. Reads the catalogue, or a checkpoint's headers.

A checkpoint that is on no disk here is asked for at its hub: some hundred KB of each file, never weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.errors import ConfigError, DownloadError
from glmlocal.models.footprint import Footprint
from glmlocal.models.footprints import of_checkpoint, of_release
from glmlocal.planner import routes

if TYPE_CHECKING:
    from glmlocal.formats.index import Checkpoint
    from glmlocal.opened import Opened

_OFFICIAL = ("bf16", "fp8_channel", "fp8_block128")  # formats whose weights loading can still quantize
# Of the many files of a GGUF repository, those that are tried for a family: beyond 4 bits, what int4 does not reach.
_GGUF_QUANTS = ("Q4_K_M", "Q3_K_M", "Q2_K")


@dataclass(frozen=True, slots=True)
class Subject:
    """What was named, and in which forms it can be run."""

    footprints: tuple[Footprint, ...]  # finest first; one, unless the choice is left to the planner
    notes: tuple[str, ...] = ()  # about the choice, or what this version does not run


def subject(model: str, quant: str = "auto") -> Subject:
    """A family, a release, a hub id, a checkpoint directory, a ``.gguf`` file or ``demo``.

    What exists as a file counts before names do, as for every command; a hub id that is in no catalogue is looked up on
    its hub. ``quant`` keep, int8 and int4 leave no choice; for a family they mean its BF16 release, or the smallest
    that can be quantized while loading. Raises ConfigError for an unknown name, CheckpointError for a bad file.
    """
    found = None if model == "demo" or Path(model).exists() else catalogue.find(model)
    if isinstance(found, Family):
        return _of_family(found, quant)
    if isinstance(found, Release):
        forms = _ways_to_load(found) if quant == "auto" else (quant,)
        return Subject(tuple(of_release(found, form) for form in forms), _not_run([found]))
    return _of_files(model, quant)


def all_forms(model: str) -> Subject:
    """For ``--compare``: every release of a family and every way to load it; of anything else every way to load it."""
    found = None if model == "demo" or Path(model).exists() else catalogue.find(model)
    if not isinstance(found, Family):
        return subject(model, "auto")
    releases = _releases(found)
    official = [release for release in releases if release.format in _OFFICIAL]
    loaded = [of_release(official[-1], form) for form in ("int8", "int4")] if official else []
    return Subject(_finest_first([*(of_release(release) for release in releases), *loaded]), _not_run(releases))


def engine_releases(model: str) -> tuple[Release, ...]:
    """What another engine could serve under that name, finest first. Raises ConfigError for what is in no catalogue."""
    found = catalogue.find(model)
    if isinstance(found, Release):
        return (found,)
    if isinstance(found, Family):
        return tuple(release for release in _releases(found) if release.format in _OFFICIAL)
    near = catalogue.near_misses(model)
    hint = f"; did you mean {' or '.join(near)}?" if near else ", for example GLM-4.5-Air-FP8"
    raise ConfigError(f"--engine wants a family, release or hub id, and {model[:80]!r} is none{hint}")


def _of_family(family: Family, quant: str) -> Subject:
    releases = _releases(family)
    official = [release for release in releases if release.format in _OFFICIAL]
    if quant == "keep":
        return Subject((of_release(official[0]),), _not_run(official))
    if quant != "auto":
        return Subject((of_release(official[-1], quant),), _not_run(official))
    repository = next((r.huggingface for r in releases if r.format == "gguf"), None)
    tried = [r for r in releases if r.huggingface == repository and r.quant in _GGUF_QUANTS]
    footprints = [of_release(release) for release in (*official[:-1], *tried)]
    footprints += [of_release(official[-1], form) for form in _ways_to_load(official[-1])]
    note = f"{family.name} is a family of {len(releases)} releases: this one was chosen, --compare shows all of them"
    return Subject(_finest_first(footprints), (note, *_not_run(official)))


def _of_files(model: str, quant: str) -> Subject:
    from glmlocal.opened import opened  # brings numpy in

    near = () if Path(model).exists() else catalogue.near_misses(model)
    if near and "/" not in model:
        _check_is_here(model, near)  # what was mistyped is not asked for at a hub
    try:
        with opened(model) as found:
            forms = ("keep", "int8", "int4") if quant == "auto" else (quant,)
            name = _name(model, found)
            footprints = [of_checkpoint(found.checkpoint, form, name) for form in forms]
            curve = _hit_curve(found.checkpoint)
    except DownloadError as error:
        if not near:
            raise
        raise DownloadError(f"{error}; did you mean {' or '.join(near)}, which need no network?") from error
    footprints = [replace(footprint, hit_curve=curve) for footprint in footprints]
    # What is quantized already stays as it is: then all forms are one.
    kept = [footprint for i, footprint in enumerate(footprints) if i == 0 or _held(footprint) != _held(footprints[0])]
    if found.is_remote:
        return Subject(tuple(kept), (f"planned from the headers of {found.where}: no weights were downloaded",))
    return Subject(tuple(kept), ("its files are on this machine: there is nothing to download",))


def _hit_curve(checkpoint: Checkpoint) -> routes.Curve | None:
    """Of a packed model that was run before: its experts' uses in those runs."""
    from glmlocal.offload import trace  # brings numpy in

    pack = checkpoint.tensors.experts
    found = None if pack is None else trace.load(pack)
    if pack is None or found is None or found.num_tokens < routes.LEAST_TOKENS:
        return None
    layers: dict[int, list[float]] = {}
    for key, heat in found.heats.items():
        layers.setdefault(key.layer, []).append(heat)
    with suppress(ValueError):  # a trace is a hint and no more
        return routes.curve_of(layers, pack.num_experts)
    return None


def _check_is_here(model: str, near: Sequence[str]) -> None:
    """Raises ConfigError unless a packed or pulled model has that name."""
    from glmlocal.resolve import resolve

    try:
        resolve(model)
    except ConfigError:
        raise ConfigError(f"there is no model {model[:80]!r}; did you mean {' or '.join(near)}?") from None


def _name(model: str, found: Opened) -> str | None:
    """Where the file's or directory's own is not what a person would say: a snapshot's is its commit."""
    is_snapshot = found.is_remote and found.checkpoint.path.suffix != ".gguf"
    return model if model == "demo" or is_snapshot else None


def _releases(family: Family) -> list[Release]:
    return [release for release in catalogue.releases() if release.family.name == family.name]


def _finest_first(footprints: Sequence[Footprint]) -> tuple[Footprint, ...]:
    """More bytes are finer; of equals the smaller download."""
    return tuple(sorted(footprints, key=lambda footprint: (-_held(footprint), footprint.file_bytes)))


def _held(footprint: Footprint) -> int:
    return sum(layer.nbytes for layer in footprint.layers)


def _not_run(releases: Sequence[Release]) -> tuple[str, ...]:
    """What keeps this version from running any of them."""
    if any(release.runs for release in releases):
        return ()
    release = releases[0]
    what = f"the {release.format} format" if release.family.runs else f"the architecture of {release.family.name}"
    return (f"this version of glmlocal plans for {what} but does not run it",)


def _ways_to_load(release: Release) -> tuple[str, ...]:
    """Finest first. FP8 to int8 would round once more and save nothing."""
    if release.format not in _OFFICIAL:
        return ("keep",)
    return ("keep", "int8", "int4") if release.format == "bf16" else ("keep", "int4")
