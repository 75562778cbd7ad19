"""``glmlocal rm --replaced``: remove the pulled checkpoints that packs have taken the place of, in one go.

A checkpoint counts as replaced when a pack was made of it, it has not changed since, and every pack that was made of it
is whole: a damaged one is made again from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmlocal.cli.ask import confirm, somebody_is_there
from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.units import format_bytes

if TYPE_CHECKING:
    from glmlocal.hub.local import LocalModel
    from glmlocal.packing.here import PackedModel


@dataclass(frozen=True, slots=True)
class Replaced:
    """A pulled model and every pack that was made of it."""

    model: LocalModel
    packs: tuple[PackedModel, ...]

    def __str__(self) -> str:
        names = ", ".join(pack.name for pack in self.packs)
        return f"{self.model.source} ({format_bytes(self.model.selection.size_bytes)}, packed as {names})"


def remove_replaced(pack_name: str | None, *, yes: bool) -> int:
    """Of one pack, or of all. Returns the exit code: 2 if a pack is damaged, so that its source had to stay."""
    found = _replaced(pack_name)
    if not found:
        print("nothing on this disk has been replaced by a pack", file=sys.stderr)
        return 0
    question = f"Check the packs, and where they are whole remove {'; '.join(map(str, found))}?"
    if not yes and not confirm(question, default=False):
        print("nothing was removed", file=sys.stderr)
        return 0
    freed = [_remove(each) for each in found]
    print(f"{format_bytes(sum(num_bytes or 0 for num_bytes in freed))} freed", file=sys.stderr)
    return 2 if None in freed else 0


def _replaced(pack_name: str | None) -> list[Replaced]:
    """Raises ConfigError if there is no such pack."""
    from glmlocal.packing import here

    whole = [pack for pack in here.packs() if pack.header is not None]
    if pack_name is not None and all(pack.name != pack_name for pack in whole):
        raise ConfigError(f"there is no whole pack {pack_name!r}; `glmlocal ls` shows the packs of this disk")
    by_source: dict[str, list[PackedModel]] = {}
    for pack in whole:
        assert pack.header is not None
        by_source.setdefault(pack.header.source, []).append(pack)
    chosen = [packs for packs in by_source.values() if pack_name in (None, *(pack.name for pack in packs))]
    return [Replaced(model, tuple(packs)) for packs in chosen if (model := _source_of(packs)) is not None]


def _source_of(packs: Sequence[PackedModel]) -> LocalModel | None:
    """What they were made of, if it was pulled, is still here, and has been packed since."""
    from glmlocal.formats.expert_pack import PACK_FILE
    from glmlocal.hub import local
    from glmlocal.hub.known import KnownReleases
    from glmlocal.hub.names import HUBS, parse_source

    header = packs[0].header
    assert header is not None
    if header.source == "demo" or Path(header.source).exists():
        return None  # not pulled: the demo, or a directory of the user's own
    packed_s = max((pack.path / PACK_FILE).stat().st_mtime for pack in packs)
    for hub in HUBS:
        try:
            # A family's name does not tell which of its releases it was then: that raises.
            model = local.find(parse_source(header.source, KnownReleases(), hub=hub))
        except ConfigError:
            continue
        if model.snapshot.stat().st_mtime <= packed_s:
            return model
    return None


def _remove(replaced: Replaced) -> int | None:
    """The bytes freed; None if a pack is damaged."""
    from glmlocal.hub.cache import remove

    damaged = [pack.name for pack in replaced.packs if not _is_whole(pack.path)]
    if damaged:
        print(f"damaged: {', '.join(damaged)}; {replaced.model.source} stays, to pack it again", file=sys.stderr)
        return None
    cache = replaced.model.cache
    with cache.locked(lambda: print(f"waiting for another process that uses {cache.repo_id}", file=sys.stderr)):
        freed = remove(cache, [replaced.model.snapshot / file.path for file in replaced.model.selection.files])
    print(f"removed {replaced.model.source}: {format_bytes(freed)} freed", file=sys.stderr)
    return freed


def _is_whole(pack: Path) -> bool:
    from glmlocal.cli.pack import num_threads
    from glmlocal.packing.verify import verify_pack
    from glmlocal.progress import byte_bar

    total = sum(file.stat().st_size for file in pack.iterdir() if file.is_file())
    try:
        with byte_bar(f"checking {pack.name}", total, show=somebody_is_there()) as on_bytes:
            _, damaged = verify_pack(pack, num_threads(None), on_bytes)
    except (CheckpointError, OSError):
        return False
    return not damaged
