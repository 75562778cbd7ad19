"""A Plan, or many, as Markdown that GitHub renders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from glmlocal.cli import plan_content as content
from glmlocal.planner.plan import Plan
from glmlocal.units import format_bytes


def document(plan: Plan, notes: Iterable[str] = (), *, explain: bool = False) -> str:
    """The same as the terminal's report, tables for bars."""
    return "\n".join(_document(plan, notes, explain)) + "\n"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> Iterator[str]:
    """Lines of a table; columns after the first ``left`` are aligned right."""
    headings = list(headings)
    yield _row(headings)
    yield "|" + "|".join([" --- "] * left + [" ---: "] * (len(headings) - left)) + "|"
    for row in rows:
        yield _row(row)


def _document(plan: Plan, notes: Iterable[str], explain: bool) -> Iterator[str]:
    yield f"# {_escaped(content.verdict(plan))}"
    if missing := content.shortfall(plan):
        yield from ("", f"**{_escaped(missing)}**")
    ledger = content.ledger(plan)
    yield from ("", "## Memory", "")
    bars = content.bars(plan)
    yield from table(
        ("device", "used", "of"), ((b.name, format_bytes(b.used_bytes), format_bytes(b.capacity_bytes)) for b in bars)
    )
    yield ""
    rows = ((what, *(format_bytes(n) if n else "" for n in sums), basis) for what, sums, basis in ledger.rows)
    yield from table(("what", *ledger.columns, "basis"), rows)
    yield from ("", "## Model", "")
    yield from table(("", "", "basis"), content.facts(plan), left=3)
    if plan.forecast is not None:
        yield from ("", "## Speed of one sequence", "")
        speeds = ((s.label, s.value, s.range, s.bound_by, s.basis) for s in content.speeds(plan))
        yield from table(("", "", "range", "bound by", "basis"), speeds)
    told = content.advice(plan, notes)
    advice = [f"{_code(option)}: {_escaped(text)}" if option else _escaped(text) for text, option in told]
    yield from _list("Notes" if plan.fits else "What would fit, smallest change first", advice)
    yield from _list("Assumptions", map(_escaped, content.assumptions(plan)))
    if explain:
        yield from ("", "## Every figure", "")
        yield from table(("where", "what", "", "how"), content.explanations(plan), left=4)


def _list(heading: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield from ("", f"## {heading}", "", *(f"* {line}" for line in lines))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _escaped(text: str) -> str:
    """Names can contain anything; they are never markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
