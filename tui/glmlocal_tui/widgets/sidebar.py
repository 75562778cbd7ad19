"""The conversations, newest first; Enter opens one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from glmlocal_tui.cleaning import one_line
from glmlocal_tui.messages import SessionChosen
from glmlocal_tui.store import Summary
from glmlocal_tui.widgets.bars import fit


class Sidebar(Vertical):
    DEFAULT_CSS = """
    Sidebar { width: 30; display: none; border-right: solid $primary; background: $surface; }
    Sidebar.-shown { display: block; }
    Sidebar > Static { height: 1; padding: 0 1; color: $text-muted; }
    Sidebar > OptionList, Sidebar > OptionList:focus { height: 1fr; border: none; background: $surface; padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete,d", "app.command('delete_chosen')", "Delete"),
        Binding("r", "app.command('rename_chosen')", "Rename"),
        Binding("u", "app.command('undo')", "Undo delete"),
    ]

    def compose(self) -> ComposeResult:
        yield Static("d delete  r rename  u undo", markup=False)
        yield OptionList(markup=False)

    @property
    def list(self) -> OptionList:
        return self.query_one(OptionList)

    def show(self, sessions: Sequence[Summary], current: str) -> None:
        """Fill the list; the conversation that is open is marked and under the cursor."""
        options = self.list
        options.clear_options()
        now = time.time()
        for summary in sessions:
            age = ago(now - summary.updated_s)
            mark = "●" if summary.id == current else " "
            title = fit(one_line(summary.title) or "(empty)", max(27 - len(age) - 3, 1))
            options.add_option(Option(Content(f"{mark} {title} ") + Content.styled(age, "$text-muted"), id=summary.id))
        ids = [summary.id for summary in sessions]
        if ids:
            options.highlighted = ids.index(current) if current in ids else 0

    def chosen(self) -> str | None:
        """The id of the conversation under the cursor."""
        options = self.list
        return None if options.highlighted is None else options.get_option_at_index(options.highlighted).id

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option.id:
            self.post_message(SessionChosen(event.option.id))


def ago(seconds: float) -> str:
    """``5m``, ``3h``, ``12d``: at most four characters for a few years."""
    if seconds < 60:
        return "now"
    for unit, length in (("m", 60), ("h", 3600), ("d", 86400)):
        if seconds < {"m": 3600, "h": 86400, "d": 1e18}[unit]:
            return f"{int(seconds // length)}{unit}"
    return ""
