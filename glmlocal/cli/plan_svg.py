"""A Plan as a picture: a bar per device, a legend, the speeds. One self-contained SVG file without scripts or fonts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from glmlocal.cli import plan_content as content
from glmlocal.cli.plan_content import CATEGORIES, Bar
from glmlocal.planner.plan import Plan
from glmlocal.units import format_bytes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = dict(zip(CATEGORIES, ("#0072b2", "#56b4e9", "#cc79a7", "#009e73", "#e69f00", "#999999"), strict=True))
_WIDTH, _LEFT, _RIGHT, _BAR, _ROW = 900, 180, 190, 22, 34
_LINE, _LETTERS = 20, 85
_FONT = 'font-family="system-ui, sans-serif" font-size="13"'


def picture(plan: Plan) -> str:
    """Well-formed XML whatever the names are."""
    body = list(_body(plan))
    height = max(y for y, _ in body) + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label={quoteattr(content.verdict(plan))} {_FONT}>'
    )
    background = f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *(element for _, element in body), "</svg>"]) + "\n"


def _body(plan: Plan) -> Iterator[tuple[int, str]]:
    """(lowest y, element), from top to bottom."""
    y = 32
    yield y, _text(20, y, _cut(content.verdict(plan)), size=18, weight="bold")
    y += 24
    subtitle = (
        f"{plan.resolved.context:,} tokens of context, {plan.resolved.batch} sequences, "
        f"KV in {plan.resolved.kv_dtype}, {format_bytes(plan.download_bytes)} to download"
    )
    yield y, _text(20, y, subtitle, colour="#555555")
    y += 24
    for bar in content.bars(plan):
        for element in _bar(bar, y):
            yield y + _BAR, element
        y += _ROW
    yield from _legend(y + 4)
    y += 44
    for label, value in _table(plan):
        yield y, _text(20, y, label)
        yield y, _text(_LEFT + 20, y, value)
        y += _LINE


def _bar(bar: Bar, y: int) -> Iterator[str]:
    room = _WIDTH - _LEFT - _RIGHT
    whole = max(bar.capacity_bytes, bar.used_bytes, 1)
    yield _text(20, y + 15, _cut(bar.name, 20))
    yield f'<rect x="{_LEFT}" y="{y}" width="{room}" height="{_BAR}" fill="#eeeeee"/>'
    done = 0
    for name, nbytes in bar.segments:
        x, width = _LEFT + done / whole * room, nbytes / whole * room
        title = escape(f"{name}: {format_bytes(nbytes)}")
        yield (
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" fill="{_COLOURS[name]}">'
            f"<title>{title}</title></rect>"
        )
        done += nbytes
    if bar.used_bytes > bar.capacity_bytes:
        x = _LEFT + bar.capacity_bytes / whole * room
        yield f'<line x1="{x:.2f}" y1="{y - 3}" x2="{x:.2f}" y2="{y + _BAR + 3}" stroke="#d00000" stroke-width="2"/>'
    yield _text(_WIDTH - _RIGHT + 10, y + 15, bar.text)


def _legend(y: int) -> Iterator[tuple[int, str]]:
    x = _LEFT
    for name in CATEGORIES:
        yield y + 12, f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[name]}"/>'
        yield y + 12, _text(x + 17, y + 11, name)
        x += 45 + 7 * len(name)  # about as wide as the letters are


def _table(plan: Plan) -> Iterator[tuple[str, str]]:
    for speed in content.speeds(plan):
        span = f" ({speed.range})" if speed.range else ""
        yield speed.label, f"{speed.value}{span}, {speed.basis}, bound by {speed.bound_by}"
    if missing := content.shortfall(plan):
        yield from _wrapped("missing", missing)
        for text, option in content.advice(plan):
            yield from _wrapped("instead", f"{option}: {text}" if option else text)


def _wrapped(label: str, text: str) -> Iterator[tuple[str, str]]:
    for line in textwrap.wrap(text, _LETTERS, break_long_words=True):
        yield label, line
        label = ""


def _cut(text: str, most: int = _LETTERS) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: int, y: int, text: str, *, size: int = 13, weight: str = "normal", colour: str = "#111111") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
