"""Full-text search over all conversations, as one types."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from glmlocal_tui.cleaning import one_line
from glmlocal_tui.messages import SessionChosen
from glmlocal_tui.store import Hit
from glmlocal_tui.widgets.bars import counted


class SearchScreen(ModalScreen[SessionChosen | None]):
    DEFAULT_CSS = """
    SearchScreen { align: center middle; }
    SearchScreen > Vertical { width: 90%; min-width: 10; max-width: 110; height: 80%; }
    SearchScreen > Vertical { border: round $primary; background: $surface; }
    SearchScreen Input, SearchScreen Input:focus { border: none; height: 1; background: $surface; }
    SearchScreen OptionList, SearchScreen OptionList:focus { border: none; height: 1fr; background: $surface; }
    SearchScreen Static { height: 1; color: $text-muted; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Close"),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("up", "move(-1)", show=False, priority=True),
    ]

    def __init__(self, find: Callable[[str], Awaitable[list[Hit]]], text: str = "") -> None:
        super().__init__()
        self._find, self._text = find, text
        self._hits: list[Hit] = []

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "search all conversations"
            box.border_subtitle = "Enter opens · Esc closes"
            yield Input(self._text, placeholder="words that a message has")
            yield OptionList(markup=False)
            yield Static(markup=False)

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self.look(self._text)

    def on_input_changed(self, event: Input.Changed) -> None:
        self.look(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._open(self.query_one(OptionList).highlighted)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._open(event.option_index)

    def action_move(self, step: int) -> None:
        options = self.query_one(OptionList)
        if self._hits:
            options.highlighted = ((options.highlighted or 0) + step) % len(self._hits)

    @work(exclusive=True)
    async def look(self, text: str) -> None:
        """Show what is found; a newer search takes the place of one that still runs."""
        self._hits = await self._find(text)
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(_line(hit)) for hit in self._hits])
        options.highlighted = 0 if self._hits else None
        found = counted(len(self._hits), "message") if self._hits else "nothing found" if text.strip() else ""
        self.query_one(Static).update(Content(found))

    def _open(self, number: int | None) -> None:
        if number is not None and number < len(self._hits):
            hit = self._hits[number]
            self.dismiss(SessionChosen(hit.session, hit.message))


def _line(hit: Hit) -> Content:
    before, word, after = hit.excerpt[: hit.start], hit.excerpt[hit.start : hit.end], hit.excerpt[hit.end :]
    title = Content.styled(one_line(hit.title, 60), "$text-muted")
    return title + Content("\n  " + before) + Content.styled(word, "bold $text-accent") + Content(after)
