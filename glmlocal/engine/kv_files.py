"""BlockFiles: KV blocks in a directory, one file each, within a size limit. Torch-free; bytes in, bytes out.

    DIR/<model>/<block name>.kv     header, payload
    DIR/<model>/.<number>.tmp       being written

``model`` names everything that makes blocks of one model, cache type and layout unfit for another. A file appears whole
or not at all (rename), is believed only if its header and checksum are right, and may vanish at any time: other
processes keep to the limit too. Conversations are in there, so only the user may read it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import xxhash

from glmlocal.errors import ConfigError

log = logging.getLogger(__name__)

VERSION = 1
# magic with version, model, block name, bytes of the payload, its xxh3-128
_HEADER = struct.Struct("<8s16s16sQ16s")
_MAGIC = b"GLMKV\0" + VERSION.to_bytes(2, "little")
_SUFFIX, _TEMPORARY = ".kv", ".tmp"
_STALE_S = 3600.0  # a temporary file this old is of a process that died


class BlockFiles:
    """Safe from several threads. Files of other models count towards the limit, and go like one's own when they are
    the least recently used."""

    def __init__(self, directory: Path, limit_bytes: int, model: str, payload_bytes: int) -> None:
        """``model`` is 32 hex digits; every payload has ``payload_bytes``. Raises ConfigError for a directory that
        cannot be used."""
        self.limit_bytes, self.payload_bytes = limit_bytes, payload_bytes
        self.num_ignored = 0
        self._model, self._own = bytes.fromhex(model), directory / model
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards what follows
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # least recently used first
        self._stored_bytes = 0
        try:
            self._own.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = self._own / f".{os.getpid()}{_TEMPORARY}"
            probe.write_bytes(b"")
            probe.unlink()
            self._scan(directory)
        except OSError as error:
            raise ConfigError(
                f"KV snapshots cannot be kept in {directory}: {error.strerror or error}; give another --kv-dir"
            ) from error
        with self._lock:
            self._make_room(0)

    @property
    def stored_bytes(self) -> int:
        return self._stored_bytes

    def __contains__(self, name: bytes) -> bool:
        return self._path(name) in self._sizes

    def touch(self, names: Sequence[bytes]) -> None:
        """These were of use; the first of them the most."""
        for name in reversed(names):
            path = self._path(name)
            with self._lock:
                if path not in self._sizes:
                    continue
                self._sizes.move_to_end(path)
            with contextlib.suppress(OSError):
                os.utime(path)

    def read(self, name: bytes, into: memoryview) -> bool:
        """Fill ``into`` [payload_bytes]; False, forgetting the file, if it is gone, damaged or of something else."""
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                header = file.read(_HEADER.size)
                size = _read_all(file.fileno(), into)
                has_more = bool(file.read(1))
        except OSError:
            self._forget(path)
            return False
        expected = _HEADER.pack(_MAGIC, self._model, name, self.payload_bytes, xxhash.xxh3_128_digest(into))
        if header == expected and size == self.payload_bytes and not has_more:
            return True
        self.num_ignored += 1
        log.warning("%s is damaged or not a KV snapshot of this model; it is removed", path)
        with contextlib.suppress(OSError):
            path.unlink()
        self._forget(path)
        return False

    def write(self, name: bytes, payload: memoryview) -> None:
        """Store a block; the least recently used ones make room. Raises OSError, leaving nothing behind."""
        path, size = self._path(name), _HEADER.size + self.payload_bytes
        if size > self.limit_bytes:
            return
        with self._lock:
            if path in self._sizes:
                return
            self._make_room(size)
        temporary = self._own / f".{os.getpid()}-{next(self._numbers)}{_TEMPORARY}"
        header = _HEADER.pack(_MAGIC, self._model, name, self.payload_bytes, xxhash.xxh3_128_digest(payload))
        try:
            with open(temporary, "xb", buffering=0, opener=_private) as file:
                file.write(header)
                written = 0
                while written < len(payload):
                    written += file.write(payload[written:]) or 0
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with self._lock:
            self._sizes[path] = size
            self._stored_bytes += size

    def _path(self, name: bytes) -> Path:
        return self._own / (name.hex() + _SUFFIX)

    def _scan(self, directory: Path) -> None:
        """Find what is there, of all models; sweep what was left half written."""
        found = []
        for path in directory.glob("*/*"):
            try:
                stat = path.lstat()
                if path.suffix == _TEMPORARY and path.name.startswith(".") and stat.st_mtime < time.time() - _STALE_S:
                    path.unlink()
            except OSError:
                continue
            if path.suffix == _SUFFIX:
                found.append((stat.st_mtime_ns, path, stat.st_size))
        for _, path, size in sorted(found):
            self._sizes[path] = size
            self._stored_bytes += size

    def _make_room(self, size: int) -> None:
        while self._sizes and self._stored_bytes + size > self.limit_bytes:
            path, gone = self._sizes.popitem(last=False)
            self._stored_bytes -= gone
            with contextlib.suppress(OSError):
                path.unlink()

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._stored_bytes -= self._sizes.pop(path, 0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_all(file: int, into: memoryview) -> int:
    done = 0
    while done < len(into) and (count := os.readv(file, [into[done:]])):
        done += count
    return done
