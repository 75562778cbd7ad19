"""Buffers for one file's bytes on their way: received into, written from, and kept for the thread that hashes it.

Reading back from the page cache would cost a copy of everything, and fresh memory for each chunk as much again.
"""

from __future__ import annotations

import threading

from glmlocal.units import MIB

BUFFER_BYTES = MIB  # received, written and hashed at a time: about what stays in a core's cache
_BUFFERS = 16
_WAIT_S = 0.05  # for the hasher to give one back, at most


class Recent:
    """A fixed number of buffers, for one file at a time. One thread hashes; any number receives."""

    def __init__(self, num_buffers: int = _BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._changed = threading.Condition()
        self._buffer_bytes = buffer_bytes
        self._window_bytes = num_buffers * buffer_bytes
        self._unmade = num_buffers  # memory is taken as it is needed
        self._free: list[memoryview] = []
        self._kept: dict[int, tuple[memoryview, int]] = {}  # by offset in the file: a buffer, and how much of it
        self._taken: memoryview | None = None  # being hashed
        self._position = 0  # of the hasher
        self._is_followed = False  # it found what it wanted here the last time, so the hash is what is waited for
        self._arrivals = 0

    def borrow(self, position: int) -> memoryview | None:
        """A buffer for the file's bytes from ``position``; None if they are far from being hashed, or there is none.

        Who is about to bring what is hashed next waits for a buffer while the hasher is busy with what is kept here:
        to run ahead of it would bring the end no nearer.
        """
        with self._changed:
            if self._is_near(position):
                self._changed.wait_for(lambda: self._free or self._unmade or not self._is_followed, _WAIT_S)
            if not self._is_near(position):
                return None
            if self._free:
                return self._free.pop()
            if not self._unmade:
                return None
            self._unmade -= 1
        return memoryview(bytearray(self._buffer_bytes))

    def give_back(self, buffer: memoryview) -> None:
        """Nothing came into it."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def keep(self, position: int, buffer: memoryview, num_bytes: int) -> None:
        """Leave the first ``num_bytes`` of a borrowed buffer, which are at ``position``, to the hasher."""
        with self._changed:
            if position in self._kept:
                self._free.append(buffer)
            else:
                self._kept[position] = buffer, num_bytes
            self._arrivals += 1
            self._changed.notify_all()

    def take(self, position: int) -> memoryview | int:
        """The kept bytes that begin there, until the next call; or where the next ones do (or a very large number).

        What is before ``position`` is forgotten.
        """
        with self._changed:
            if self._taken is not None:
                self._free.append(self._taken)
                self._taken = None
            self._position = position
            for begin in [begin for begin in self._kept if begin < position]:  # it was read back instead
                self._free.append(self._kept.pop(begin)[0])
            buffer, num_bytes = self._kept.pop(position, (None, 0))
            self._is_followed = buffer is not None
            self._changed.notify_all()
            if buffer is None:
                return min(self._kept, default=1 << 62)
            self._taken = buffer
            return buffer[:num_bytes]

    @property
    def arrivals(self) -> int:
        """Changes with everything that comes."""
        return self._arrivals

    def wait(self, arrivals: int, timeout_s: float) -> None:
        """Until something came since ``arrivals`` was that number."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrivals != arrivals, timeout_s)

    def tell(self) -> None:
        """Have ``wait`` return: something came that is not kept, or everything ends."""
        with self._changed:
            self._arrivals += 1
            self._changed.notify_all()

    def _is_near(self, position: int) -> bool:
        return 0 <= position - self._position <= self._window_bytes  # it has the first buffer, this is one more
