"""What /metrics makes of the engine's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import scripted
from glmlocal.offload.stats import OffloadStats
from glmlocal.offload.store import StoreStats
from glmlocal.server.metrics import Metrics
from glmlocal.server.model import ServerState


@dataclass
class Client:
    """Has experts on NVMe, or all of them in RAM."""

    offload: OffloadStats | None

    def stats(self) -> Client:
        return self

    def as_dict(self) -> dict[str, Any]:
        offload = self.offload
        return {"tiers": offload and offload.tiers(), "nvme": offload and offload.nvme()}


def lines(offload: OffloadStats | None) -> list[str]:
    state = ServerState("x", ("x",))
    state.model = scripted.served_model("b", Client(offload), 1024)  # type: ignore[arg-type]
    return [line for line in Metrics(state).render().decode().splitlines() if "tier_" in line or "nvme_" in line]


def test_tiers_are_labels_and_nvme_has_its_numbers() -> None:
    found = lines(OffloadStats(StoreStats(10, 4, 3, 2, 1, 1.5, 100), 5, 5000, 6000, 2.0, True))
    for line in (
        'glmlocal_tier_hit_rate{tier="ram"} 0.4',
        'glmlocal_tier_lookups{tier="nvme"} 6.0',
        "glmlocal_nvme_read_bytes 6000.0",
        "glmlocal_nvme_read_bytes_per_token 60.0",
        "glmlocal_nvme_stall_s 1.5",
    ):
        assert line in found
    assert not [line for line in lines(None) if not line.startswith("#")]
