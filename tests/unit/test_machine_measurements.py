"""What doctor keeps: written whole, read back only when it is what doctor wrote here."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glmlocal.errors import ConfigError
from glmlocal.machine import cpu, measurements
from glmlocal.machine.disk import DiskRates
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate
from glmlocal.machine.measurements import Measurements
from glmlocal.paths import measurements_file
from machines import machine

HERE = "0123456789abcdef"
MEASURED = Measurements(
    fingerprint=HERE,
    date="2026-11-23T17:00:00+00:00",
    glmlocal="0.1.0",
    isa="avx512",
    threads=2,
    quick=False,
    busy=True,
    read_gb_per_s=70.5,
    read_gb_per_s_one_thread=40.0,
    fp32_gflop_per_s=450.0,
    int8_gop_per_s=1800.0,
    disk=DiskRates("/models", "ext4", True, 1 << 30, {1: 1.5, 2: 2.5, 4: 3.0}),
    kernels=KernelRates(
        "b" * 16,
        {"Q4_0 int8": ProductRate((1, 8, 512), (16e9, 6e9, 0.1e9)), "bf16 fp32": ProductRate((1,), (5e9,))},
        {"bf16": AttentionCost(1e-11, 1 / 47e9)},
        {"bf16": AttentionCost(0.0, 1 / 62e9)},
        {"int8": 50e-6, "fp32": 60e-6},
        1e-3,
    ),
)


@pytest.mark.parametrize(
    "measured", [MEASURED, replace(MEASURED, int8_gop_per_s=None, disk=None, kernels=None, busy=False)]
)
def test_what_is_saved_is_loaded(tmp_path: Path, measured: Measurements) -> None:
    path = tmp_path / "new" / "measurements.json"
    measurements.save(measured, path)
    assert measurements.load(path, HERE) == (measured, "")
    assert path.stat().st_mode & 0o077 == 0
    measurements.save(replace(measured, threads=1), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["measurements.json"]
    found, _ = measurements.load(path, HERE)
    assert found is not None
    assert found.threads == 1


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measurements.json"
    measurements.save(MEASURED, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        measurements.save(replace(MEASURED, threads=9), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["measurements.json"]
    assert measurements.load(path, HERE) == (MEASURED, "")


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    found, reason = measurements.load(tmp_path / "none", HERE)
    assert found is None
    assert "run `glmlocal doctor`" in reason
    found, reason = measurements.load(tmp_path, HERE)
    assert found is None
    assert "Is a directory" in reason


def test_another_machine_is_not_believed(tmp_path: Path) -> None:
    measurements.save(MEASURED, tmp_path / "m")
    found, reason = measurements.load(tmp_path / "m", "f" * 16)
    assert found is None
    assert "another machine" in reason


WRONG: list[tuple[tuple[str, ...], Any]] = [
    (("schema",), 1),
    (("schema",), None),
    (("date",), "yesterday"),
    (("date",), 5),
    (("fingerprint",), 7),
    (("threads",), 0),
    (("threads",), True),
    (("threads",), 1 << 20),
    (("quick",), "no"),
    (("peaks",), []),
    (("peaks",), None),
    (("peaks", "read_gb_per_s"), -1),
    (("peaks", "read_gb_per_s"), 0),
    (("peaks", "read_gb_per_s"), float("nan")),
    (("peaks", "read_gb_per_s"), float("inf")),
    (("peaks", "fp32_gflop_per_s"), "fast"),
    (("peaks", "fp32_gflop_per_s"), None),
    (("peaks", "fp32_gflop_per_s"), 10**400),
    (("peaks", "int8_gop_per_s"), True),
    (("kernels",), 5),
    (("kernels", "kernels_id"), 5),
    (("kernels", "products"), {}),
    (("kernels", "products"), {str(i): {"1": 1.0} for i in range(100)}),
    (("kernels", "products"), {"x" * 100: {"1": 1.0}}),
    (("kernels", "products", "Q4_0 int8"), {"2": 1.0}),
    (("kernels", "products", "Q4_0 int8"), {"1": 0.0}),
    (("kernels", "products", "Q4_0 int8"), {"1": 1.0, "one": 1.0}),
    (("kernels", "products", "Q4_0 int8"), {"1": 1.0, str(1 << 40): 1.0}),
    (("kernels", "attention_decode", "bf16"), -1.0),
    (("kernels", "attention_decode", "bf16", "number_s"), -1.0),
    (("kernels", "attention_prefill", "bf16", "operation_s"), 0),
    (("kernels", "layer_s", "fp32"), 0.0),
    (("kernels", "attention_prefill"), None),
    (("kernels", "layer_s"), 0),
    (("kernels", "token_s"), "slow"),
    (("disk",), 5),
    (("disk", "gb_per_s"), {}),
    (("disk", "gb_per_s"), {"one": 1.0}),
    (("disk", "gb_per_s"), {"1": 0}),
    (("disk", "path"), None),
    (("disk", "direct"), 1),
    (("disk", "file_bytes"), 1.5),
]


@pytest.mark.parametrize(("keys", "value"), WRONG)
def test_damaged_values_are_refused_with_a_reason(tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    values = measurements.as_json(MEASURED)
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "m").write_text(json.dumps(values))
    found, reason = measurements.load(tmp_path / "m", HERE)
    assert found is None
    assert "run `glmlocal doctor` again" in reason


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b'{"schema": 1}', b"\xff\xfe{", b"[" * 100_000, b'{"schema": 1' + b" " * (1 << 21)]
)
def test_damaged_files_are_refused_with_a_reason(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    found, reason = measurements.load(tmp_path / "m", HERE)
    assert found is None
    assert reason.endswith("run `glmlocal doctor` again")


def test_the_fingerprint_is_that_of_the_hardware(tmp_path: Path) -> None:
    root = machine(tmp_path)
    here = cpu.probe(root, range(8))
    same = measurements.fingerprint(here, 64 << 30)
    assert len(same) == 16
    assert measurements.fingerprint(cpu.probe(root, range(8)), (64 << 30) - 50_000_000) == same
    assert measurements.fingerprint(here, 32 << 30) != same
    assert measurements.fingerprint(cpu.probe(root, range(4)), 64 << 30) != same
    assert measurements.fingerprint(replace(here, name="Slow CPU"), 64 << 30) != same


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measurements_file({"GLMLOCAL_HOME": str(tmp_path)}) == tmp_path / "measurements.json"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert measurements_file({}) == tmp_path / "state" / "glmlocal" / "measurements.json"
    with pytest.raises(ConfigError, match="relative"):
        measurements_file({"GLMLOCAL_HOME": "here"})
