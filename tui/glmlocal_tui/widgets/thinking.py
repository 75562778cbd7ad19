"""The model's thinking: dim, live while it goes on, folded when the answer begins."""

from __future__ import annotations

import time

from textual.widgets import Collapsible

from glmlocal_tui.widgets.markdown_text import MarkdownText


class Thinking(Collapsible):
    """Without a text it is out of sight until ``begin``."""

    DEFAULT_CSS = """
    Thinking { border: none; background: transparent; padding: 0; margin: 0 0 1 0; }
    Thinking > CollapsibleTitle { color: $text-muted; padding: 0; }
    Thinking > Contents { padding: 0 0 0 2; }
    """

    def __init__(self, text: str = "") -> None:
        self._text = MarkdownText(text, dim=True)
        self._since_s = 0.0
        super().__init__(self._text, title="Thought" if text else "Thinking…", collapsed=bool(text))
        self.display = bool(text)
        self._title.focus_on_click = lambda: False  # type: ignore[method-assign]

    def begin(self, since_s: float) -> None:
        """It goes on since then, and is seen."""
        self._since_s = since_s
        self.display = True

    def append(self, text: str) -> None:
        self._text.append(text)

    def scroll_visible(self, *options: object, **named: object) -> None:
        """Nothing: a Collapsible that folds would otherwise scroll to itself, away from the text that comes."""

    def finish(self, *, fold: bool) -> None:
        """The answer begins, or nothing more comes."""
        self._text.finish()
        self.title = f"Thought for {time.monotonic() - self._since_s:.1f} s"
        if fold:
            self.collapsed = True
