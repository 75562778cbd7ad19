"""Hardware in words → values: ``2xH100,1xRTX4090``, ``1x24GiB@936``, ``128GiB@60``, ``2TB@7``.

The same words describe a machine to ``glmlocal plan`` and limit this one elsewhere. Every function raises ConfigError,
and nothing else, for whatever it cannot read.
"""

from __future__ import annotations

import re
from dataclasses import replace

from glmlocal.errors import ConfigError
from glmlocal.planner import gpus
from glmlocal.planner.machine import Gpu, Nvme, Ram
from glmlocal.units import GIB, format_bytes, parse_size

MAX_GPUS = 64  # eight nodes of eight: more is a mistake, or a job for another engine
MAX_GB_PER_S = 100_000.0

# What the system and other programs keep of a machine's memory. A control group's limit is this process's alone.
RESERVE_LEAST_BYTES = 2 * GIB
RESERVE_FRACTION = 0.06

# Where nobody says and nobody measured. Two channels of DDR5-5600 peak at 89.6 GB/s, and reads reach about two thirds
# with few cores; a PCIe 4.0 NVMe drive is sold as 7 GB/s and reads about 5 in pieces of an expert's size.
DEFAULT_RAM_GB_PER_S = 60.0
DEFAULT_NVME_GB_PER_S = 5.0

_COUNT = re.compile(r"(-?[0-9]{1,3})\s*[x×*]\s*(.+)", re.IGNORECASE | re.DOTALL)
_RATE = re.compile(r"\s*([0-9]{1,7}(?:\.[0-9]{1,6})?)\s*(?:GB/s)?\s*", re.IGNORECASE)
_GPUS_EXAMPLES = "write for example 2xH100, 1xRTX4090,2xL40S, 24GiB@1008, auto or none"


def parse_gpus(text: str, link: float | None = None) -> tuple[Gpu, ...]:
    """``2xH100,1xRTX4090`` or ``1x24GiB@936`` → GPUs in that order; ``none`` → none. ``auto`` is ``probe``'s.

    ``link`` (GB/s) replaces what the cards' own links carry, of those that have one.
    """
    if text.strip().casefold() == "none":
        return ()
    found: list[Gpu] = []
    for part in text.split(","):
        count, name = _count(part.strip(), text)
        if len(found) + count > MAX_GPUS:
            raise ConfigError(f"--gpus {text[:80]!r} describes more than {MAX_GPUS} GPUs; plan for one node of them")
        found += [_gpu(name, text)] * count
    if link is None:
        return tuple(found)
    return tuple(with_link(gpu, link) for gpu in found)


def with_link(gpu: Gpu, gb_per_s: float) -> Gpu:
    """A GPU that shares the host's memory has no link to replace."""
    return gpu if gpu.is_unified else replace(gpu, link_gb_per_s=gb_per_s)


def parse_ram(text: str, *, is_limit: bool = False) -> Ram:
    """``128GiB@60``; without a rate DEFAULT_RAM_GB_PER_S. Of a limit nothing is the system's, of a machine a part."""
    total, rate = _size_and_rate(text, "--ram", "128GiB@60")
    available = total - (0 if is_limit else reserve_bytes(total))
    if available <= 0:
        raise ConfigError(
            f"--ram {text[:80]!r} leaves nothing after the {format_bytes(RESERVE_LEAST_BYTES)} that the system keeps; "
            f"give at least {format_bytes(2 * RESERVE_LEAST_BYTES)}"
        )
    return Ram(total, available, rate or DEFAULT_RAM_GB_PER_S)


def parse_nvme(text: str) -> Nvme | None:
    """``2TB@7``: free space and read rate; ``none`` → None; without a rate DEFAULT_NVME_GB_PER_S."""
    if text.strip().casefold() == "none":
        return None
    capacity, rate = _size_and_rate(text, "--nvme", "2TB@7")
    return Nvme(capacity, rate or DEFAULT_NVME_GB_PER_S)


def reserve_bytes(total_bytes: int) -> int:
    """What of a whole machine's memory is not glmlocal's to take."""
    return max(RESERVE_LEAST_BYTES, int(total_bytes * RESERVE_FRACTION))


def _count(part: str, whole: str) -> tuple[int, str]:
    """``2xH100`` → (2, "H100"). A name that begins like a count, 7900XT, has more digits than a count may."""
    if not part:
        raise ConfigError(f"--gpus {whole[:80]!r} has nothing between two commas or at an end; {_GPUS_EXAMPLES}")
    if part.casefold() in ("none", "auto"):
        raise ConfigError(f"--gpus {whole[:80]!r}: {part.casefold()} stands alone; {_GPUS_EXAMPLES}")
    match = _COUNT.fullmatch(part)
    if match is None:
        return 1, part
    count = int(match[1])
    if not 1 <= count <= MAX_GPUS:
        raise ConfigError(f"--gpus {whole[:80]!r} asks for {count} GPUs; give 1 to {MAX_GPUS}, or none")
    return count, match[2]


def _gpu(name: str, whole: str) -> Gpu:
    try:
        if "@" in name:
            memory, rate = _size_and_rate(name, "--gpus", "24GiB@1008")
            if rate is not None:
                return gpus.described(memory, rate)
        return gpus.find(name)
    except ConfigError as error:
        raise ConfigError(f"--gpus {whole[:80]!r}: {error}") from None


def _size_and_rate(text: str, option: str, example: str) -> tuple[int, float | None]:
    size, at, rate = text.partition("@")
    nbytes = parse_size(size, option)
    if not at:
        return nbytes, None
    match = _RATE.fullmatch(rate)
    value = float(match[1]) if match else 0.0
    if not 0 < value <= MAX_GB_PER_S:
        raise ConfigError(
            f"cannot read {rate[:80]!r} as GB/s for {option}; write a number from 0.1 to 100000, as in {example}"
        )
    return nbytes, value
