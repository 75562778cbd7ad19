"""StepRates: tokens per second of the steps of the last seconds. Torch-free."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from glmlocal.engine.batch import Batch

WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Over the time that steps took; 0 where the last seconds had no such tokens."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float


class StepRates:
    """Counts what steps computed. ``add`` is for the engine's thread, the rest for any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, float, int, int]] = deque()  # end, seconds, decoded, prefilled
        self.num_decoded_tokens = 0
        self.num_prefilled_tokens = 0
        self.num_steps = 0
        self.busy_s = 0.0

    def add(self, start_s: float, end_s: float, batch: Batch) -> None:
        decoded = sum(len(item.token_ids) == 1 for item in batch.requests)
        prefilled = batch.num_tokens - decoded
        with self._lock:
            self._steps.append((end_s, end_s - start_s, decoded, prefilled))
            self._forget(end_s)
            self.num_decoded_tokens += decoded
            self.num_prefilled_tokens += prefilled
            self.num_steps += 1
            self.busy_s += end_s - start_s

    def rates(self, now_s: float | None = None) -> Rates:
        """``now_s`` is of ``time.perf_counter``; None: now."""
        with self._lock:
            self._forget(time.perf_counter() if now_s is None else now_s)
            decode = [(seconds, decoded) for _, seconds, decoded, _ in self._steps if decoded]
            prefill = [(seconds, prefilled) for _, seconds, _, prefilled in self._steps if prefilled]
        return Rates(_rate(decode), _rate(prefill))

    def _forget(self, now_s: float) -> None:
        while self._steps and self._steps[0][0] < now_s - WINDOW_S:
            self._steps.popleft()


def _rate(steps: list[tuple[float, int]]) -> float:
    seconds = sum(step[0] for step in steps)
    return sum(step[1] for step in steps) / seconds if seconds > 0 else 0.0
