"""Examining this machine: what it has, what it measures, what to fix. ``machine.measurements`` reads it again."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from glmlocal import __version__, memory
from glmlocal.errors import ConfigError, KernelUnavailable
from glmlocal.machine import cgroups, disk, gpus, measurements
from glmlocal.machine.cpu import Cpu, busy_cpus, probe, times
from glmlocal.machine.files import key_values, read_int, read_text
from glmlocal.machine.findings import findings, is_busy
from glmlocal.machine.kernel_rates import AttentionCost, KernelRates
from glmlocal.machine.measurements import Measurements
from glmlocal.paths import cache_home, measurements_file
from glmlocal.units import KIB, MIB

_ISA_VARIABLE = "GLMLOCAL_CPU_ISA"
_WATCH_S = 0.3  # how long others' use of the CPUs is watched
_DISK_S, _QUICK_DISK_S = 1.2, 0.3
_QUICK_FILE_BYTES = 256 * MIB
_GLM_GROUP, _FEW_HEADS = 12, 2  # query heads per kv head that attention's rates are shown for
_COMPILER = re.compile(rb"(GCC: \([^)\0]{0,80}\) [\w.+-]{1,40}|clang version [\w.+-]{1,40})")


def examine(
    disk_path: Path | None = None, *, quick: bool = False, on_step: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Look, measure, judge and store; the result is what ``glmlocal doctor --json`` prints.

    Raises ConfigError for a bad GLMLOCAL_HOME. Anything about the machine that goes wrong is a finding instead.
    """
    if disk_path is not None and not disk_path.is_dir():
        raise ConfigError(f"--disk is {str(disk_path)!r}, which is no directory; give the one that models are kept in")
    disk_path = disk_path or cache_home()
    on_step("watching what else runs")
    cpu = probe()
    busy = _watch(cpu)
    total_bytes, _ = memory.system_bytes()
    on_step("loading the kernels")
    kernels = _kernels(cpu)
    facts: dict[str, Any] = {
        "schema": measurements.SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "fingerprint": measurements.fingerprint(cpu, total_bytes),
        "kernels": kernels,
        "cpu": _cpu_facts(cpu, busy, kernels["cause"]),
        "memory": _memory_facts(),
        "peaks": None,
    }
    peaks = None if kernels["cause"] == "torch" else _measure_peaks(on_step)
    on_step("measuring the disk")
    facts["disk"], disk_rates = _measure_disk(disk_path, quick)
    if peaks is not None:
        on_step("measuring the peaks again")
        facts["peaks"] = _peak_facts(*peaks, again=not quick)
    rates = (
        _measure_kernels(quick, on_step) if peaks is not None and kernels["isa"] not in ("none", "reference") else None
    )
    facts["kernel_rates"] = None if rates is None else _rate_facts(rates)
    facts["gpus"] = [asdict(gpu) for gpu in gpus.probe()]
    facts["gpus_on_bus"] = gpus.on_the_bus()
    facts["versions"] = _versions(torch_works=kernels["cause"] != "torch")
    facts["stored"] = _store(facts, disk_rates, rates)
    facts["findings"] = [asdict(finding) for finding in findings(facts)]
    return facts


def _watch(cpu: Cpu) -> float:
    before = times()
    time.sleep(_WATCH_S)
    return round(busy_cpus(before, times(), cpu.allowed), 2)


def _kernels(cpu: Cpu) -> dict[str, Any]:
    """Which kernels run and why not better ones; ``cause`` of a problem is "isa", "torch" or "build"."""
    forced = os.environ.get(_ISA_VARIABLE, "")
    problem, cause = None, None
    try:
        import_module("glmlocal.kernels")
    except KernelUnavailable as error:
        # The rest is examined as if it were not set.
        problem, cause = str(error), "isa"
        del os.environ[_ISA_VARIABLE]
        import_module("glmlocal.kernels")
    except (ImportError, OSError) as error:  # OSError: a shared library that torch wants
        problem, cause = f"torch cannot be imported: {error}", "torch"
    if cause == "torch":
        native, isa, available = None, "none", []
    else:
        chosen = import_module("glmlocal.kernels.cpu")
        isa, native = chosen.isa(), _native()
        available = [] if native is None else list(native.available_isas())
        if native is None and problem is None:
            problem, cause = chosen.describe(), "build"
    return {
        "native": native is not None,
        "isa": isa,
        "forced": forced or None,
        "available": available,
        "cpu_has": list(cpu.instruction_sets),
        "missing": [name for name in cpu.instruction_sets if name not in available],
        "problem": problem,
        "cause": cause,
        "has_compiler": any(map(shutil.which, ("c++", "g++", "clang++"))),
        "compiler": None if native is None else _compiler(Path(native.__file__)),
    }


