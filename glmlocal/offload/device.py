"""What the GPU tier asks of a device: memory for slots, uploads and expert products that run beside the caller.

Everything begun on a device runs in the background and is only known to be done by its event: until then an uploaded
slot, or the rows of a product, hold nothing that may be used. ``fake_gpu`` and ``torch_gpu`` implement it, ``devices``
finds what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.schemes import Activations


class Event(Protocol):
    """The end of something that was begun. What went wrong with it is raised by ``wait``."""

    def is_done(self) -> bool: ...

    def wait(self) -> None: ...


class SlotMemory(Protocol):
    """Slots of ``slot_bytes`` in a device's memory, numbered from 0."""

    def upload(self, slot: int, source: NDArray[np.uint8], after: Event | None = None) -> Event:
        """Begin to copy a record, uint8 [at most slot_bytes], into a slot, but not before ``after`` on this device.

        The caller keeps ``source`` as it is until the event.
        """
        ...


class DeviceExperts(Protocol):
    """The experts of layers whose records are of one form."""

    def rows(
        self,
        memory: SlotMemory,
        x: Tensor,
        topk_ids: Tensor,
        placed: Sequence[tuple[int, int]],
        out: Tensor,
        after: Sequence[Event] = (),
    ) -> Event:
        """Begin what ``kernels.cpu.slots.SlotExperts.rows`` does, for (expert, slot) of ``memory``, behind ``after``.

        Until the event the caller keeps x, topk_ids and the slots as they are, and leaves those rows of ``out`` alone.
        """
        ...


class Device(Protocol):
    @property
    def name(self) -> str: ...

    def allocate(self, num_slots: int, slot_bytes: int) -> SlotMemory:
        """Raises PlanError where there is not so much memory."""
        ...

    def bind(self, layout: ExpertLayout, num_experts: int, activations: Activations) -> DeviceExperts: ...
