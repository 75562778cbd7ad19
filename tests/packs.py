"""Packs of tiny models, for tests."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from glmlocal.formats.index import open_checkpoint
from glmlocal.models.weights import Quant
from glmlocal.packing import make
from glmlocal.packing.job import plan_job
from glmlocal.packing.local import pack_model


def pack(source: Path, target: Path, quant: Quant = "keep", threads: int = 2) -> Path:
    with (checkpoint := open_checkpoint(source)).tensors:
        job = plan_job(checkpoint, quant, model="tiny", source="tiny")
        pack_model(checkpoint, job, quant, target, threads=threads, on_bytes=lambda num_bytes: None)
    return target


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class CountedWrites:
    """Counts calls of the functions that change the disk; at a number of them, something else happens first."""

    names = ("pwrite", "ftruncate", "fsync", "fdatasync", "rename", "replace", "unlink")

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, happens: Callable[[], None] = lambda: None) -> None:
        self.count, self._at, self._happens = 0, at, happens
        for name in self.names:
            patch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **named: object) -> object:
            self.count += 1
            if self.count == self._at:
                self._happens()
            return function(*args, **named)

        return call


def killed_at(call: int, action: Callable[[], object]) -> None:
    """Run it in a process of its own, which is killed at that call that changes the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forked with threads: it only ever runs this
        child = os.fork()
    if child == 0:
        try:
            patch = pytest.MonkeyPatch()
            patch.setattr(make, "COMMIT_EVERY_S", 0.0)
            CountedWrites(patch, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            action()
        finally:
            os._exit(1)  # it was to be killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"call {call} never came"
