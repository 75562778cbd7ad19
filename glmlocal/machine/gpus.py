"""Which GPUs there are: NVIDIA's through nvidia-smi or NVML, AMD's through sysfs, and what the PCI bus says besides."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from glmlocal.machine.files import as_int, read_int, read_text
from glmlocal.units import MIB

_ASKED = ("--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
_NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # WSL's is on the PATH of login shells only
_TIMEOUT_S = 10
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380")  # VGA, 3D and other display controllers


@dataclass(frozen=True, slots=True)
class Gpu:
    vendor: str
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str  # empty where unknown


Run = Callable[[tuple[str, ...]], str]


def probe(root: Path = Path("/"), run: Run | None = None) -> tuple[Gpu, ...]:
    """GPUs that their drivers can see; none is fine."""
    return (*(_nvidia_smi(run or _run) or _nvml()), *_amd(root))


def on_the_bus(root: Path = Path("/")) -> dict[str, int]:
    """How many display controllers of each vendor are plugged in, with or without a driver."""
    found: dict[str, int] = {}
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor = _VENDORS.get(read_text(device / "vendor"))
        if vendor is not None and read_text(device / "class").startswith(_DISPLAY_CLASSES):
            found[vendor] = found.get(vendor, 0) + 1
    return found


def _run(command: tuple[str, ...]) -> str:
    """A command's output; empty when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_TIMEOUT_S, text=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _nvidia_smi(run: Run) -> list[Gpu]:
    gpus = []
    for line in next((out for program in _NVIDIA_SMI if (out := run((program, *_ASKED)))), "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, total, free, driver = fields  # unified memory (GB10) says [N/A]
            gpus.append(Gpu("NVIDIA", name, (as_int(total) or 0) * MIB, (as_int(free) or 0) * MIB, driver))
    return gpus


def _nvml() -> list[Gpu]:
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, another version: then there is nothing to see
        return []
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        memories = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return [
            Gpu("NVIDIA", str(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), str(driver))
            for handle, memory in zip(handles, memories, strict=True)
        ]
    except Exception:
        return []
    finally:
        nvml.nvmlShutdown()


def _amd(root: Path) -> list[Gpu]:
    gpus = []
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        device = card / "device"
        total = read_int(device / "mem_info_vram_total")
        if card.name[4:].isdigit() and read_text(device / "vendor") == "0x1002" and total is not None:
            name = read_text(device / "product_name") or f"AMD {read_text(device / 'device')}"
            used = read_int(device / "mem_info_vram_used") or 0
            driver = read_text(root / "sys/module/amdgpu/version")
            gpus.append(Gpu("AMD", name, total, max(0, total - used), driver))
    return gpus
