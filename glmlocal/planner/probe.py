"""This machine as a ``Machine``, or as much of it as the user does not describe. Reads files, starts no GPU.

Rates come from what ``glmlocal doctor`` measured. Where it has not run they are modelled from the instruction set and
the number of cores, and a note says so.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from glmlocal import memory
from glmlocal.errors import ConfigError
from glmlocal.machine import cgroups, measurements
from glmlocal.machine import cpu as cpu_probe
from glmlocal.machine import gpus as gpu_probe
from glmlocal.machine.disk import nearest_directory
from glmlocal.machine.kernel_rates import build_id
from glmlocal.machine.measurements import Measurements
from glmlocal.paths import cache_home
from glmlocal.planner import gpus as known
from glmlocal.planner.hardware import DEFAULT_NVME_GB_PER_S, parse_gpus, parse_nvme, parse_ram, reserve_bytes, with_link
from glmlocal.planner.machine import Cpu, Gpu, Machine, Nvme, Ram
from glmlocal.units import GIB, format_bytes

# Per core and by instruction set, fastest first: the peaks (fp32 GFLOP/s, int8 GOP/s) that doctor would find, from what
# a core multiplies per cycle: 2 × 8 fp32 with AVX2, at 3 GHz; AVX-512 as Zen 4 has it, in halves, at 4.5. Newer ones do
# more: a Zen 5 core measured 267 and 1048.
_PER_CORE: tuple[tuple[str, float, float], ...] = (
    ("avx512", 144.0, 576.0),
    ("avx_vnni", 96.0, 384.0),
    ("avx2", 96.0, 128.0),
    ("neon", 48.0, 96.0),
)
_PER_CORE_PLAIN = 6.0  # fp32 GFLOP/s with no instruction set that the kernels know

# Memory, per channel as read in practice: DDR5-5600 peaks at 44.8 GB/s, DDR4-3200 at 25.6, and two thirds to three
# quarters arrive. Desktop processors have two channels per socket, those with many cores eight.
_DDR5_FLAGS = frozenset({"avx_vnni", "avx512_bf16", "amx_tile"})  # processors with one of these came with DDR5
_DDR5_GB_PER_S, _DDR4_GB_PER_S = 30.0, 18.0
_SERVER_CORES, _SERVER_CHANNELS, _DESKTOP_CHANNELS = 24, 8, 2

UNKNOWN_GPU_GB_PER_S = 300.0  # of a card that is not in the table: as the slowest there
_LEAST_GPU_BYTES = 2 * GIB  # what a processor's own graphics are given by default is less
_HOST_SHARE_BYTES = 4 * GIB  # of memory shared with a GPU, what the host's side gets: interpreter, torch, staging


def machine(
    gpus: str = "auto",
    ram: str | None = None,
    nvme: str | None = None,
    link: str | None = None,
    *,
    limits_of_this_machine: bool = False,
) -> Machine:
    """What ``--gpus``, ``--ram``, ``--nvme`` and ``--link`` say; this machine wherever they say nothing.

    Where GPUs are described, another machine is meant, and it has no disk unless one is described too.

    With ``limits_of_this_machine`` the words limit this machine instead, for commands that run: GPUs or memory that it
    does not have are refused. Raises ConfigError.
    """
    link_rate = None if link is None else known.parse_link(link)
    measured, reason = measurements.load_own()
    notes = list(_measurement_notes(measured, reason))
    cpu_facts = cpu_probe.probe()
    own_ram = _ram(cpu_facts, measured)
    is_auto = gpus.strip().casefold() == "auto"
    if is_auto:
        found, gpu_notes = _gpus(link_rate)
        notes += gpu_notes
    else:
        found = parse_gpus(gpus, link_rate)
        if limits_of_this_machine:
            found = _present(gpus, found, _gpus(link_rate)[0])
    chosen_ram = own_ram if ram is None else parse_ram(ram, is_limit=limits_of_this_machine)
    own_nvme = _nvme(measured)
    has_described_gpus = not is_auto and bool(found) and not limits_of_this_machine
    chosen_nvme = parse_nvme(nvme) if nvme is not None else None if has_described_gpus else own_nvme
    if limits_of_this_machine:
        chosen_ram = own_ram if ram is None else _less_ram(ram, chosen_ram, own_ram)
        chosen_nvme = None if chosen_nvme is None else _less_nvme(chosen_nvme, own_nvme)
    is_own = is_auto and ram is None and nvme is None and link is None
    if not is_own and not limits_of_this_machine:
        notes.append(_described_note(is_auto, ram, chosen_nvme is own_nvme))
    found, chosen_ram = _shared(found, chosen_ram)
    cpu = _cpu(cpu_facts, measured)
    if ram is not None and not limits_of_this_machine:  # kernels were measured over this machine's memory
        cpu = replace(cpu, kernels=None)
    return Machine(
        gpus=found,
        cpu=cpu,
        ram=chosen_ram,
        nvme=chosen_nvme,
        is_this_machine=is_own or limits_of_this_machine,
        notes=tuple(notes),
    )


def runtime_machine(ram: str | None = None) -> Machine:
    """This machine as this version runs layers on it: without GPUs, which it only plans for.

    ``ram`` is ``--ram``, a limit. Raises ConfigError, as ``machine``.
    """
    return machine(gpus="none", ram=ram, limits_of_this_machine=True)


def _cpu(facts: cpu_probe.Cpu, measured: Measurements | None, root: Path = Path("/")) -> Cpu:
    if measured is not None:
        return Cpu(
            facts.name,
            measured.threads,
            measured.fp32_gflop_per_s,
            measured.int8_gop_per_s,
            basis="measured",
            kernels=measured.kernels if _runs(measured.isa) else None,
        )
    threads = max(1, min(facts.allowed_cores, math.floor(min(cgroups.cpu_limit(root), 1 << 16))))
    for isa, fp32, int8 in _PER_CORE:
        if isa in facts.instruction_sets:
            return Cpu(facts.name, threads, fp32 * threads, int8 * threads)
    return Cpu(facts.name, threads, _PER_CORE_PLAIN * threads, None)


def _runs(isa: str) -> bool:
    """Are the kernels of that instruction set those that will run, and not others that were asked for?"""
    return os.environ.get("GLMLOCAL_CPU_ISA", "") in ("", isa)


def _ram(facts: cpu_probe.Cpu, measured: Measurements | None, root: Path = Path("/")) -> Ram:
    """A control group's memory belongs to this process; of a whole machine the system keeps a part."""
    (total, _), limit = memory.system_bytes(), cgroups.memory_limit(root)
    free = memory.available_bytes(root)
    if limit is not None and limit.limit_bytes < total:
        total, available = limit.limit_bytes, free
    else:
        available = min(free, total - reserve_bytes(total))
    available = max(0, available)
    if measured is not None:
        return Ram(total, available, measured.read_gb_per_s, basis="measured")
    per_channel = _DDR5_GB_PER_S if facts.flags & _DDR5_FLAGS else _DDR4_GB_PER_S
    sockets = max(1, facts.sockets)
    channels = _SERVER_CHANNELS if facts.cores >= _SERVER_CORES * sockets else _DESKTOP_CHANNELS
    return Ram(total, available, per_channel * channels * sockets)


