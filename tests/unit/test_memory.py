"""What there is of memory, also where /proc does not say."""

from __future__ import annotations

import os

import psutil
import pytest

from glmlocal import memory


def _raise_os_error(name: str) -> int:
    raise OSError(name)


def test_the_system_as_psutil_sees_it() -> None:
    total, available = memory.system_bytes()
    assert total == psutil.virtual_memory().total
    assert 0 < available <= total


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/meminfo"), KeyError(b"MemTotal:"), ValueError("garbage")])
def test_without_a_readable_proc_the_c_library_is_asked(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error

    total = psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    found, available = memory.system_bytes()
    assert found == pytest.approx(total, rel=0.02)
    assert 0 < available <= found
    monkeypatch.setattr(os, "sysconf", _raise_os_error)
    assert memory.system_bytes() == (0, 0)
