"""The catalogue of known models: families with their configs, and the releases of each on the hubs.

``catalogue.json`` is knowledge of a date (``as_of``): what a release is called, where it is, how it is stored. Nothing
is fetched; what is not known is None. Of GGUF repositories it has the files whose types glmlocal's kernels have.
Imports nothing but the standard library: it is read before anything else is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Format = Literal["bf16", "fp8_channel", "fp8_block128", "gptq", "awq", "compressed_tensors", "mlx", "gguf"]
MTP = Literal["with copies", "without copies", "none"]  # of the embeddings and the head, in the MTP layer

_RUNNABLE_MODEL_TYPES = frozenset({"glm4_moe"})


@dataclass(frozen=True, slots=True)
class Family:
    """One set of weights, in however many releases."""

    name: str  # "GLM-4.5-Air"
    config: Mapping[str, Any]  # config.json, Hugging Face's names
    note: str | None = None

    @property
    def runs(self) -> bool:
        """Does this version of glmlocal run the architecture?"""
        return self.config["model_type"] in _RUNNABLE_MODEL_TYPES


@dataclass(frozen=True, slots=True)
class Release:
    """One thing that can be downloaded."""

    name: str  # "GLM-4.5-Air-FP8", "GLM-4.5-Air-GGUF:Q4_K_M"
    family: Family
    format: Format
    recipe: Mapping[str, str]  # what is stored → in which of formats.forms.FORMS; empty for GGUF: ``quant`` says it
    huggingface: str | None  # repository
    modelscope: str | None
    quant: str | None  # of one repository's several: "Q4_K_M"
    mtp: MTP
    published_bytes: int | None  # as somebody published it, often rounded
    published_source: str | None
    note: str | None

    @property
    def runs(self) -> bool:
        """Does this version of glmlocal run it? It reads every format, but not every architecture."""
        return self.family.runs

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """As typed: "unsloth/GLM-4.5-Air-GGUF:Q4_K_M"; Hugging Face's first."""
        suffix = "" if self.quant is None else f":{self.quant}"
        ids = (self.huggingface, self.modelscope)
        return tuple(dict.fromkeys(f"{repository}{suffix}" for repository in ids if repository))


def as_of() -> str:
    """The day of the knowledge, "2026-11-23"."""
    return _load().as_of


def families() -> tuple[Family, ...]:
    return _load().families


def releases() -> tuple[Release, ...]:
    """All, the original ones of each family first."""
    return _load().releases


def find(name: str) -> Release | Family | None:
    """What a person means, upper or lower case; None if it is in no catalogue.

    A family ("GLM-4.5-Air"), a release ("GLM-4.5-Air-FP8"), a repository of either hub ("zai-org/GLM-4.5-Air" is the
    BF16 release), or a file of a GGUF repository ("unsloth/GLM-4.5-Air-GGUF:Q4_K_M"; "GLM-4.5-Air:Q4_K_M" and
    "GLM-4.5-Air-Q4_K_M" are the first repository's that has it).
    """
    return _load().by_name.get(name.strip().lower())


def in_repository(repository: str) -> tuple[Release, ...]:
    """Releases in a hub's repository (several for GGUF), upper or lower case."""
    wanted = repository.strip().lower()
    ids = ((release, (release.huggingface, release.modelscope)) for release in releases())
    return tuple(release for release, both in ids if wanted in (repo.lower() for repo in both if repo))


def near_misses(name: str) -> tuple[str, ...]:
    """Up to three names that ``find`` knows: those that go on where this one ends, then those that look like it."""
    import difflib  # here: it takes as long to import as everything else

    typed, by_name = name.strip().lower(), _load().by_name
    if not typed:
        return ()
    longer = sorted((known for known in by_name if known.startswith(typed)), key=len)
    close = difflib.get_close_matches(typed, list(by_name), n=9, cutoff=0.6)
    tail = typed.rpartition("/")[2]  # that two repositories are one owner's makes them no more alike
    close = [known for known in close if difflib.SequenceMatcher(None, tail, known.rpartition("/")[2]).ratio() >= 0.6]
    return tuple(dict.fromkeys(by_name[known].name for known in (*longer, *close)))[:3]


@dataclass(frozen=True, slots=True)
class _Catalogue:
    as_of: str
    families: tuple[Family, ...]
    releases: tuple[Release, ...]
    by_name: Mapping[str, Release | Family]  # names as typed, lower case


@cache
def _load() -> _Catalogue:
    stored = json.loads(Path(__file__).with_name("catalogue.json").read_text("utf-8"))
    families = {entry["name"]: Family(**entry) for entry in stored["families"]}
    recipes = {"gguf": {}, **stored["recipes"]}
    releases = tuple(release for entry in stored["releases"] for release in _releases(entry, families, recipes))
    by_name: dict[str, Release | Family] = {name.lower(): family for name, family in families.items()}
    for release in releases:
        for name in _names(release):
            by_name.setdefault(name.lower(), release)
    return _Catalogue(stored["as_of"], tuple(families.values()), releases, by_name)


def _releases(
    entry: Mapping[str, Any], families: Mapping[str, Family], recipes: Mapping[str, Mapping[str, str]]
) -> Iterator[Release]:
    """Of one entry: a repository, which holds one release, or several for GGUF."""
    sizes: Mapping[str | None, int | None] = entry.get("quants", {None: entry.get("published_bytes")})
    for quant, size in sizes.items():
        yield Release(
            name=entry["name"] if quant is None else f"{entry['name']}:{quant}",
            family=families[entry["family"]],
            format=entry["format"],
            recipe=recipes[entry["recipe"]],
            huggingface=entry["huggingface"],
            modelscope=entry["modelscope"],
            quant=quant,
            mtp=entry["mtp"],
            published_bytes=size,
            published_source=None if size is None else entry["published_source"],
            note=entry.get("note"),
        )


def _names(release: Release) -> Iterator[str]:
    yield release.name
    yield from release.hub_ids
    yield from (hub_id.partition("/")[2] for hub_id in release.hub_ids)
    if release.quant is not None:
        yield f"{release.family.name}:{release.quant}"
        yield f"{release.family.name}-{release.quant}"
