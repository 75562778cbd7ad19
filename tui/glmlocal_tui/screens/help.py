"""All keys and commands on one screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from glmlocal_tui.commands import COMMANDS
from glmlocal_tui.widgets.bars import fit

KEYS = (
    ("Enter", "send"),
    ("Ctrl+J, Shift+Enter", "new line (also \\ Enter)"),
    ("Up, Down", "earlier prompts, at the first and last line"),
    ("@path", "attach a text file; Tab completes"),
    ("Esc", "stop the answer, keep it; back to the prompt"),
    ("PageUp, PageDown", "scroll; Ctrl+End follows the newest text"),
    ("Tab, Shift+Tab", "from the prompt to messages and back"),
    ("on a message", "c copy, y copy code, e edit, r again, ← → branches"),
    ("F1 F2 F3 F4 F5", "help, chats, search, dashboard, settings"),
    ("F6, F7, Ctrl+R", "edit last message, copy answer, answer again"),
    ("Ctrl+N, Ctrl+P, Ctrl+Q", "new chat, command palette, leave"),
)


class HelpScreen(ModalScreen[None]):
    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > VerticalScroll { width: 76; max-width: 100%; height: 90%; padding: 0 1; }
    HelpScreen > VerticalScroll { border: round $primary; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = "keys and commands"
            box.border_subtitle = "Esc closes"
            yield Static(text(), markup=False)

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


def text() -> Content:
    lines = [Content.styled(fit(keys, 24), "bold $primary") + Content(what) for keys, what in KEYS]
    lines.append(Content(""))
    for command in COMMANDS:
        name = fit(f"/{command.name} {command.takes}", 24)
        keys = f" ({command.keys})" if command.keys else ""
        lines.append(Content.styled(name, "bold $primary") + Content(command.help + keys))
    return Content("\n").join(lines)
