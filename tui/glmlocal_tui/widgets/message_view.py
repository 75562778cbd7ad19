"""One message of the conversation: what both kinds have in common, and the user's."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.geometry import Region
from textual.strip import Strip
from textual.widgets import Static

from glmlocal_tui.cleaning import one_line
from glmlocal_tui.conversation import Attachment, Message
from glmlocal_tui.messages import BranchStep, CopyRequested, EditRequested, TypedOutside
from glmlocal_tui.stats import size
from glmlocal_tui.widgets.bars import counted
from glmlocal_tui.widgets.laid_out import Column, Words


class Branches(Static):
    """``‹ 2/3 ›``, where a message has alternatives."""

    DEFAULT_CSS = "Branches { height: 1; width: auto; color: $text-muted; }"

    def __init__(self, message_id: str, position: int, count: int) -> None:
        super().__init__()
        self._message_id = message_id
        self.update(f"[@click=older]‹[/] {position}/{count} [@click=newer]›[/]")

    def action_older(self) -> None:
        self.post_message(BranchStep(self._message_id, -1))

    def action_newer(self) -> None:
        self.post_message(BranchStep(self._message_id, 1))


class MessageView(Column, can_focus=True):
    FOCUS_ON_CLICK = False  # else the letters that follow a click would be commands
    DEFAULT_CSS = """
    MessageView { height: auto; padding: 0 1; margin: 0 0 1 0; border-left: outer transparent; }
    MessageView:focus { border-left: outer $accent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "copy", "Copy message"),
        Binding("left", "branch(-1)", "Previous branch", show=False),
        Binding("right", "branch(1)", "Next branch", show=False),
        Binding("up", "app.focus_previous", "Previous message", show=False),
        Binding("down", "app.focus_next", "Next message", show=False),
    ]

    def __init__(self, message: Message, position: int = 1, count: int = 1) -> None:
        super().__init__()
        self.message = message
        self._position, self._count = position, count

    def render_lines(self, crop: Region) -> list[Strip]:
        """What is left of the box around its children is the same in every line: one is drawn, however high it is."""
        return super().render_lines(Region(crop.x, 0, crop.width, 1)) * crop.height

    def on_key(self, event: events.Key) -> None:
        """A letter that is no command here begins a prompt."""
        if event.character and event.is_printable and event.key not in self._bindings.key_to_bindings:
            event.stop()
            event.prevent_default()
            self.post_message(TypedOutside(event.character))

    def branches(self) -> list[Branches]:
        """What stands above a message that has alternatives; each widget less is one less to lay out."""
        return [Branches(self.message.id, self._position, self._count)] if self._count > 1 else []

    def action_copy(self) -> None:
        self.post_message(CopyRequested(self.message.for_model(), "message"))

    def action_branch(self, step: int) -> None:
        self.post_message(BranchStep(self.message.id, step))


class UserView(MessageView):
    """What the user said. Its text is shown as typed: no Markdown, no markup."""

    DEFAULT_CSS = """
    UserView { background: $boost; border-left: outer $primary; padding: 0 1; }
    UserView .text { width: 1fr; height: auto; }
    UserView .chips { width: 1fr; height: auto; color: $text-accent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("e", "edit", "Edit and resend")]

    def __init__(self, message: Message, position: int = 1, count: int = 1) -> None:
        super().__init__(message, position, count)
        self._text = Words(classes="text", markup=False)
        self._chips = Words(classes="chips", markup=False)
        self.show_message(message)

    def compose(self) -> ComposeResult:
        yield from self.branches()
        yield self._text
        yield self._chips

    def show_message(self, message: Message) -> None:
        """Another message in the place of the one it was made with."""
        self.message = message
        self._text.update(Content(message.content))
        self._chips.update(Content(" ".join(chip(item) for item in message.attachments)))
        self._chips.display = bool(message.attachments)

    def action_edit(self) -> None:
        self.post_message(EditRequested(self.message.id))


def chip(item: Attachment) -> str:
    what = one_line(item.name, 40) if item.kind == "file" else f"{counted(item.text.count(chr(10)) + 1, 'line')} pasted"
    return f"▐ {what} · {size(len(item.text.encode('utf-8', 'replace')))} ▌"
