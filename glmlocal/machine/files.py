"""Reading /proc and /sys: small files that may be missing, unreadable or of another kernel. Nothing here raises."""

from __future__ import annotations

from pathlib import Path

_MOST_CPUS = 1 << 16


def read_text(path: Path) -> str:
    """A file's text without the blanks around it; empty where there is no such file."""
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_int(path: Path) -> int | None:
    """A file's number; None where there is no such file or it says something else, such as "max"."""
    return as_int(read_text(path))


def as_int(text: str) -> int | None:
    """A number without a sign, as these files write them."""
    return int(text) if text.isascii() and text.isdigit() else None


def key_values(path: Path) -> dict[str, int]:
    """``MemTotal:  123 kB`` and ``inactive_file 123`` lines → numbers by name, units as the file has them."""
    found = {}
    for line in read_text(path).splitlines():
        words = line.replace(":", " ").split()
        number = as_int(words[1]) if len(words) > 1 else None
        if number is not None:
            found[words[0]] = number
    return found


def cpu_list(text: str) -> frozenset[int]:
    """``0-3,8`` → {0, 1, 2, 3, 8}; parts that are not of this form are left out."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        low, high = as_int(first), as_int(last or first)
        if low is not None and high is not None and high < _MOST_CPUS:
            cpus.update(range(low, high + 1))
    return frozenset(cpus)
