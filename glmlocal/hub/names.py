"""MODEL, where it names something on a hub: ``org/name``, ``org/name:QUANT``, ``@revision`` after either, or a name of
the catalogue. Pure; what lies on this disk is ``resolve``'s business."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from glmlocal.errors import ConfigError

HubName = Literal["huggingface", "modelscope"]
HUBS: tuple[HubName, ...] = get_args(HubName)
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"  # one half of a hub id; ASCII by the flag below
_TAIL = r"(?::(?P<quant>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART}){_TAIL}", re.ASCII)
_NAME = re.compile(rf"(?P<name>{_PART}){_TAIL}", re.ASCII)
_ADDRESS = re.compile(
    rf"(?:https?://)?(?:huggingface\.co|hf\.co|(?:www\.)?modelscope\.cn/models)/({_PART}/{_PART}(?::[\w.-]+)?)(?:/.*)?",
    re.ASCII,
)
_MAX_ID_CHARS = 96  # the hub's own limit


@dataclass(frozen=True, slots=True)
class Source:
    """One model on a hub."""

    hub: HubName
    repo_id: str
    quant: str | None = None  # of a GGUF repository
    revision: str | None = None  # a branch, tag or commit; None: the repository's main branch

    def __str__(self) -> str:
        quant = f":{self.quant}" if self.quant else ""
        return f"{self.repo_id}{quant}" + (f"@{self.revision}" if self.revision else "")

    @property
    def pull_command(self) -> str:
        return f"glmlocal pull {self}" + (f" --hub {self.hub}" if self.hub != "huggingface" else "")


class Catalogue(Protocol):
    """What is known of names that are no hub ids."""

    def find(self, name: str, hub: HubName) -> str | None:
        """The ``org/name`` or ``org/name:QUANT`` of a release on that hub, whatever the case; None if unknown.

        ``name`` is a release, a family, a repository of either hub, or one of these with ``:QUANT``.
        """
        ...

    def near_misses(self, name: str) -> Sequence[str]: ...


def parse_source(
    model: str, catalogue: Catalogue, *, hub: HubName = "huggingface", revision: str | None = None
) -> Source:
    """What a person wrote → where it is. ``revision`` is ``--revision``. Raises ConfigError."""
    written = _HUB_ID.fullmatch(model) or _NAME.fullmatch(model)
    if written is None:
        pasted = _ADDRESS.fullmatch(model)
        question = f"did you mean {pasted[1]}? " if pasted else ""
        raise ConfigError(
            f"{model!r} is no name of a model: {question}write org/name, org/name:QUANT (GGUF), org/name@revision, "
            "or a release such as GLM-4.5-Air-FP8"
        )
    parts = written.groupdict()
    name = parts.get("repo") or parts["name"]
    known = catalogue.find(f"{name}:{parts['quant']}", hub) if parts["quant"] else None
    known = known or catalogue.find(name, hub)
    if known is None and "repo" not in parts:
        raise _unknown(model, parts["name"], catalogue)
    found = _HUB_ID.fullmatch(known) if known else None
    repo_id = found["repo"] if found else parts["repo"]
    if len(repo_id) > _MAX_ID_CHARS or "--" in repo_id or ".." in repo_id:
        raise ConfigError(f"{repo_id!r} cannot be a hub id: at most {_MAX_ID_CHARS} characters, without -- and ..")
    if revision and parts["revision"] and revision != parts["revision"]:
        raise ConfigError(f"{model!r} names a revision and --revision another, {revision!r}; give one of them")
    source = Source(hub, repo_id, parts["quant"] or (found["quant"] if found else None))
    chosen = revision or parts["revision"]
    return replace(source, revision=_checked_revision(chosen)) if chosen else source


def _unknown(model: str, name: str, catalogue: Catalogue) -> ConfigError:
    near = [*catalogue.near_misses(name), *difflib.get_close_matches(name.lower(), ["demo"], n=1)]
    question = f"did you mean {' or '.join(near[:3])}?" if near else "write org/name for a repository of a hub"
    return ConfigError(f"no release is called {model!r}; {question}")


def _checked_revision(revision: str) -> str:
    """It becomes a path below ``refs/`` and a part of a URL."""
    parts = revision.split("/")
    if not re.fullmatch(r"[\w./-]{1,200}", revision, re.ASCII) or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{revision!r} is no revision: give a branch, a tag or a commit")
    return revision
