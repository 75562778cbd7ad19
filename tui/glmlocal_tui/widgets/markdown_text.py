"""A Markdown text that is one widget, however long it is and however fast it grows."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.geometry import Region, Size
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from glmlocal_tui.markdown_blocks import Block, Blocks
from glmlocal_tui.messages import CopyRequested
from glmlocal_tui.render import GrowingCode, Look, block_lines, plain_lines
from glmlocal_tui.widgets.laid_out import LaidOutOnce


class MarkdownText(LaidOutOnce, Widget):
    """Lines of finished blocks are kept until the width or the colours change; the last block is drawn anew."""

    DEFAULT_CSS = """
    MarkdownText { height: auto; width: 1fr; }
    MarkdownText.-dim { color: $text-muted; }
    """

    def __init__(self, text: str = "", *, dim: bool = False, id: str | None = None) -> None:
        super().__init__(id=id, classes="-dim" if dim else "")
        self._blocks = Blocks()
        self._held = ""
        self._look: Look | None = None
        self._closed_lines: list[Strip] = []
        self._drawn = 0  # closed blocks that are in _closed_lines
        self._tail_lines: list[Strip] = []
        self._growing = GrowingCode()
        self._colours: tuple[object, ...] = ()  # what the lines in _painted depend on besides the text
        self._style = Style()
        self._painted: dict[int, Strip] = {}  # lines as they are on the screen
        self._finished = bool(text)  # a text that is there from the start is whole
        if text:
            self._blocks.append(text)

    @property
    def source(self) -> str:
        return self._blocks.source

    def code_blocks(self) -> list[str]:
        return [block.code for block in self._blocks.all() if block.code is not None]

    def append(self, text: str) -> None:
        """Add text at the end; only what it changes is drawn."""
        if not text:
            return
        self._finished, self._held = False, ""
        self._blocks.append(text)
        self._update()

    def hold(self, text: str) -> None:
        """What stands here, muted, until the first of the text comes: its line is there already. Empty: nothing."""
        if text != self._held and not self._blocks.source:
            self._held = text
            self._update()

    def _update(self) -> None:
        """Draw the last block anew."""
        if self._look is None:
            self._relayout()
            return
        first, tail = len(self._closed_lines), self._tail_lines
        self._draw(self._look)
        # The whole last block was drawn anew, but most of its lines are what they were.
        top = first + next((n for n, line in enumerate(tail) if line != self._line(first + n)), len(tail))
        before, after = first + len(tail), len(self._closed_lines) + len(self._tail_lines)
        for y in range(top, max(before, after)):
            self._painted.pop(y, None)
        changed = Region(0, top, self._look.width, after - top)
        if after != before:
            self._relayout(changed)
        elif changed:
            self.refresh(changed)

    def clear(self) -> None:
        """No text any more; another one may follow."""
        self._blocks, self._held, self._look, self._finished = Blocks(), "", None, False
        self._relayout()

    def finish(self) -> None:
        """No more text comes: the last block is drawn as a finished one."""
        if self._finished:
            return
        self._finished, self._held = True, ""
        self._update()

    def notify_style_update(self) -> None:
        self._look = None
        super().notify_style_update()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        self._lay_out(width)
        # without the blank line that ends the last block
        return max(len(self._closed_lines) + len(self._tail_lines) - 1, 0)

    def get_content_width(self, container: Size, viewport: Size) -> int:
        return container.width

    def render_lines(self, crop: Region) -> list[Strip]:
        """The lines of a part, in the app's colours. They are kept here: Textual forgets its own at each new height."""
        width = self.size.width
        self._lay_out(width)
        self._dirty_regions.clear()  # else one more with each append
        background, filters = self.background_colors[1], self.get_line_filters()
        style = self.rich_style  # costs as much as drawing a line: once for all of them
        if self._colours != (colours := (style, background, *filters)):
            self._colours, self._style = colours, style
            self._painted.clear()
        strips = []
        for y in crop.line_range:
            strip = None if self.text_selection else self._painted.get(y)
            if strip is None:
                strip = self.render_line(y)
                for line_filter in filters:
                    strip = strip.apply_filter(line_filter, background)
                if not self.text_selection:
                    self._painted[y] = strip
            strips.append(strip)
        whole = crop.column_span == (0, width)
        return strips if whole else [strip.crop(*crop.column_span) for strip in strips]

    def render_line(self, y: int) -> Strip:
        strip = self._line(y)
        return Strip.blank(self.size.width, self._style) if strip is None else self._with_style(strip, y)

    def _with_style(self, strip: Strip, y: int) -> Strip:
        """A line as it is drawn: in the widget's colours, what is selected marked, each cell knowing its place."""
        span = self.text_selection.get_span(y) if self.text_selection is not None else None
        if span is not None:
            style = self.screen.get_component_rich_style("screen--selection")
            text = strip.text  # a span counts characters, a strip cells
            start = cell_len(text[: span[0]])
            end = strip.cell_length if span[1] == -1 else cell_len(text[: span[1]])
            pieces = strip.divide([start, end, strip.cell_length] if start else [end, strip.cell_length])
            chosen = 1 if start else 0
            strip = Strip.join(piece.apply_style(style) if n == chosen else piece for n, piece in enumerate(pieces))
        strip = Strip(Segment.apply_style(strip, self._style), strip.cell_length)
        return strip.apply_offsets(0, y)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        lines = [*self._closed_lines, *self._tail_lines]
        return selection.extract("\n".join(line.text.rstrip() for line in lines)), "\n"

    def action_copy_block(self, number: int) -> None:
        blocks = self._blocks.all()
        if 0 <= number < len(blocks) and (code := blocks[number].code) is not None:
            self.post_message(CopyRequested(code, "code block"))

    def _relayout(self, *changed: Region) -> None:
        # Textual counts no second request while one is pending, and would keep the height it had measured in between.
        self._layout_updates += 1
        self.refresh(*changed, layout=True)

    def _line(self, y: int) -> Strip | None:
        closed = len(self._closed_lines)
        if y < closed:
            return self._closed_lines[y]
        return self._tail_lines[y - closed] if y - closed < len(self._tail_lines) else None

    def _lay_out(self, width: int) -> None:
        look = self._look
        if look is not None and look.width == width:
            return
        variables = self.app.theme_variables
        ink, paper = (Color.parse(variables.get(name, "white")) for name in ("foreground", "background"))
        accent = Color.parse(variables.get("primary", "white"))
        dark = self.app.current_theme.dark
        look = Look(max(width, 1), dark, accent.hex6, ink.blend(paper, 0.4).hex6)
        self._closed_lines, self._drawn, self._growing = [], 0, GrowingCode()
        self._painted.clear()
        self._look = look
        self._draw(look)

    def _draw(self, look: Look) -> None:
        closed = self._blocks.closed
        if self._drawn < len(closed):
            self._growing = GrowingCode()
        for number in range(self._drawn, len(closed)):
            self._closed_lines += block_lines(closed[number], look, number)
        self._drawn = len(closed)
        self._tail_lines = [line for block in self._blocks.tail for line in self._tail(block, look, len(closed))]
        if self._held:
            self._tail_lines = [*plain_lines(self._held, look), Strip.blank(look.width)]

    def _tail(self, block: Block, look: Look, number: int) -> list[Strip]:
        grows = block.code is not None and not self._finished
        return (self._growing.lines if grows else block_lines)(block, look, number)
