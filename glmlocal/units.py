"""Sizes are ints in bytes everywhere; this module is where people's notation comes in and goes out."""

from __future__ import annotations

import re

from glmlocal.errors import ConfigError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_FACTOR = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": KIB, "MI": MIB, "GI": GIB, "TI": TIB}
_MOST_BYTES = 1 << 60  # no machine has more; and every sum of sizes stays exact in a float's exponent range


def parse_size(text: str, name: str = "") -> int:
    """``24GiB``, ``2TB``, ``512M`` → bytes; ``name`` is the option, for the message. Raises ConfigError.

    A number without a unit is refused: half of its writers mean bytes, the others GiB.
    """
    of = f" for {name}" if name else ""
    if text.strip().startswith(("-", "−")):
        raise ConfigError(f"{text[:80]!r} is negative{of}; write for example 24GiB, 2TB or 500MB")
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]I?)B?\s*", text, re.IGNORECASE | re.ASCII)
    nbytes = int(float(match[1]) * _FACTOR[match[2].upper()]) if match else 0
    if not 0 < nbytes <= _MOST_BYTES:
        raise ConfigError(f"cannot read {text[:80]!r} as a size{of}; write for example 24GiB, 2TB or 500MB")
    return nbytes


def format_bytes(num_bytes: float) -> str:
    """1536 → ``1.5 KiB``; three significant digits are enough for a person."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(count: float) -> str:
    """106852251264 → ``106.9B``: parameters and tokens as the field writes them."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor:
            return f"{count / factor:.4g}{unit}"
    return f"{count:.0f}"
