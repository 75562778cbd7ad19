"""glmlocal doctor with made-up measurements."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from glmlocal import calibrate, doctor, peaks
from glmlocal.cli import main as cli
from glmlocal.machine import disk, gpus, measurements
from glmlocal.machine.disk import DiskProblem, DiskRates
from glmlocal.machine.gpus import Gpu
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates, ProductRate
from glmlocal.peaks import Peaks

RATES = KernelRates(
    "b" * 16,
    {"Q4_0 int8": ProductRate((1, 512), (16e9, 0.1e9)), "bf16 fp32": ProductRate((1, 64), (5e9, 0.5e9))},
    {"bf16": AttentionCost(0.0, 1 / 47e9)},
    {"bf16": AttentionCost(4 / 62e9, 0.0)},
    {"int8": 50e-6, "fp32": 60e-6},
    1e-3,
)
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No measurement takes time; the calls of disk.measure."""
    calls: list[Any] = []
    rounds = iter([Peaks(1, 40.0, 200.0, None, 7), Peaks(2, 70.0, 400.0, 1600.0, 7), Peaks(2, 80.0, 390.0, 1700.0, 7)])
    monkeypatch.setattr(peaks, "measure", lambda threads=None: next(rounds))

    def rates(directory: Path, **options: Any) -> DiskRates:
        calls.append((directory, options))
        return DiskRates(str(directory), "ext4", True, 1 << 30, {1: 1.23456, 2: 2.0, 4: 3.0})

    monkeypatch.setattr(disk, "measure", rates)
    monkeypatch.setattr(calibrate, "measure", lambda **options: RATES)
    monkeypatch.setattr(gpus, "probe", lambda: (Gpu("NVIDIA", "RTX 4090", 24 << 30, 23 << 30, "560"),))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    return calls


def keys(value: Any) -> set[str]:
    """All names of a JSON value at any depth, but those that are data."""
    if isinstance(value, list):
        return {key for item in value for key in keys(item)}
    if not isinstance(value, dict):
        return set()
    return {name for name in value if not name.isdigit()} | {key for item in value.values() for key in keys(item)}


def test_json_has_the_documented_keys(measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    facts = json.loads(captured.out)
    documented = set(re.findall(r"`(\w+)`", (DOCS / "doctor.md").read_text("utf-8")))
    assert keys(facts) - {"NVIDIA", "AMD"} <= documented
    assert facts["schema"] == 4
    assert facts["kernel_rates"]["products"][0] == {
        "scheme": "Q4_0", "activations": "int8", "weights_per_s": {"1": 16e9, "512": 0.1e9}
    }  # fmt: skip
    assert facts["kernel_rates"]["attention"] == [
        {
            "kv_dtype": "bf16",
            "decode_gflop_per_s": 47.0,
            "prefill_gflop_per_s": 24 * 62 / 4,
            "decode_gflop_per_s_of_few_heads": 47.0,
        }
    ]
    assert facts["kernel_rates"]["layer_s"] == {"int8": 50e-6, "fp32": 60e-6}
    assert facts["peaks"] == {
        "threads": 2, "read_gb_per_s": 80.0, "read_gb_per_s_one_thread": 40.0, "fp32_gflop_per_s": 400.0,
        "int8_gop_per_s": 1700.0, "read_bytes": 7, "difference": 0.125,
    }  # fmt: skip
    assert facts["disk"]["gb_per_s"] == {"1": 1.235, "2": 2.0, "4": 3.0}
    assert facts["gpus"][0]["name"] == "RTX 4090"
    assert measured == [(tmp_path / "home", {"file_bytes": disk.FILE_BYTES, "seconds": 1.2})]
    assert {"level", "subject", "text", "advice"} == set(facts["findings"][0])


def test_what_was_measured_is_kept_for_this_machine(measured: list[Any], tmp_path: Path) -> None:
    found, reason = measurements.load_own()
    assert found is None
    assert "nothing was measured" in reason
    facts = doctor.examine()
    found, reason = measurements.load_own()
    assert reason == ""
    assert found is not None
    assert (found.read_gb_per_s, found.read_gb_per_s_one_thread, found.threads) == (80.0, 40.0, 2)
    assert (found.fp32_gflop_per_s, found.int8_gop_per_s, found.quick) == (400.0, 1700.0, False)
    assert found.kernels == RATES
    assert found.disk is not None
    assert found.disk.gb_per_s == {1: 1.235, 2: 2.0, 4: 3.0}
    assert facts["stored"] == {"path": str(tmp_path / "home" / "measurements.json"), "problem": None}


def test_quick_measures_once_with_a_small_file(measured: list[Any], tmp_path: Path) -> None:
    facts = doctor.examine(tmp_path, quick=True)
    assert facts["peaks"]["read_gb_per_s"] == 70.0
    assert facts["peaks"]["difference"] is None
    assert measured == [(tmp_path, {"file_bytes": 256 << 20, "seconds": 0.3})]
    found, _ = measurements.load_own()
    assert found is not None
    assert found.quick


def test_a_disk_that_cannot_be_measured_is_a_finding(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(directory: Path, **options: Any) -> DiskRates:
        raise DiskProblem("the disk is full")

    monkeypatch.setattr(disk, "measure", problem)
    facts = doctor.examine()
    assert ("warn", "disk") in [(finding["level"], finding["subject"]) for finding in facts["findings"]]
    found, _ = measurements.load_own()
    assert found is not None
    assert found.disk is None


def test_measurements_that_cannot_be_kept_are_a_finding(measured: list[Any], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "measurements.json").mkdir()
    facts = doctor.examine()
    assert facts["stored"]["path"] is None
    assert ("warn", "measurements") in [(f["level"], f["subject"]) for f in facts["findings"]]
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["measurements.json"]


def test_a_disk_that_is_no_directory_is_bad_input(measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--disk", "/no/such"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--disk is '/no/such', which is no directory" in captured.err
    assert measured == []


def test_text_says_what_to_fix(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_versions", lambda torch_works: {
        "glmlocal": "0", "python": "3", "torch": "2\x1b[2J", "torch_cuda": None, "torch_rocm": None, "kernel": "6",
        "glibc": None,
    })  # fmt: skip
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "80.0 GB/s with 2 threads, 40.0 GB/s with one" in text
    assert "fp32 400 GFLOP/s, int8 1700 GOP/s" in text
    assert "2.00 GB/s with 2 threads, 3.00 GB/s with 4 threads; 8 MiB at random, O_DIRECT" in text
    assert any(re.match(r"fix +GPU +RTX 4090: .* → install torch's CUDA build", line) for line in lines)
    assert re.fullmatch(r"\d+ to fix", lines[-1])
    assert "\x1b" not in text


def test_a_bad_home_is_bad_input(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", "here")
    assert cli.main(["doctor"]) == 2
    assert "relative path" in capsys.readouterr().err
    found, reason = measurements.load_own()
    assert found is None
    assert "relative path" in reason
