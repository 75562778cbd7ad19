"""Bars and sparklines as text: one widget draws many of them, and they fit any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"


def bar(fraction: float, width: int) -> str:
    """A bar of ``width`` cells; what is not filled is a light shade."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    text = "█" * full + (_EIGHTHS[rest] if rest else "")
    return text + "░" * (width - len(text))


def sparkline(values: Sequence[float], width: int) -> str:
    """The last ``width`` values, the largest of them as high as the line is."""
    shown = list(values)[-width:]
    top = max(shown, default=0.0)
    line = "".join(_LEVELS[min(int(value / top * 8), 7)] if top > 0 else _LEVELS[0] for value in shown)
    return line.rjust(width)


def counted(number: int, what: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def fit(text: str, width: int) -> str:
    """Exactly ``width`` cells, wide characters counted as two; what does not fit ends in …"""
    if cell_len(text) <= width:
        return text + " " * (width - cell_len(text))
    return set_cell_size(set_cell_size(text, max(width - 1, 0)).rstrip() + "…", width) if width > 0 else ""
