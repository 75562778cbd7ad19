"""GPUs from made-up tools and /sys trees."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from glmlocal.machine import gpus
from glmlocal.machine.gpus import Gpu
from machines import tree

MIB = 1 << 20


def nothing(command: tuple[str, ...]) -> str:
    return ""


@pytest.fixture(autouse=True)
def _no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_none_is_fine(tmp_path: Path) -> None:
    assert gpus.probe(tmp_path, nothing) == ()
    assert gpus.on_the_bus(tmp_path) == {}


def test_nvidia_smi(tmp_path: Path) -> None:
    text = "NVIDIA GeForce RTX 4090, 24564, 24000, 560.35\nNVIDIA GB10, [N/A], [N/A], 580.1\nNVIDIA-SMI has failed\n"
    assert gpus.probe(tmp_path, lambda command: text) == (
        Gpu("NVIDIA", "NVIDIA GeForce RTX 4090", 24564 * MIB, 24000 * MIB, "560.35"),
        Gpu("NVIDIA", "NVIDIA GB10", 0, 0, "580.1"),
    )


def test_a_tool_that_is_missing_fails_or_hangs_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus._run(("glmlocal-no-such-tool",)) == ""
    assert gpus._run(("false",)) == ""
    monkeypatch.setattr(gpus, "_TIMEOUT_S", 0.1)
    assert gpus._run(("sleep", "5")) == ""


def test_nvml_where_there_is_no_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = ModuleType("pynvml")
    ended = []
    nvml.nvmlInit, nvml.nvmlShutdown = lambda: None, lambda: ended.append(True)
    nvml.nvmlSystemGetDriverVersion = lambda: "570"
    nvml.nvmlDeviceGetCount = lambda: 1
    nvml.nvmlDeviceGetHandleByIndex = lambda i: i
    nvml.nvmlDeviceGetName = lambda handle: "H100"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=80, free=79)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpus.probe(tmp_path, nothing) == (Gpu("NVIDIA", "H100", 80, 79, "570"),)
    assert ended == [True]
    nvml.nvmlDeviceGetCount = lambda: 1 / 0
    assert gpus.probe(tmp_path, nothing) == ()


def test_amd_from_sysfs(tmp_path: Path) -> None:
    base = "sys/class/drm"
    tree(
        tmp_path,
        {
            f"{base}/card1/device/vendor": "0x1002",
            f"{base}/card1/device/device": "0x744c",
            f"{base}/card1/device/mem_info_vram_total": "1000",
            f"{base}/card1/device/mem_info_vram_used": "100",
            f"{base}/card1-HDMI-A-1/device/vendor": "0x1002",
            f"{base}/card1-HDMI-A-1/device/mem_info_vram_total": "1000",
            f"{base}/card0/device/vendor": "0x8086",
            f"{base}/card0/device/mem_info_vram_total": "1000",
        },
    )
    assert gpus.probe(tmp_path, nothing) == (Gpu("AMD", "AMD 0x744c", 1000, 900, ""),)


def test_what_is_plugged_in_without_a_driver(tmp_path: Path) -> None:
    devices = {"0": ("0x10de", "0x030000"), "1": ("0x10de", "0x040300"), "2": ("0x10de", "0x030200"),
               "3": ("0x1002", "0x038000"), "4": ("0x1af4", "0x030000")}  # fmt: skip
    for name, (vendor, kind) in devices.items():
        tree(tmp_path, {f"sys/bus/pci/devices/{name}/vendor": vendor, f"sys/bus/pci/devices/{name}/class": kind})
    assert gpus.on_the_bus(tmp_path) == {"NVIDIA": 2, "AMD": 1}
