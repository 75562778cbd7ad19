"""``glmlocal doctor`` as a process of its own, really measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(home: Path, *arguments: str, isa: str = "") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "GLMLOCAL_HOME": str(home), "GLMLOCAL_CPU_ISA": isa}
    command = [sys.executable, "-m", "glmlocal", "doctor", "--quick", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120, env=environment
    )


@pytest.mark.parametrize("isa", ["nonsense", "reference"])
def test_a_forced_instruction_set_is_found_and_all_the_rest_measured(tmp_path: Path, isa: str) -> None:
    done = run(tmp_path, "--json", isa=isa)
    assert (done.returncode, done.stderr) == (0, b"")
    facts: dict[str, Any] = json.loads(done.stdout)
    found = [finding for finding in facts["findings"] if finding["subject"] == "kernels"]
    assert found[0]["level"] == ("fix" if isa == "nonsense" or not facts["kernels"]["native"] else "warn")
    assert "GLMLOCAL_CPU_ISA" in found[0]["text"] + found[0]["advice"]
    assert facts["kernels"]["forced"] == isa
    assert facts["peaks"]["read_gb_per_s"] > 0.5
    assert facts["peaks"]["fp32_gflop_per_s"] > 1
    assert facts["disk"]["problem"] or min(facts["disk"]["gb_per_s"].values()) > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["measurements.json"]


def test_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')\n")
    environment = {**os.environ, "GLMLOCAL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(broken)}
    command = [sys.executable, "-m", "glmlocal", "doctor", "--quick"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert "torch cannot be imported: libtorch.so" in text
    assert "→ install torch again" in text
    assert " to fix" in text.splitlines()[-1]
    assert "nothing" not in text.splitlines()[-1]
