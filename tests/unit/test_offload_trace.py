"""Route traces: kept, found again, and never believed when they are damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from glmlocal.formats.expert_pack import ExpertPack, PackHeader
from glmlocal.formats.expert_pack_layout import expert_layout
from glmlocal.offload import trace
from glmlocal.offload.tiers import ExpertKey
from glmlocal.offload.trace import RouteTrace

LAYOUT = expert_layout(64, 32, ("f32", "f32", "f32"))
TRACE = RouteTrace(120, {ExpertKey(1, 0): 2.5, ExpertKey(2, 7): 0.25, ExpertKey(2, 1): 1e-9})


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExpertPack:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    header = PackHeader("tiny", "keep", "org/tiny", 8, 0, {1: LAYOUT, 2: LAYOUT})
    return ExpertPack(tmp_path / "experts.pack", 1, header, (0,) * header.num_checksums)


def test_what_was_kept_is_found_without_what_is_cold(pack: ExpertPack) -> None:
    assert trace.load(pack) is None
    trace.save(pack, TRACE)
    assert trace.load(pack) == RouteTrace(120, {ExpertKey(1, 0): 2.5, ExpertKey(2, 7): 0.25})
    assert len(list(trace.trace_file(pack).parent.iterdir())) == 1, "nothing else is left behind"


def test_another_pack_has_another_trace(pack: ExpertPack, tmp_path: Path) -> None:
    trace.save(pack, TRACE)
    header = PackHeader("tiny", "int4", "org/tiny", 8, 0, {1: LAYOUT, 2: LAYOUT})
    assert trace.load(ExpertPack(pack.path, 1, header, pack.checksums)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"version": 2, "num_tokens": 1, "heats": {}}',
        '{"version": 1, "num_tokens": 1, "heats": {"1": {"0": NaN}}}',
        '{"version": 1, "num_tokens": 1, "heats": {"1": {"0": 0}}}',
        '{"version": 1, "num_tokens": 1, "heats": {"1": {"x": 1}}}',
        '{"version": 1, "num_tokens": 1, "heats": {"1": 5}}',
        "[" * 100_000,
        "\u00e9",
    ],
)
def test_a_damaged_trace_counts_as_none(pack: ExpertPack, text: str) -> None:
    file = trace.trace_file(pack)
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")
    assert trace.load(pack) is None


@pytest.mark.parametrize("call", ["fdopen", "replace"])
def test_a_full_disk_costs_no_more_than_what_was_new(
    pack: ExpertPack, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    trace.save(pack, TRACE)
    kept = trace.load(pack)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        trace.save(pack, RouteTrace(999, {ExpertKey(1, 3): 1.0}))
    assert trace.load(pack) == kept
    assert len(list(trace.trace_file(pack).parent.iterdir())) == 1, "the unfinished file is gone"


def test_that_it_cannot_be_kept_is_no_error(pack: ExpertPack) -> None:
    file = trace.trace_file(pack)
    file.parent.parent.mkdir(parents=True)
    file.parent.write_text("in the way")
    trace.save(pack, TRACE)
    assert trace.load(pack) is None
