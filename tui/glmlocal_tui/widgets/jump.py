"""``↓ newest``: shown while the reader is away from the end; a click, or Ctrl+End, goes there."""

from __future__ import annotations

from textual.widgets import Static


class Jump(Static):
    DEFAULT_CSS = """
    Jump { display: none; height: 1; width: 1fr; text-align: center; color: $text-accent; background: $accent-muted; }
    Jump.-shown { display: block; }
    """

    def __init__(self) -> None:
        super().__init__("↓ newest · Ctrl+End", markup=False)

    def show(self, away: bool) -> None:
        self.set_class(away, "-shown")

    async def on_click(self) -> None:
        await self.run_action("app.scroll_to(1)")
