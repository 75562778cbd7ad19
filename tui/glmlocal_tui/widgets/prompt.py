"""Where the message is written: several lines, a history, pastes folded to a token."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widgets import TextArea

from glmlocal_tui.cleaning import clean
from glmlocal_tui.messages import PromptChanged, Submitted

PASTE_LINES, PASTE_CHARS = 10, 1500  # a longer paste is folded


class Prompt(TextArea):
    """Enter sends; Shift+Enter, Alt+Enter and Ctrl+J begin a line. The app says when the menu has the arrow keys."""

    DEFAULT_CSS = """
    Prompt { height: auto; min-height: 3; max-height: 10; padding: 0 1; }
    Prompt { border: round $primary 60%; background: $background; }
    Prompt:focus { border: round $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "app.scroll_page(-1)", "Scroll up", show=False),
        Binding("pagedown", "app.scroll_page(1)", "Scroll down", show=False),
        Binding("ctrl+home", "app.scroll_to(0)", "To the start", show=False),
        Binding("ctrl+end", "app.scroll_to(1)", "To the end", show=False),
    ]

    class MenuKey(Message):
        """A key for the completion menu: up, down, tab, enter, escape."""

        def __init__(self, key: str) -> None:
            super().__init__()
            self.key = key

    def __init__(self) -> None:
        super().__init__(
            soft_wrap=True,
            tab_behavior="focus",
            highlight_cursor_line=False,
            placeholder="Ask something · / for commands",
        )
        self.menu_is_open = False
        self.last_key_s = 0.0  # time.monotonic of the last key but Enter
        self._styles_are_new = True
        self._history: list[str] = []
        self._at: int | None = None  # place in the history; None: the text is new
        self._draft = ""
        self._pastes: dict[str, str] = {}
        self._paste_number = 0

    def notify_style_update(self) -> None:
        self._styles_are_new = True
        super().notify_style_update()

    def render_lines(self, crop: Region) -> list[Strip]:
        """TextArea works out its colours at every drawing, for half of what a key costs; here when they change."""
        if self._styles_are_new:
            self._styles_are_new = False
            return super().render_lines(crop)
        return super(TextArea, self).render_lines(crop)

    def use_history(self, lines: list[str]) -> None:
        self._history = lines

    def remember(self, text: str) -> None:
        if text and (not self._history or self._history[-1] != text):
            self._history.append(text)
        self._at = None

    def pastes(self) -> dict[str, str]:
        """Token → text of the folded pastes whose token is still there."""
        return {token: text for token, text in self._pastes.items() if token in self.text}

    def set_text(self, text: str, pastes: dict[str, str] | None = None) -> None:
        """Another text, the cursor at its end."""
        self._pastes.update(pastes or {})
        self.text = text
        self.move_cursor(self.document.end)

    def before_cursor(self) -> str:
        """The text from the start to the cursor."""
        return self.get_text_range((0, 0), self.cursor_location)

    def complete(self, insert: str, replaces: int) -> None:
        row, column = self.cursor_location
        self.replace(insert, (row, max(column - replaces, 0)), (row, column))

    async def _on_key(self, event: events.Key) -> None:
        if event.key != "enter":  # after which the answer is what is waited for
            self.last_key_s = time.monotonic()
        if self.menu_is_open and event.key in ("up", "down", "tab", "enter", "escape"):
            self._swallow(event)
            self.post_message(self.MenuKey(event.key))
        elif event.key in ("shift+enter", "alt+enter", "ctrl+j"):  # not a binding: it would overtake letters before it
            self._swallow(event)
            self.insert("\n")
        elif event.key == "enter":
            self._swallow(event)
            if self.before_cursor().endswith("\\"):  # for terminals that cannot tell Shift+Enter
                self.complete("\n", 1)
            else:
                self.post_message(Submitted(self.text))
        elif event.key in ("up", "down") and self._at_edge(event.key) and self._step(-1 if event.key == "up" else 1):
            self._swallow(event)
        else:
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        self._swallow(event)
        text = clean(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        lines = text.count("\n") + 1
        if lines > PASTE_LINES or len(text) > PASTE_CHARS:
            self._paste_number += 1
            token = f"[paste {self._paste_number}: {lines} lines]" if lines > 1 else f"[paste {self._paste_number}]"
            self._pastes[token] = text
            text = token
        self.insert(text)

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        event.stop()
        self.post_message(PromptChanged(self.before_cursor(), self.text))

    def _at_edge(self, key: str) -> bool:
        """Is the cursor in the first (last) line, so that the key means the history?"""
        return self.cursor_location[0] == (0 if key == "up" else self.document.line_count - 1)

    def _step(self, step: int) -> bool:
        """Another line of the history; False where there is none."""
        at = len(self._history) if self._at is None else self._at
        if self._at is None:
            self._draft = self.text
        at += step
        if not 0 <= at <= len(self._history):
            return False
        self._at = None if at == len(self._history) else at
        self.set_text(self._draft if self._at is None else self._history[at])
        if step < 0:
            self.move_cursor((0, len(self.document[0])))
        return True

    @staticmethod
    def _swallow(event: events.Event) -> None:
        event.stop()
        event.prevent_default()
