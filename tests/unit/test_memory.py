"""What there is of memory, also where /proc does not say."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from glmlocal import memory


def _raise_os_error(name: str) -> int:
    raise OSError(name)


def test_the_system_as_psutil_sees_it() -> None:
    total, available = memory.system_bytes()
    assert total == psutil.virtual_memory().total
    assert 0 < available <= total


def test_units_of_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 24 kB\nMemFree: 3 kB\nMemAvailable: 5 kB\n")
    assert memory.system_bytes(tmp_path) == (24 * 1024, 5 * 1024)


@pytest.mark.parametrize("text", [None, "", "garbage", "MemTotal: 24 kB\n", "MemTotal: x\nMemAvailable: 5 kB\n"])
def test_without_a_readable_proc_the_c_library_is_asked(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    if text is not None:
        (tmp_path / "proc/meminfo").write_text(text)
    found, available = memory.system_bytes(tmp_path)
    assert found == pytest.approx(psutil.virtual_memory().total, rel=0.02)
    assert 0 < available <= found
    monkeypatch.setattr(os, "sysconf", _raise_os_error)
    assert memory.system_bytes(tmp_path) == (0, 0)
