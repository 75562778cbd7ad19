"""Only a family was named: which of its releases suits this machine, and why, how large and how fast it is.

The finest that memory holds; where it holds none, the one that runs fastest with its experts read from the disk, which
is possible out of a pack only.
"""

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
    must_be_packed: bool = False  # memory does not hold all of its experts

    @property
    def words(self) -> str:
        """What to type after ``glmlocal chat`` and the like."""
        return self.hub_id + ("" if self.quant == "keep" else f" --quant {self.quant}")

    @property
    def next_step(self) -> str:
        """What to do once its files are here."""
        if self.must_be_packed:
            return f"memory does not hold it; pack it with `glmlocal pack {self.hub_id} --quant {self.quant}` to run it"
        return f"run it with `glmlocal chat {self.words}`"


def choose_release(
    family: str,
    hub: HubName,
    machine: Machine | None = None,
    tell: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Choice:
    """Of the releases that are on the hub and that this version runs, the one for this machine.

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
    return Choice(hub_id(release, hub), plan.quant, _reads_experts(plan))


def _reads_experts(plan: Plan) -> bool:
    return plan.placement is not None and any(plan.placement.nvme_experts)


def _reasons(family: str, plan: Plan, release: Release, count: int) -> str:
    assert plan.forecast is not None
    used = sum(device.used_bytes for device in plan.devices if device.kind != "nvme")
    room = sum(device.capacity_bytes for device in plan.devices if device.kind != "nvme")
    decode = plan.forecast.decode_tokens_per_s[min(plan.forecast.decode_tokens_per_s)]
    how = "" if plan.quant == "keep" else f", loaded with --quant {plan.quant},"
    why, then = f"of the {count} releases tried, {release.name}{how} is the finest that this machine holds", ""
    if _reads_experts(plan):
        why = (
            f"none of the {count} releases tried fits into memory; {release.name}{how} runs fastest with experts read "
            "from the disk"
        )
        then = (
            f"\nfor that it must be packed: `glmlocal pull {family} --pack` fetches and packs at once, which takes "
            f"{format_bytes(plan.disk_bytes - plan.download_bytes)} of disk and a few shards"
        )
    return (
        f"{family} is a family: {why}, with {format_bytes(used)} of {format_bytes(room)} of memory\n"
        f"download {format_bytes(plan.download_bytes)}; context {plan.resolved.context:,} tokens; about "
        f"{decode.value:.3g} tok/s ({decode.low:.3g} – {decode.high:.3g}, {decode.basis}), prompts at "
        f"{plan.forecast.prefill_tokens_per_s.value:.3g} tok/s; `glmlocal plan {family} --compare` shows the others"
        f"{then}"
    )


def _refusal(family: str, plan: Plan) -> str:
    assert plan.shortfall is not None
    return (
        f"no release of {family} fits this machine; the smallest tried is {plan.name}: {plan.shortfall.text}; "
        f"take a smaller family, or name a release to fetch it for another machine "
        f"(`glmlocal plan {family} --compare` lists them)"
    )
