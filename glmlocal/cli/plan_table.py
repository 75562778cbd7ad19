"""Many plans on a terminal, one per line. Without rich's tables: they took longer than planning all releases does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from rich.cells import cell_len, chop_cells, set_cell_size

from glmlocal.cli.terminal import dimmed

_GAP = "  "
_LEFT = 2  # columns of words; numbers are on the right
_PIPE_COLUMNS = 100  # of a file or pipe: wide enough that lines stay lines


def show_many(
    headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str], out: TextIO | None = None
) -> None:
    """Headings, a line for each row, and notes below."""
    out = out or sys.stdout
    first, *others = table(headings, rows, _columns(out))
    print(dimmed(first, out), *others, "", *(dimmed(note, out) for note in notes), sep="\n", file=out)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], columns: int) -> Iterator[str]:
    """Lines of at most so many columns, if need be with the first cell folded; the others stay whole."""
    cells = [headings, *rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    widths[0] = max(1, min(widths[0], columns - sum(len(_GAP) + width for width in widths[1:])))
    for name, *others in cells:
        begin, *rest = chop_cells(name, widths[0]) or [""]
        line = [set_cell_size(begin, widths[0])]
        for place, (cell, width) in enumerate(zip(others, widths[1:], strict=True), start=1):
            line.append(set_cell_size(cell, width) if place < _LEFT else " " * (width - cell_len(cell)) + cell)
        yield _GAP.join(line).rstrip()
        yield from rest


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns if out.isatty() else _PIPE_COLUMNS
    except (OSError, ValueError):
        return _PIPE_COLUMNS
