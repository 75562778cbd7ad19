"""One line above the prompt for what is wrong, or what is going on, until it is over."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from glmlocal_tui.cleaning import clean


class Banner(Static):
    """Each source (server, store …) has its own line; empty ones take no room."""

    DEFAULT_CSS = """
    Banner { display: none; height: auto; max-height: 4; width: 1fr; padding: 0 1; }
    Banner { color: $text-warning; background: $warning-muted; }
    Banner.-shown { display: block; }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)
        self._lines: dict[str, str] = {}

    def tell(self, source: str, text: str) -> None:
        """Set the line of a source; an empty text takes it away."""
        if self._lines.get(source, "") == text:
            return
        self._lines[source] = text
        lines = [clean(line) for line in self._lines.values() if line]
        self.update(Content("\n".join(lines)))
        self.set_class(bool(lines), "-shown")
