"""What ``glmlocal doctor`` measured on this machine, kept for the planner. Torch-free.

The file is JSON:

    schema       4; another number is another format
    fingerprint  of the machine, see ``fingerprint``; a file of another machine is not believed
    date         ISO 8601, UTC
    glmlocal, isa, threads, quick
    busy         true when something else ran: the rates are too low
    peaks        {read_gb_per_s, read_gb_per_s_one_thread, fp32_gflop_per_s, int8_gop_per_s or null}
    kernels      null, or the rates of our own kernels: see ``kernel_rates``; of this ``isa`` and these ``threads``
    disk         null, or {path, filesystem, direct, file_bytes, gb_per_s {"1": …, "2": …, "4": …}}
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmlocal import memory
from glmlocal.errors import ConfigError
from glmlocal.machine.cpu import Cpu, probe
from glmlocal.machine.disk import DiskRates
from glmlocal.machine.kernel_rates import KernelRates
from glmlocal.machine.kernel_rates import as_json as kernels_json
from glmlocal.machine.kernel_rates import from_json as kernels_from_json
from glmlocal.paths import measurements_file
from glmlocal.units import GIB, MIB

SCHEMA = 4
_MOST_BYTES = MIB
_MOST_THREADS = 1 << 16
_FACTS = ("fingerprint", "date", "glmlocal", "isa", "threads", "quick", "busy")
_PEAKS = ("read_gb_per_s", "read_gb_per_s_one_thread", "fp32_gflop_per_s", "int8_gop_per_s")


@dataclass(frozen=True, slots=True)
class Measurements:
    """Rates in 10⁹ bytes or operations per second, of all ``threads`` together unless the name says otherwise."""

    fingerprint: str
    date: str
    glmlocal: str
    isa: str
    threads: int
    quick: bool
    busy: bool
    read_gb_per_s: float
    read_gb_per_s_one_thread: float
    fp32_gflop_per_s: float
    int8_gop_per_s: float | None
    disk: DiskRates | None
    kernels: KernelRates | None = None  # None: there are no native ones


def fingerprint(cpu: Cpu, memory_bytes: int) -> str:
    """16 hex digits that change when what was measured would: the processor, its cores, those allowed, the memory."""
    nodes = [(node.number, len(node.cpus)) for node in cpu.nodes]
    facts = [cpu.architecture, cpu.name, cpu.sockets, cpu.cores, cpu.logical, len(cpu.allowed), cpu.allowed_cores]
    text = json.dumps([*facts, cpu.last_level_cache_bytes, nodes, round(memory_bytes / GIB)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(measurements: Measurements, path: Path) -> None:
    """Write the file at once or not at all, for its owner alone. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(as_json(measurements), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_own(path: Path | None = None) -> tuple[Measurements | None, str]:
    """What doctor measured on this machine; or None and the reason, where nothing usable is stored."""
    try:
        path = path or measurements_file()
    except ConfigError as error:
        return None, str(error)
    return load(path, fingerprint(probe(), memory.system_bytes()[0]))


def load(path: Path, machine: str) -> tuple[Measurements | None, str]:
    """The measurements of the machine with that fingerprint, or None and the reason why there are none to use."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None, "nothing was measured on this machine yet; run `glmlocal doctor`"
    except OSError as error:
        return None, f"cannot read {str(path)!r}: {error.strerror or error}"
    again = "run `glmlocal doctor` again"
    if len(data) > _MOST_BYTES:
        return None, f"{str(path)!r} is too large to be what doctor wrote; {again}"
    try:
        values = json.loads(data)
        schema = values["schema"]
        if schema != SCHEMA:
            return None, f"{str(path)!r} has schema {schema!r}, this version reads {SCHEMA}; {again}"
        measurements = from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return None, f"{str(path)!r} is damaged ({type(error).__name__}: {str(error)[:80]}); {again}"
    if measurements.fingerprint != machine:
        return None, f"{str(path)!r} was measured on another machine, or with other cores or memory; {again}"
    return measurements, ""


def as_json(measurements: Measurements) -> dict[str, Any]:
    disk = measurements.disk
    return {
        "schema": SCHEMA,
        **{name: getattr(measurements, name) for name in _FACTS},
        "peaks": {name: getattr(measurements, name) for name in _PEAKS},
        "kernels": None if measurements.kernels is None else kernels_json(measurements.kernels),
        "disk": None if disk is None else disk_json(disk),
    }


def disk_json(disk: DiskRates) -> dict[str, Any]:
    return {
        "path": disk.path,
        "filesystem": disk.filesystem,
        "direct": disk.direct,
        "file_bytes": disk.file_bytes,
        "gb_per_s": {str(threads): rate for threads, rate in disk.gb_per_s.items()},
    }


def from_json(values: Mapping[str, Any]) -> Measurements:
    """The inverse of ``as_json``. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    peaks, disk = values["peaks"], values["disk"]
    datetime.datetime.fromisoformat(_text(values["date"]))
    return Measurements(
        fingerprint=_text(values["fingerprint"]),
        date=values["date"],
        glmlocal=_text(values["glmlocal"]),
        isa=_text(values["isa"]),
        threads=_count(values["threads"], _MOST_THREADS),
        quick=_flag(values["quick"]),
        busy=_flag(values["busy"]),
        read_gb_per_s=_rate(peaks["read_gb_per_s"]),
        read_gb_per_s_one_thread=_rate(peaks["read_gb_per_s_one_thread"]),
        fp32_gflop_per_s=_rate(peaks["fp32_gflop_per_s"]),
        int8_gop_per_s=None if peaks["int8_gop_per_s"] is None else _rate(peaks["int8_gop_per_s"]),
        disk=None if disk is None else _disk(disk),
        kernels=None if values["kernels"] is None else kernels_from_json(values["kernels"]),
    )


def _disk(values: Mapping[str, Any]) -> DiskRates:
    rates = {_count(int(threads), _MOST_THREADS): _rate(rate) for threads, rate in values["gb_per_s"].items()}
    if not rates:
        raise ValueError("no rates of the disk")
    return DiskRates(
        _text(values["path"]),
        _text(values["filesystem"]),
        _flag(values["direct"]),
        _count(values["file_bytes"], 1 << 60),
        rates,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _count(value: object, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{value!r} is no number from 1 to {most}")
    return value


def _rate(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(float(value)) or not float(value) > 0:  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is no rate")
    return float(value)  # type: ignore[arg-type]
