"""``glmlocal bench`` as a process of its own on a tiny checkpoint, on the plain kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from pty_terminal import Terminal

REFERENCE = {"GLMLOCAL_CPU_ISA": "reference"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(), tmp_path_factory.mktemp("tiny"))


def test_the_plain_kernels_are_measured(directory: Path) -> None:
    options = ("--prefill", "8,64", "--decode", "8", "--context", "0,64", "--repeat", "2", "--threads", "1", "--json")
    command = [sys.executable, "-m", "glmlocal", "bench", str(directory), *options]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, **REFERENCE},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["isa"] == "reference"
    assert facts["peaks"]["arithmetic"] == "fp32"
    assert facts["peaks"]["read_gb_per_s"] > 0.1
    assert all(0 < row["fraction_of_peak"] < 1 for row in facts["prefill"])
    assert all(0 < row["fraction_of_bandwidth"] < 1 for row in facts["decode"])
    assert facts["decode"][1]["bytes_per_token"] - facts["decode"][0]["bytes_per_token"] == (
        63 * facts["memory"]["kv_bytes_per_token"]
    )


def test_ctrl_c_on_a_terminal_prints_what_was_measured(directory: Path) -> None:
    options = ("--prefill", "8", "--decode", "0", "--repeat", "1000000", "--threads", "1")
    terminal = Terminal([sys.executable, "-m", "glmlocal", "bench", str(directory), *options], **REFERENCE)
    try:
        terminal.wait("of 1000000, now pp8 · tok/s: pp8 ")
        terminal.process.sendintr()
        terminal.wait("interrupted: fewer repeats than asked for")
        assert terminal.end() == 130
    finally:
        terminal.process.close(force=True)
    assert any(line.startswith("pp8  ") for line in terminal.lines)
    assert "Traceback" not in terminal.text