def _native() -> Any | None:
    try:
        return import_module("glmlocal.kernels.cpu._cpu")
    except ImportError:
        return None


def _compiler(extension: Path) -> str | None:
    """What the compiler wrote into the extension about itself."""
    try:
        found = _COMPILER.search(extension.read_bytes())
    except OSError:
        return None
    return found[1].decode().replace("GCC: ", "GCC ") if found else None


def _cpu_facts(cpu: Cpu, busy: float, cause: str | None) -> dict[str, Any]:
    limit = cgroups.cpu_limit()
    threads = cpu.allowed_cores
    if cause != "torch":
        threads = import_module("glmlocal.kernels.cpu.topology").default_num_threads()
    return {
        "name": cpu.name,
        "architecture": cpu.architecture,
        "sockets": cpu.sockets,
        "cores": cpu.cores,
        "logical": cpu.logical,
        "allowed": len(cpu.allowed),
        "allowed_cores": cpu.allowed_cores,
        "limit": None if math.isinf(limit) else limit,
        "threads": threads,
        "last_level_cache_bytes": cpu.last_level_cache_bytes,
        "busy_cpus": busy,
        "numa_nodes": [
            {"node": node.number, "cpus": len(node.cpus), "memory_bytes": node.memory_bytes} for node in cpu.nodes
        ],
    }


def _swap() -> tuple[int, int]:
    """Total and used; zeros where /proc is hidden."""
    try:
        swap = psutil.swap_memory()
        return int(swap.total), int(swap.used)
    except (OSError, KeyError, ValueError, IndexError, RuntimeError):
        return 0, 0


def _memory_facts(root: Path = Path("/")) -> dict[str, Any]:
    limit, (swap_total, swap_used) = cgroups.memory_limit(), _swap()
    info = key_values(root / "proc/meminfo")
    setting = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "total_bytes": memory.system_bytes()[0],
        "available_bytes": memory.available_bytes(),
        "limit_bytes": None if limit is None else limit.limit_bytes,
        "limit_used_bytes": None if limit is None else limit.used_bytes,
        "swap_total_bytes": swap_total,
        "swap_used_bytes": swap_used,
        "transparent_huge_pages": setting[1] if setting else None,
        "huge_pages": {
            "total": info.get("HugePages_Total", 0),
            "free": info.get("HugePages_Free", 0),
            "bytes": info.get("Hugepagesize", 0) * KIB,
        },
        "overcommit": read_int(root / "proc/sys/vm/overcommit_memory"),
    }


def _measure_peaks(on_step: Callable[[str], None]) -> tuple[Any, Any]:
    """(one thread, all threads)."""
    from glmlocal import peaks

    on_step("measuring read bandwidth and arithmetic peaks")
    return peaks.measure(1), peaks.measure()


def _measure_kernels(quick: bool, on_step: Callable[[str], None]) -> KernelRates:
    from glmlocal import calibrate

    return calibrate.measure(quick=quick, on_step=on_step)


