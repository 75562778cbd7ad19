"""Textual's compositor, asked for less: only lines that changed, and only of widgets that are seen there.

Textual draws every widget whose clip meets the changed region, in full and whether or not something covers it: a key
in the prompt has all containers around it draw the height of the screen. The result here is the same, cell for cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from textual._compositor import Compositor, ReflowResult
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget


class VisibleCompositor(Compositor):
    """Draws front to back, and stops asking where every cell is taken."""

    def reflow(self, parent: Widget, size: Size) -> ReflowResult:
        result = super().reflow(parent, size)
        self._full_map_invalidated = False  # it was made a moment ago: Textual would lay everything out once more
        return result

    def _render_chops(self, crop: Region, is_rendered_line: Callable[[int], bool]) -> Sequence[Mapping[int, Strip]]:
        cuts = self.cuts
        chops: list[dict[int, Strip | None]] = [dict.fromkeys(line[:-1]) for line in cuts]
        x1, x2 = crop.column_span
        free_cuts = {  # for each line that is wanted, where nothing is drawn yet
            y: {cut for cut, end in pairwise(cuts[y]) if cut < x2 and end > x1}
            for y in crop.line_range
            if is_rendered_line(y)
        }
        for widget, (region, clip) in self.visible_widgets.items():
            shown = region.intersection(clip)
            first, last = shown.column_span
            lines = shown.line_range
            rows = [y for y, free in free_cuts.items() if y in lines and any(first <= cut < last for cut in free)]
            if not rows:
                continue
            top = rows[0]
            strips = widget.render_lines(Region(shown.x - region.x, top - region.y, shown.width, rows[-1] + 1 - top))
            for y in rows:
                line = chops[y]
                inside = [cut for cut in cuts[y] if first <= cut <= last]
                pieces = strips[y - top].divide([cut - first for cut in inside[1:]])
                for cut, piece in zip(inside, pieces, strict=False):  # one cut more than pieces
                    if line[cut] is None:
                        line[cut] = piece
                free_cuts[y].difference_update(inside[:-1])
                if not free_cuts[y]:
                    del free_cuts[y]
            if not free_cuts:
                break
        return cast("Sequence[Mapping[int, Strip]]", chops)  # as Textual's own: where it is None, nothing is drawn


class ChatScreen(Screen[None]):
    """The screen of the conversation."""

    def __init__(self) -> None:
        super().__init__(id="_default")
        self._compositor = VisibleCompositor()
