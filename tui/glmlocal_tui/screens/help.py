"""All keys and commands on one screen."""

from __future__ import annotations

import textwrap
from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from glmlocal_tui.commands import COMMANDS, Command
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

_LABEL = 25  # cells of the left column


class Keys(Static):
    """Both lists, as wide as there is room."""

    DEFAULT_CSS = "Keys { width: 1fr; height: auto; padding: 0 1 0 0; }"

    def __init__(self) -> None:
        super().__init__(markup=False)

    def on_resize(self) -> None:
        self.update(text(self.content_region.width))


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
            yield Keys()

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


def text(width: int) -> Content:
    """Two columns; on a narrow screen what a key does stands below it."""
    label = _LABEL if width >= 2 * _LABEL else 2
    lines: list[Content] = []
    for name, what in (*KEYS, ("", ""), *((f"/{item.name} {item.takes}", _help(item)) for item in COMMANDS)):
        first, *more = textwrap.wrap(what, max(width - label, 10)) or [""]
        bold = Content.styled(fit(name, max(label, cell_len(name))), "bold $primary")
        lines += [bold + Content(first)] if label == _LABEL else [bold, Content("  " + first)]
        lines += [Content(" " * label + line) for line in more]
    return Content("\n").join(lines)


def _help(command: Command) -> str:
    return f"{command.help} ({command.keys})" if command.keys else command.help