def _nvme(measured: Measurements | None) -> Nvme | None:
    """The disk that doctor measured, else the one of the cache; None where neither can be asked for its free space."""
    disk = None if measured is None else measured.disk
    try:
        path = Path(disk.path) if disk is not None else nearest_directory(cache_home())
        free = shutil.disk_usage(path).free
    except (OSError, ConfigError):
        return None
    if disk is None:
        return Nvme(free, DEFAULT_NVME_GB_PER_S, str(path))
    if disk.filesystem in ("tmpfs", "ramfs"):  # memory: what it held would be counted twice
        return None
    return Nvme(free, max(disk.gb_per_s.values()), str(path), basis="measured")


def _gpus(link: float | None) -> tuple[tuple[Gpu, ...], list[str]]:
    """Those that drivers show, and a note on each kind that the table does not know."""
    found, notes = [], []
    for gpu in gpu_probe.probe():
        if 0 < gpu.memory_bytes < _LEAST_GPU_BYTES:
            notes.append(f"{gpu.name} is left out: {format_bytes(gpu.memory_bytes)} hold nothing worth the way there")
            continue
        try:
            card = known.find(gpu.name, gpu.memory_bytes or None)
        except ConfigError:
            if not gpu.memory_bytes:
                notes.append(f"{gpu.name} is left out: its driver does not say how much memory it has")
                continue
            card = replace(known.described(gpu.memory_bytes, UNKNOWN_GPU_GB_PER_S), name=gpu.name)
            notes.append(
                f"{gpu.name} is not in the table: its memory is assumed to read {UNKNOWN_GPU_GB_PER_S:g} GB/s; "
                f"describe it as --gpus {gpu.memory_bytes / GIB:.4g}GiB@RATE"
            )
        found.append(card if link is None else with_link(card, link))
    return tuple(found), list(dict.fromkeys(notes))