def _rate_facts(rates: KernelRates) -> dict[str, Any]:
    products = []
    for name, product in rates.products.items():
        scheme, _, activations = name.rpartition(" ")
        by_rows = zip(product.rows, product.weights_per_s, strict=True)
        products.append(
            {
                "scheme": scheme,
                "activations": activations,
                "weights_per_s": {str(rows): _round(rate) for rows, rate in by_rows},
            }
        )
    attention = [
        {
            "kv_dtype": dtype,
            "decode_gflop_per_s": _round(_gflop_per_s(cost, _GLM_GROUP)),
            "prefill_gflop_per_s": _round(_gflop_per_s(rates.attention_prefill[dtype], _GLM_GROUP)),
            "decode_gflop_per_s_of_few_heads": _round(_gflop_per_s(cost, _FEW_HEADS)),
        }
        for dtype, cost in rates.attention_decode.items()
    ]
    return {
        "products": products,
        "attention": attention,
        "layer_s": {activations: _round(seconds) for activations, seconds in rates.layer_s.items()},
        "token_s": _round(rates.token_s),
        "row_s": {activations: _round(seconds) for activations, seconds in rates.row_s.items()},
        "spread": _round(rates.spread),
    }


def _gflop_per_s(cost: AttentionCost, group: int) -> float:
    """Where so many query heads share a kv head: 4 · group operations for each 2 numbers."""
    return 2 * group / cost.seconds(1.0, 2.0 * group) / 1e9


def _peak_facts(one: Any, before: Any, *, again: bool) -> dict[str, Any]:
    from glmlocal import peaks

    after = peaks.measure() if again else before
    best = before.best_of(after)
    # One thread alone never reads faster than all; where it seems to, all of them were disturbed.
    return {
        "threads": best.threads,
        "read_gb_per_s": _round(max(best.read_gb_per_s, one.read_gb_per_s)),
        "read_gb_per_s_one_thread": _round(one.read_gb_per_s),
        "fp32_gflop_per_s": _round(best.fp32_gflop_per_s),
        "int8_gop_per_s": None if best.int8_gop_per_s is None else _round(best.int8_gop_per_s),
        "read_bytes": best.read_bytes,
        "difference": _round(before.difference(after)) if again else None,
    }


def _measure_disk(directory: Path, quick: bool) -> tuple[dict[str, Any], disk.DiskRates | None]:
    try:
        rates = disk.measure(
            directory,
            file_bytes=_QUICK_FILE_BYTES if quick else disk.FILE_BYTES,
            seconds=_QUICK_DISK_S if quick else _DISK_S,
        )
    except disk.DiskProblem as problem:
        return {"path": str(directory), "problem": str(problem)}, None
    rates = disk.DiskRates(
        rates.path,
        rates.filesystem,
        rates.direct,
        rates.file_bytes,
        {threads: _round(rate) for threads, rate in rates.gb_per_s.items()},
    )
    return {**measurements.disk_json(rates), "problem": None}, rates


def _versions(*, torch_works: bool) -> dict[str, str | None]:
    torch: Any = import_module("torch") if torch_works else None
    try:
        torch_version: str | None = version("torch")
    except PackageNotFoundError:
        torch_version = None
    return {
        "glmlocal": __version__,
        "python": platform.python_version(),
        "torch": torch_version,
        "torch_cuda": None if torch is None else torch.version.cuda,
        "torch_rocm": None if torch is None else getattr(torch.version, "hip", None),
        "kernel": platform.release(),
        "glibc": " ".join(platform.libc_ver()).strip() or None,
    }


def _store(facts: dict[str, Any], rates: disk.DiskRates | None, kernels: KernelRates | None) -> dict[str, str | None]:
    """Keep what was measured; where, or why not."""
    if facts["peaks"] is None:
        return {"path": None, "problem": "there are no measurements"}
    peaks, path = facts["peaks"], measurements_file()
    measured = Measurements(
        fingerprint=facts["fingerprint"],
        date=facts["date"],
        glmlocal=__version__,
        isa=facts["kernels"]["isa"],
        threads=peaks["threads"],
        quick=facts["quick"],
        busy=is_busy(facts),
        read_gb_per_s=peaks["read_gb_per_s"],
        read_gb_per_s_one_thread=peaks["read_gb_per_s_one_thread"],
        fp32_gflop_per_s=peaks["fp32_gflop_per_s"],
        int8_gop_per_s=peaks["int8_gop_per_s"],
        disk=rates,
        kernels=kernels,
    )
    try:
        measurements.save(measured, path)
    except OSError as error:
        return {"path": None, "problem": f"{path}: {error.strerror or error}"}
    return {"path": str(path), "problem": None}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
