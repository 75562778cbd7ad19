"""Bytes that have just arrived, kept for whoever hashes them: reading them back would cost a copy of everything."""

from __future__ import annotations

import threading

from glmlocal.units import MIB

_MOST_BYTES = 64 * MIB  # then what comes is read back from the page cache after all


class Recent:
    """Chunks of files, by file and offset. Any thread may call anything."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[object, dict[int, bytes]] = {}
        self._free_bytes = most_bytes

    def add(self, file: object, offset: int, chunk: bytes) -> None:
        """Keep a chunk that was written, if there is room."""
        with self._lock:
            if len(chunk) <= self._free_bytes and offset not in self._chunks.setdefault(file, {}):
                self._chunks[file][offset] = chunk
                self._free_bytes -= len(chunk)

    def take(self, file: object, offset: int) -> bytes | int:
        """The chunk that begins there; or where the next one does that is kept (or a very large number).

        Chunks before ``offset`` are forgotten.
        """
        with self._lock:
            chunks = self._chunks.get(file, {})
            chunk = chunks.pop(offset, None)
            if chunk is not None:
                self._free_bytes += len(chunk)
                return chunk
            for begin in [begin for begin in chunks if begin < offset]:  # read back instead
                self._free_bytes += len(chunks.pop(begin))
            return min(chunks, default=1 << 62)

    def drop(self, file: object) -> None:
        """Forget a file: it is complete, or starts over."""
        with self._lock:
            self._free_bytes += sum(map(len, self._chunks.pop(file, {}).values()))
