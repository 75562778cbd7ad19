"""Only a family was named: which of its releases suits this machine, and why, how large and how fast it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from glmlocal import catalogue
from glmlocal.catalogue import Release
from glmlocal.errors import ConfigError
from glmlocal.hub.known import hub_id, list_releases
from glmlocal.hub.names import HubName
from glmlocal.planner.machine import Machine
from glmlocal.planner.plan import Plan, Wants
from glmlocal.units import format_bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """A release, and how it is to be loaded for this machine to hold it."""

    hub_id: str  # org/name[:QUANT]
    quant: str  # of --quant

    @property
    def words(self) -> str:
        """What to type after ``glmlocal chat`` and the like."""
        return self.hub_id + ("" if self.quant == "keep" else f" --quant {self.quant}")


def choose_release(
    family: str,
    hub: HubName,
    machine: Machine | None = None,
    tell: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Choice:
    """The finest release whose every byte this machine holds, of those that are on the hub and that this version runs.

    ``tell`` is given the reasons, a few lines. Raises ConfigError where none fits.
    """
    from glmlocal.planner.probe import runtime_machine
    from glmlocal.planner.solve import choose
    from glmlocal.planner.subject import subject

    known = {release.name: release for release in catalogue.releases() if release.runs and getattr(release, hub)}
    footprints = [each for each in subject(family).footprints if each.name in known]
    if not footprints:
        list_releases(family, hub)
    plan = choose(footprints, machine or runtime_machine(), Wants())
    if not plan.fits:
        raise ConfigError(_refusal(family, plan))
    release = known[plan.name]
    tell(_reasons(family, plan, release, len({each.name for each in footprints})))
    return Choice(hub_id(release, hub), plan.quant)


def _reasons(family: str, plan: Plan, release: Release, count: int) -> str:
    assert plan.forecast is not None
    used = sum(device.used_bytes for device in plan.devices if device.kind != "nvme")
    room = sum(device.capacity_bytes for device in plan.devices if device.kind != "nvme")
    decode = plan.forecast.decode_tokens_per_s[min(plan.forecast.decode_tokens_per_s)]
    how = "" if plan.quant == "keep" else f", loaded with --quant {plan.quant},"
    return (
        f"{family} is a family: of the {count} releases tried, {release.name}{how} is the finest that this machine "
        f"holds, with {format_bytes(used)} of {format_bytes(room)}\n"
        f"download {format_bytes(plan.download_bytes)}; context {plan.resolved.context:,} tokens; about "
        f"{decode.value:.3g} tok/s ({decode.low:.3g} – {decode.high:.3g}, {decode.basis}), prompts at "
        f"{plan.forecast.prefill_tokens_per_s.value:.3g} tok/s; `glmlocal plan {family} --compare` shows the others"
    )


def _refusal(family: str, plan: Plan) -> str:
    assert plan.shortfall is not None
    return (
        f"no release of {family} fits this machine; the smallest tried is {plan.name}: {plan.shortfall.text}; "
        f"take a smaller family, or name a release to fetch it for another machine "
        f"(`glmlocal plan {family} --compare` lists them)"
    )
