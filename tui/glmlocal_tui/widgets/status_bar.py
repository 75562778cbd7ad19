"""The last line: which model, what it is doing, and how full its context is."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from textual.content import Content
from textual.widgets import Static

from glmlocal_tui.widgets.bars import fit


@dataclass(frozen=True, slots=True)
class Status:
    model: str = ""
    phase: str = ""
    thinking: bool | None = None  # None: the model does not think
    context_used: int = 0
    context: int = 0
    tokens_per_s: float = 0.0


class StatusBar(Static):
    DEFAULT_CSS = "StatusBar { height: 1; width: 1fr; color: $text-muted; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__(markup=False)
        self._status = Status()

    def show(self, status: Status) -> None:
        if status != self._status:
            self._status = status
            self.refresh()

    def render(self) -> Content:
        status, width = self._status, max(self.size.width, 1)
        left = [status.model or "no model yet", status.phase]
        if status.thinking is not None:
            left.append("thinking on" if status.thinking else "thinking off")
        right = []
        if status.tokens_per_s:
            right.append(f"{status.tokens_per_s:.1f} tok/s")
        if status.context:
            right.append(f"context {status.context_used:,}/{status.context:,}")
        elif status.context_used:
            right.append(f"context {status.context_used:,}")
        right.append("F1 help")
        while right and cell_len(left[0]) + cell_len(" · ".join(right)) + 1 > width:
            right.pop()  # the model's name is worth more
        end = " · ".join(right)
        room = max(width - cell_len(end) - 1, 0)
        shown = [part for part in left if part]
        while len(shown) > 1 and cell_len(" · ".join(shown)) > room:  # half a word would say something else
            shown.pop()
        start = fit(" · ".join(shown), room)
        return Content(fit(f"{start} {end}", width))
