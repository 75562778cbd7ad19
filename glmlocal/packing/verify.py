"""Is every record of a pack, and every tensor beside it, what it was when it was made?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.formats.index import TensorIndex, TensorRef, open_checkpoint

_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """A record (layer and expert) or a tensor (name) with other bytes than it was made with."""

    file: str
    layer: int | None
    expert: int | None
    tensor: str | None

    def __str__(self) -> str:
        what = f"the tensor {self.tensor}" if self.tensor else f"the record of layer {self.layer}, expert {self.expert}"
        return f"{self.file}: {what}"


@dataclass(frozen=True, slots=True)
class _Extent:
    path: Path
    offset: int
    nbytes: int
    checksum: int
    damage: Damage


def verify_pack(directory: Path, threads: int, on_bytes: Callable[[int], object]) -> tuple[int, list[Damage]]:
    """Bytes that were read, and what is damaged. Raises CheckpointError for what is no pack, or whose header is."""
    with open_checkpoint(directory).tensors as tensors:
        if tensors.experts is None:
            raise ConfigError(f"{directory} is no packed model; `glmlocal pack` makes one")
        extents = list(_extents(tensors))
    done = 0
    damaged = []
    with ThreadPoolExecutor(threads) as pool:
        for extent, is_whole in zip(extents, pool.map(_is_whole, extents), strict=True):
            done += extent.nbytes
            on_bytes(done)
            if not is_whole:
                damaged.append(extent.damage)
    return done, damaged


def _extents(tensors: TensorIndex) -> Iterator[_Extent]:
    pack = tensors.experts
    assert pack is not None
    for record in pack.records():
        damage = Damage(pack.path.name, record.layer, record.expert, None)
        yield _Extent(pack.path, record.offset, record.nbytes, record.checksum, damage)
    parts = (part for ref in tensors.values() for part in ref.stored)
    stored = sorted((part for part in parts if part.file != pack.path), key=_offset)
    if len(stored) != len(pack.dense_checksums):
        raise CheckpointError(
            f"{tensors.files[-1]} has {len(stored)} tensors, {pack.path.name} was made with "
            f"{len(pack.dense_checksums)}: the two are of different models; pack the model again"
        )
    for ref, checksum in zip(stored, pack.dense_checksums, strict=True):
        yield _Extent(ref.file, ref.offset, ref.nbytes, checksum, Damage(ref.file.name, None, None, ref.name))


def _offset(ref: TensorRef) -> int:
    return ref.offset


def _is_whole(extent: _Extent) -> bool:
    digest, buffer = xxhash.xxh3_64(), np.empty(min(extent.nbytes, _READ_BYTES), np.uint8)
    try:
        file = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {extent.path}: {error.strerror or error}") from error
    try:
        for begin in range(0, extent.nbytes, _READ_BYTES):
            part = buffer[: min(_READ_BYTES, extent.nbytes - begin)]
            if os.preadv(file, [part.data], extent.offset + begin) != part.nbytes:
                return False
            digest.update(part.data)
    except OSError:  # the disk cannot give these bytes: as good as damaged
        return False
    finally:
        os.close(file)
    return digest.intdigest() == extent.checksum