def _present(words: str, wanted: tuple[Gpu, ...], own: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those of this machine's GPUs that were named. Raises ConfigError where it has not as many."""
    rest, chosen = list(own), []
    for gpu in wanted:
        match = next((card for card in rest if card.name == gpu.name), None)
        if match is None:
            has = ", ".join(card.name for card in own) or "none"
            raise ConfigError(f"--gpus {words[:80]!r} asks for a {gpu.name} more than this machine has; it has: {has}")
        rest.remove(match)
        chosen.append(match)
    return tuple(chosen)


def _less_ram(words: str, wanted: Ram, own: Ram) -> Ram:
    """No more of this machine's memory than was asked for; its rate is its own. Raises ConfigError."""
    if wanted.total_bytes > own.total_bytes:
        raise ConfigError(
            f"--ram {words[:80]!r} is more than the {format_bytes(own.total_bytes)} of this machine; "
            f"give at most {own.total_bytes // GIB}GiB"
        )
    return replace(own, total_bytes=wanted.total_bytes, available_bytes=min(wanted.total_bytes, own.available_bytes))


def _less_nvme(wanted: Nvme, own: Nvme | None) -> Nvme:
    if own is None:
        raise ConfigError(
            "--nvme asks for space, but this machine's disk cannot be asked what it has; give --nvme none"
        )
    return replace(own, capacity_bytes=min(wanted.capacity_bytes, own.capacity_bytes))


def _shared(gpus: tuple[Gpu, ...], ram: Ram) -> tuple[tuple[Gpu, ...], Ram]:
    """Where a GPU's memory is the host's, each byte is given to one of them."""
    if not any(gpu.is_unified for gpu in gpus):
        return gpus, ram
    left = tuple(
        replace(gpu, memory_bytes=gpu.memory_bytes - _HOST_SHARE_BYTES) if gpu.is_unified else gpu for gpu in gpus
    )
    return left, replace(ram, available_bytes=min(_HOST_SHARE_BYTES, ram.available_bytes))


def _measurement_notes(measured: Measurements | None, reason: str) -> Iterator[str]:
    if measured is None:
        yield f"the rates of CPU, memory and disk are modelled: {reason}"
    elif measured.busy:
        yield "something else ran while `glmlocal doctor` measured: the rates are too low; run it again"
    if measured is not None and measured.kernels is not None:
        if not _runs(measured.isa):
            yield f"the kernels were measured as {measured.isa}, not as GLMLOCAL_CPU_ISA says: their rates are modelled"
        elif measured.kernels.kernels_id != build_id():
            yield "the kernels were built anew since `glmlocal doctor` measured them; run it again"


def _described_note(gpus_are_own: bool, ram: str | None, nvme_is_own: bool) -> str:
    """Which parts of a described machine are this one's."""
    own = ["GPUs"] * gpus_are_own + ["CPU"] + ["memory"] * (ram is None) + ["disk"] * nvme_is_own
    return f"not described, so as on this machine: {', '.join(own)}"
