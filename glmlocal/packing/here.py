"""The packed models below ``GLMLOCAL_HOME``, whole and unfinished. Reads headers only, without torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack import PACK_FILE, PackHeader, read_pack
from glmlocal.paths import packs_dir

_PARTIAL, _JOURNAL = ".partial", ".partial.journal"


@dataclass(frozen=True, slots=True)
class PackedModel:
    name: str  # what `ls` shows and other commands take
    path: Path
    header: PackHeader | None  # None: not finished, or damaged

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        return sum(file.stat().st_blocks * 512 for file in self.path.iterdir())

    def last_used_s(self) -> float:
        """When one of its files was last read, as far as the filesystem says, or written: seconds since 1970."""
        states = [file.stat() for file in self.path.iterdir()]
        return max((max(state.st_atime, state.st_mtime) for state in states), default=0.0)

    def remove(self) -> int:
        """Returns the bytes freed."""
        num_bytes = self.size_bytes
        shutil.rmtree(self.path)
        self.path.with_name(self.name + _JOURNAL).unlink(missing_ok=True)
        return num_bytes


def packs() -> Iterator[PackedModel]:
    """Every packed model, by name; an unfinished one under the name that it will have."""
    with suppress(OSError):
        for path in sorted(packs_dir().iterdir()):
            if not path.is_dir():
                continue
            if path.name.endswith(_PARTIAL):
                yield PackedModel(path.name.removesuffix(_PARTIAL), path, None)
            elif (path / PACK_FILE).is_file():
                header = None
                with suppress(CheckpointError, OSError):
                    header = read_pack(path / PACK_FILE).header
                yield PackedModel(path.name, path, header)


def find(name: str) -> PackedModel | None:
    return next((pack for pack in packs() if pack.name == name), None)


def made_of(source: str) -> list[str]:
    """Names of the whole packs that were made of a model."""
    return [pack.name for pack in packs() if pack.header is not None and pack.header.source == source]
