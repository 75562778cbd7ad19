"""What is known of a model's routing from earlier runs: one small file per pack, read at the start, written at the end.

It is a hint and no more: a file that is missing, damaged or of another pack counts as none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmlocal.errors import ConfigError
from glmlocal.formats.expert_pack import ExpertPack, checksum
from glmlocal.offload.tiers import ExpertKey
from glmlocal.paths import traces_dir

log = logging.getLogger(__name__)

_VERSION = 1
_MAX_BYTES = 64 << 20
_LEAST_HEAT = 1e-3  # what is colder is forgotten


@dataclass(frozen=True, slots=True)
class RouteTrace:
    """``heats``: how often an expert was used of late (``eviction.History``), > 0."""

    num_tokens: int  # seen in all runs
    heats: Mapping[ExpertKey, float]


def trace_file(pack: ExpertPack) -> Path:
    """Where the trace of a pack is kept, whatever directory the pack is in. Raises ConfigError without a home."""
    return traces_dir() / f"{checksum(pack.header.to_json()):016x}.json"


def load(pack: ExpertPack) -> RouteTrace | None:
    try:
        path = trace_file(pack)
        if path.stat().st_size > _MAX_BYTES:
            return None
        return _parsed(json.loads(path.read_text("ascii")))
    except FileNotFoundError:
        return None
    except (OSError, ConfigError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.info("the route trace is not used: %s", error)
        return None


def save(pack: ExpertPack, trace: RouteTrace) -> None:
    """Written beside and renamed; that it cannot be written is worth a line in the log, no more."""
    layers: dict[str, dict[str, float]] = {}
    for key, heat in trace.heats.items():
        if heat >= _LEAST_HEAT:
            layers.setdefault(str(key.layer), {})[str(key.expert)] = round(heat, 4)
    text = json.dumps({"version": _VERSION, "num_tokens": trace.num_tokens, "heats": layers})
    try:
        path = trace_file(pack)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except (OSError, ConfigError) as error:
        log.info("the route trace is not kept: %s", error)


def _parsed(value: Any) -> RouteTrace:
    if value["version"] != _VERSION:
        raise ValueError(f"version {value['version']!r}")
    heats = {
        ExpertKey(int(layer), int(expert)): float(heat)
        for layer, experts in value["heats"].items()
        for expert, heat in experts.items()
    }
    if not all(math.isfinite(heat) and heat > 0 for heat in heats.values()):
        raise ValueError("a heat is no number above 0")
    return RouteTrace(int(value["num_tokens"]), heats)
