"""Foresight: are guesses of what a layer will ask for good enough to read by them, and how much fits in the time?

As soon as a layer's experts are under way, the next layer's router is asked what it would choose if neither they nor
its own attention added anything (the shared expert has been added where experts are missing). When they have arrived
the disk would be idle until that layer knows what it wants; the likeliest of the missing experts are read then
(``ExpertStore.expect``). A guess that was right saves that time. One that was wrong costs the small pieces that are
under way when the layer knows better, and a slot's content that was worth least. So guesses are compared with what was
asked for, read by or not, and none are made where little is waited for the disk. Torch-free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

# Of the experts that were guessed first; below that nothing is read. A wrong guess costs a quarter of what a right one
# brings, or less: 2 MiB of the disk's time, and a slot's content (docs/design/007-reading-ahead.md).
RIGHT_ABOVE = 0.25
LEAST_GUESSES = 16  # compared before anything is read
SHADOW_EVERY = 8  # layers: how often a guess is made only to be compared
WORTH = 4.0  # waiting per layer over the cost of a guess, from which on guesses are made
_MEMORY = 1 / 32  # of the latest in a mean


class Foresight:
    """One for all layers over a store, which take turns: ``wants_guess``, ``guessed``, ``compare``."""

    def __init__(self) -> None:
        self._guess: tuple[int, ...] = ()
        self._idle_s: float | None = None  # since when the latest guess is read
        self._num_compared = self._turn = 0
        self._right = 0.0  # mean of what part of a guess was right
        self._stall_s = self._cost_s = self._window_s = 0.0  # means: waited per layer, of a guess, from it to the layer

    @property
    def right(self) -> float:
        """What part of the experts that were guessed was asked for, of late."""
        return self._right

    @property
    def is_trusted(self) -> bool:
        return self._num_compared >= LEAST_GUESSES and self._right >= RIGHT_ABOVE

    def wants_guess(self) -> bool:
        """Once per layer and step: is it worth the time? Now and then also where it is not, to know whether it is."""
        self._turn += 1
        if self._num_compared < LEAST_GUESSES or self._turn % SHADOW_EVERY == 0:
            return self._stall_s > 0 or self._num_compared == 0
        return self.is_trusted and self._stall_s > WORTH * self._cost_s

    def most_reads(self, bytes_per_s: float, record_bytes: int) -> int:
        """How many records the disk can begin before the layer knows what it wants, 1 at least.

        In a time twice as long as usual: what it does not come to is given up and costs a slot's content alone.
        """
        return 1 + math.ceil(2 * self._window_s * bytes_per_s / record_bytes)

    def arrived(self) -> None:
        """The disk has read all that was asked for; what is guessed is read from now on."""
        if self._idle_s is not None:
            self._idle_s = time.perf_counter()

    def guessed(self, missing: Sequence[int], cost_s: float) -> None:
        """The experts, not in a slot, that are or would be read, and what it took to guess."""
        self._guess, self._idle_s = tuple(missing), time.perf_counter()
        self._cost_s = _mean(self._cost_s, cost_s)

    def compare(self, asked: Collection[int]) -> None:
        """What the layer asks for now, whether it was guessed or not."""
        if self._idle_s is not None:
            self._window_s = _mean(self._window_s, time.perf_counter() - self._idle_s)
        if self._guess:
            right = sum(expert in asked for expert in self._guess) / len(self._guess)
            self._num_compared += 1
            self._right += (right - self._right) * max(_MEMORY, 1 / self._num_compared)
        self._guess, self._idle_s = (), None

    def waited(self, stall_s: float) -> None:
        """For the disk, in this layer."""
        self._stall_s = _mean(self._stall_s, stall_s)


def _mean(before: float, new: float) -> float:
    return new if not before else before + (new - before) * _MEMORY
