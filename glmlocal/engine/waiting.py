"""WaitingQueue: who is admitted next. Torch-free."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from glmlocal.engine.sequence import Sequence


class WaitingQueue:
    """Requests that lost their place go first; then clients take turns, and of each the first to come is first."""

    def __init__(self) -> None:
        self._resuming: deque[Sequence] = deque()
        self._clients: OrderedDict[str, deque[Sequence]] = OrderedDict()  # whose turn it is comes first

    def __len__(self) -> int:
        return len(self._resuming) + sum(len(queue) for queue in tuple(self._clients.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resuming
        for queue in self._clients.values():
            yield from queue

    def append(self, sequence: Sequence) -> None:
        self._clients.setdefault(sequence.request.client_id, deque()).append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Put back one that was admitted before."""
        self._resuming.appendleft(sequence)

    def first(self) -> Sequence:
        """The next to be admitted. Raises IndexError when there is none."""
        if self._resuming:
            return self._resuming[0]
        if not self._clients:
            raise IndexError("nobody waits")
        return next(iter(self._clients.values()))[0]

    def pop_first(self) -> Sequence:
        """Take the next; its client goes to the end of the turns."""
        if self._resuming:
            return self._resuming.popleft()
        client_id, queue = next(iter(self._clients.items()))
        sequence = queue.popleft()
        self._clients.move_to_end(client_id)
        if not queue:
            del self._clients[client_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError when it is not here."""
        if sequence in self._resuming:
            self._resuming.remove(sequence)
            return
        queue = self._clients.get(sequence.request.client_id)
        if queue is None:
            raise ValueError(f"request {sequence.request.request_id!r} does not wait")
        queue.remove(sequence)
        if not queue:
            del self._clients[sequence.request.client_id]
