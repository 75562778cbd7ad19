"""Names of releases, from the catalogue: what ``names.parse_source`` is given to look them up in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from glmlocal import catalogue
from glmlocal.catalogue import Family, Release
from glmlocal.errors import ConfigError
from glmlocal.hub.names import HubName
from glmlocal.units import format_bytes

# A family's name → the ``org/name`` or ``org/name:QUANT`` of one of its releases.
Choose = Callable[[str, HubName], str]


def list_releases(family: str, hub: HubName) -> NoReturn:
    """The ``Choose`` of somebody who wants to be told: raises ConfigError with the family's releases on that hub."""
    known = _on_hub(family, hub)
    if not known:
        raise ConfigError(f"no release of {family} is known on {hub}; try the other hub (--hub)")
    what = "is a family of releases; name one of them"
    if not any(release.runs for release in known):
        what = "is a family that this version does not run; to fetch it all the same, name a release"
    raise ConfigError(f"{family} {what}: {', '.join(f'{each.name}{_size(each.published_bytes)}' for each in known)}")


def hub_ids(family: str, hub: HubName) -> list[str]:
    """The ``org/name[:QUANT]`` of every release of a family on a hub that this version runs."""
    return [hub_id(release, hub) for release in _releases(family, hub)]


@dataclass(frozen=True, slots=True)
class KnownReleases:
    """``names.Catalogue`` over ``glmlocal.catalogue``. ``choose`` decides where only a family was named."""

    choose: Choose = list_releases

    def find(self, name: str, hub: HubName) -> str | None:
        found = catalogue.find(name)
        if found is None:
            return None
        if isinstance(found, Family):
            return self.choose(found.name, hub)
        if getattr(found, hub) is None:
            other = f"; it is at {', '.join(found.hub_ids)}" if found.hub_ids else ""
            raise ConfigError(f"no repository of {found.name} is known on {hub}{other}")
        return hub_id(found, hub)

    def near_misses(self, name: str) -> Sequence[str]:
        return catalogue.near_misses(name)


def _releases(family: str, hub: HubName) -> list[Release]:
    return [release for release in _on_hub(family, hub) if release.runs]


def _on_hub(family: str, hub: HubName) -> list[Release]:
    every = catalogue.releases()
    return [release for release in every if release.family.name == family and getattr(release, hub)]


def hub_id(release: Release, hub: HubName) -> str:
    """``org/name``, or ``org/name:QUANT`` of a GGUF repository; the release must be on that hub."""
    return f"{getattr(release, hub)}:{release.quant}" if release.quant else str(getattr(release, hub))


def _size(num_bytes: int | None) -> str:
    return f" ({format_bytes(num_bytes)})" if num_bytes else ""
