"""Where an expert can be. Values; torch-free."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Tier(Enum):
    """Fastest first; the values are the words of plans and of ``/v1/stats``."""

    GPU = "gpu"
    RAM = "ram"
    NVME = "nvme"


class ExpertKey(NamedTuple):
    """One routed expert of the model."""

    layer: int  # of the model, as in the checkpoint's names; MTP layers come after its own
    expert: int


class Residency(Enum):
    """What ``ExpertStore.lookup`` finds."""

    HIT = "hit"  # in a slot
    PENDING = "pending"  # on its way into one
    MISS = "miss"
