"""Packs of tiny models, for tests."""

from __future__ import annotations

from pathlib import Path

from glmlocal.formats.index import open_checkpoint
from glmlocal.models.weights import Quant
from glmlocal.packing.job import plan_job
from glmlocal.packing.local import pack_model


def pack(source: Path, target: Path, quant: Quant = "keep", threads: int = 2) -> Path:
    with (checkpoint := open_checkpoint(source)).tensors:
        job = plan_job(checkpoint, quant, model="tiny", source="tiny")
        pack_model(checkpoint, job, quant, target, threads=threads, on_bytes=lambda num_bytes: None)
    return target


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
