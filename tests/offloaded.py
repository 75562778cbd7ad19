"""``glmlocal serve`` over a tiny packed model with few expert slots, and a disk that breaks when it is told to.

    python tests/offloaded.py serve PACK --port 0 --announce

Environment: OFFLOADED_SLOTS; OFFLOADED_FAULT, a file: while it is there, holding an errno's name, reads end with that.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import packed
from glmlocal import llm
from glmlocal.formats.expert_pack import ExpertPack
from glmlocal.formats.index import Checkpoint
from glmlocal.offload import nvme
from glmlocal.offload.nvme import Reader
from glmlocal.planner.plan import Plan


class Breakable:
    def __init__(self, inner: Reader, fault: Path) -> None:
        self._inner, self._fault = inner, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def next(self, timeout_s: float) -> tuple[int, int] | None:
        found = self._inner.next(timeout_s)
        if found is None or not self._fault.exists():
            return found
        return found[0], getattr(errno, self._fault.read_text())


def main() -> int:
    plan_here, open_reader = llm.plan_here, nvme.open_reader

    def few_slots(checkpoint: Checkpoint, *args: Any) -> Plan:
        return packed.offloaded(plan_here(checkpoint, *args), checkpoint, int(os.environ["OFFLOADED_SLOTS"]))

    def breakable(pack: ExpertPack, most_reads: int) -> Any:
        return Breakable(open_reader(pack, most_reads), Path(os.environ["OFFLOADED_FAULT"]))

    llm.plan_here, nvme.open_reader = few_slots, breakable  # type: ignore[assignment]
    from glmlocal.cli.main import main as real_main

    return real_main()


if __name__ == "__main__":
    sys.exit(main())
