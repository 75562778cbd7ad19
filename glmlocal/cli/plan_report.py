"""A Plan on a terminal: bars, ledger, speeds, advice, assumptions. In a pipe the same text without colours."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.cells import set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from glmlocal.cli import plan_content as content
from glmlocal.cli.plan_content import CATEGORIES, Bar
from glmlocal.planner.plan import Plan
from glmlocal.units import format_bytes

# Glyphs differ, so that a bar can be read without colours as well.
_GLYPHS = dict(zip(CATEGORIES, "█▓▒▞▄░", strict=True))
_STYLES = dict(zip(CATEGORIES, ("blue", "cyan", "magenta", "green", "yellow", "bright_black"), strict=True))
_OVER = "!"  # beyond what the device has
_BAR_CELLS, _NAME_CELLS = 38, 16
_PIPE_COLUMNS = 100


def console() -> Console:
    """A person's screen as wide as it is; a file or pipe wide enough that lines stay lines."""
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    return Console(highlight=False, markup=False, emoji=False, width=width)


def show(plan: Plan, out: Console, notes: Iterable[str] = (), *, explain: bool = False) -> None:
    """Everything about one plan; ``notes`` are about how it came to be this one."""
    verdict = Text(content.verdict(plan), "bold green" if plan.fits else "bold red")
    out.print(verdict)
    if missing := content.shortfall(plan):
        out.print(missing, style="red")
    out.print()
    _print_bars(content.bars(plan), out)
    _section(out, "memory", _ledger(plan))
    _section(out, "model", _facts(plan))
    if plan.forecast is not None:
        _section(out, "speed of one sequence", _speeds(plan))
    _bullets(out, "what would fit, smallest change first" if not plan.fits else "notes", _advice(plan, notes))
    _bullets(out, "assumptions", content.assumptions(plan))
    if explain:
        _section(out, "every figure", _explanations(plan))


def bar_text(bar: Bar, cells: int = _BAR_CELLS) -> Text:
    """``█████▓▒    ``: parts in proportion, at least one cell each; what the device does not have is ``!``."""
    whole = max(bar.capacity_bytes, bar.used_bytes, 1)
    text, done, drawn = Text(), 0, 0
    for name, nbytes in bar.segments:
        done += nbytes
        end = min(cells, max(round(done / whole * cells), drawn + 1))
        text.append(_GLYPHS[name] * (end - drawn), _STYLES[name])
        drawn = end
    text.append(" " * (cells - drawn))
    if bar.used_bytes > bar.capacity_bytes:
        has = round(bar.capacity_bytes / whole * cells)
        text = Text.assemble(text[:has], (_OVER * (cells - has), "bold red"))
    return text


def _print_bars(bars: Iterable[Bar], out: Console) -> None:
    used: dict[str, None] = {}
    for bar in bars:
        used |= dict.fromkeys(name for name, _ in bar.segments)
        line = Text(set_cell_size(bar.name, _NAME_CELLS) + " ▕")
        line.append_text(bar_text(bar))
        line.append("▏" + bar.text)
        out.print(line, no_wrap=True, crop=True)
    legend = Text("  ")
    for name in CATEGORIES:
        if name in used:
            legend.append(_GLYPHS[name], _STYLES[name])
            legend.append(f" {name}  ")
    out.print(legend, no_wrap=True, crop=True)


def _ledger(plan: Plan) -> Table:
    found = content.ledger(plan)
    table = _table(("", *found.columns, ""), numbers=len(found.columns))
    for what, sums, basis in found.rows[:-1]:
        table.add_row(what, *(format_bytes(nbytes) if nbytes else "" for nbytes in sums), Text(basis, "dim"))
    what, sums, basis = found.rows[-1]
    table.add_row(what, *map(format_bytes, sums), Text(basis, "dim"), style="bold")
    return table


def _facts(plan: Plan) -> Table:
    table = _table(("", "", ""), numbers=0)
    for label, text, basis in content.facts(plan):
        table.add_row(label, text, Text(basis, "dim"))
    return table


def _speeds(plan: Plan) -> Table:
    table = _table(("", "", "range", "bound by", ""), numbers=2)
    for speed in content.speeds(plan):
        table.add_row(speed.label, speed.value, speed.range, speed.bound_by, Text(speed.basis, "dim"))
    return table


def _explanations(plan: Plan) -> Table:
    table = _table(("where", "what", "", "how"), numbers=0)
    for row in content.explanations(plan):
        table.add_row(*row)
    return table


def _table(headings: tuple[str, ...], numbers: int) -> Table:
    """Columns 1 to ``numbers`` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=any(headings), padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        is_number = 1 <= index <= numbers
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return table


def _advice(plan: Plan, notes: Iterable[str]) -> Iterable[str]:
    for text, option in content.advice(plan, notes):
        yield f"{option}: {text}" if option else text


def _section(out: Console, heading: str, body: Table) -> None:
    out.print()
    out.print(heading, style="bold")
    out.print(Padding(body, (0, 0, 0, 2), expand=False))


def _bullets(out: Console, heading: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if not lines:
        return
    out.print()
    out.print(heading, style="bold")
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row("•", line)
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
