"""A Markdown block → lines of cells. Uses rich; knows nothing of widgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from rich.theme import Theme
from textual.strip import Strip

from glmlocal_tui.cleaning import one_line
from glmlocal_tui.markdown_blocks import Block, Blocks

if TYPE_CHECKING:
    from rich.markdown import Markdown

CHUNK_LINES = 64
WHOLE_LINES = 512  # a finished code block up to this is coloured in one piece


@dataclass(frozen=True, slots=True)
class Look:
    """What the lines depend on besides the block: the width in cells and the app's colours."""

    width: int
    dark: bool
    accent: str
    muted: str


def block_lines(block: Block, look: Look, number: int) -> list[Strip]:
    """The lines of a finished block, with an empty one after it; ``number`` is told by a click on ``copy``."""
    if block.code is not None:
        code = block.code.rstrip("\n").split("\n")
        lines = [_fence_head(block, look, number)]
        step = len(code) if len(code) <= WHOLE_LINES else CHUNK_LINES
        for start in range(0, len(code), max(step, 1)):
            lines += code_lines("\n".join(code[start : start + step]), block.language, look)
        return [*lines, Strip.blank(look.width)]
    if not block.source.strip():
        return []
    theme = "ansi_dark" if look.dark else "ansi_light"
    lines = _lines(_markdown()(block.source, code_theme=theme, hyperlinks=False), look)
    while lines and not lines[-1].text.strip():
        lines.pop()
    while lines and not lines[0].text.strip():
        lines.pop(0)
    return [*lines, Strip.blank(look.width)] if lines else []


def plain_lines(text: str, look: Look) -> list[Strip]:
    """A muted text without Markdown."""
    return _lines(Text(text, Style.parse(look.muted)), look)


def warm_up() -> None:
    """Import what the first answer needs, 0.3 s of it, in a thread, before it comes."""
    look = Look(20, True, "#ffffff", "#808080")
    blocks = Blocks()
    blocks.append("**a**\n\n```python\nb = 1\n```\n")
    for block in blocks.all():
        block_lines(block, look, 0)


class GrowingCode:
    """The lines of a code block that is still being written: coloured in chunks, each of them once."""

    def __init__(self) -> None:
        self._done: list[Strip] = []
        self._done_lines = 0
        self._for: tuple[str, Look] | None = None

    def lines(self, block: Block, look: Look, number: int) -> list[Strip]:
        assert block.code is not None
        if self._for != (block.language, look):
            self._done, self._done_lines, self._for = [_fence_head(block, look, number)], 0, (block.language, look)
        code = block.code.rstrip("\n").split("\n")
        while len(code) - self._done_lines > CHUNK_LINES:
            chunk = code[self._done_lines : self._done_lines + CHUNK_LINES]
            self._done += code_lines("\n".join(chunk), block.language, look)
            self._done_lines += CHUNK_LINES
        rest = "\n".join(code[self._done_lines :])
        return [*self._done, *code_lines(rest, block.language, look), Strip.blank(look.width)]


@cache
def _markdown() -> type[Markdown]:
    """rich's Markdown, imported when there is something to draw, with headings on the left."""
    from rich.markdown import Heading, Markdown

    class LeftHeading(Heading):
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            self.text.justify = "left"
            yield self.text

    class LeftMarkdown(Markdown):
        elements = {**Markdown.elements, "heading_open": LeftHeading}  # noqa: RUF012 - rich's own declaration

    return LeftMarkdown


def code_lines(code: str, language: str, look: Look) -> Iterator[Strip]:
    from rich.syntax import Syntax

    syntax = Syntax(
        code,
        language or "text",
        theme="ansi_dark" if look.dark else "ansi_light",
        word_wrap=True,
        background_color="default",
    )
    bar = Segment("│ ", Style.parse(look.muted))
    narrow = Look(max(look.width - 2, 1), look.dark, look.accent, look.muted)
    for line in _lines(syntax, narrow):
        yield Strip([bar, *line], look.width)


def _fence_head(block: Block, look: Look, number: int) -> Strip:
    """``╭ python ───── copy``, where copy can be clicked."""
    muted = Style.parse(look.muted)
    name = one_line(block.language, 20)
    label, copy = f"╭ {name} " if name else "╭─", " copy"
    from rich.cells import cell_len

    rule = "─" * max(look.width - cell_len(label) - len(copy), 0)
    click = Style.parse(look.accent) + Style.from_meta({"@click": f"copy_block({number})"})
    return Strip([Segment(label + rule, muted), Segment(copy, click)]).crop(0, look.width)


def _lines(renderable: RenderableType, look: Look) -> list[Strip]:
    console = _console(look.accent, look.muted)
    options = console.options.update(width=look.width, height=None)
    return [Strip(line, look.width) for line in console.render_lines(renderable, options, pad=True)]


@lru_cache(maxsize=8)
def _console(accent: str, muted: str) -> Console:
    """rich's Markdown in the app's colours. It renders to segments only; nothing is ever written."""
    theme = Theme(
        {
            "markdown.h1": f"bold underline {accent}",
            "markdown.h2": f"bold {accent}",
            "markdown.h3": f"bold {accent}",
            "markdown.h4": "bold",
            "markdown.code": f"bold {accent}",
            "markdown.item.bullet": accent,
            "markdown.item.number": accent,
            "markdown.block_quote": muted,
            "markdown.hr": muted,
            "markdown.link": accent,
            "markdown.link_url": f"underline {accent}",
            "markdown.table.border": muted,
            "markdown.table.header": "bold",
        }
    )
    return Console(color_system="truecolor", force_terminal=True, legacy_windows=False, theme=theme, width=80)
