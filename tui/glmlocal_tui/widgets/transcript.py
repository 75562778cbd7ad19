"""The messages on the screen. It follows the newest text until the reader scrolls away, and again from the end on."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Button

from glmlocal_tui.conversation import Conversation, Message
from glmlocal_tui.messages import EarlierRequested
from glmlocal_tui.widgets.answer_view import AnswerView
from glmlocal_tui.widgets.laid_out import Column, LaidOutOnce
from glmlocal_tui.widgets.message_view import MessageView, UserView

SHOWN = 12  # messages of a long conversation that are drawn at first, and more at a time on request
MOST = 24  # what the end of the conversation may grow to before the messages above are taken away again


class Earlier(Button):
    """Stands for the messages above that are not drawn yet."""

    DEFAULT_CSS = "Earlier { width: 1fr; min-width: 10; margin: 0 1 1 1; }"

    def __init__(self, count: int) -> None:
        super().__init__(f"show {count} earlier messages", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(EarlierRequested())


class Transcript(LaidOutOnce, VerticalScroll, can_focus=False):
    # The box inside is never shorter than the screen: Textual's anchor would scroll a short one below its start.
    DEFAULT_CSS = """
    Transcript { height: 1fr; scrollbar-gutter: stable; }
    Transcript > Column { height: auto; min-height: 100%; padding: 1 0 0 0; }
    """

    keep_thinking_open = False

    def __init__(self) -> None:
        super().__init__()
        self._box = Column()

    def compose(self) -> ComposeResult:
        yield self._box

    def on_mount(self) -> None:
        self.anchor()

    @property
    def follows(self) -> bool:
        return self._anchored and not self._anchor_released

    async def show(self, conversation: Conversation, first: int | None = None) -> None:
        """Draw the shown branch anew, from the ``first``-th message on (None: the last ones)."""
        path = conversation.path()
        first = max(len(path) - SHOWN, 0) if first is None else max(first, 0)
        views = [self._view(conversation, message) for message in path[first:]]
        with self.app.batch_update():
            await self._box.remove_children()
            await self._box.mount_all([*([Earlier(first)] if first else []), *views])

    async def add(self, conversation: Conversation, messages: Sequence[Message]) -> None:
        """Draw messages at the end, and follow them. Those far above go: what is laid out is laid out at each line."""
        if self.drawn() + len(messages) > MOST:
            await self.show(conversation)  # the messages are among the last ones
        else:
            await self._box.mount_all([self._view(conversation, message) for message in messages])
        self.follow()

    def follow(self) -> None:
        self.anchor()
        self._anchor_released = False

    def view_of(self, message_id: str) -> MessageView | None:
        return next((view for view in reversed(self._views()) if view.message.id == message_id), None)

    def drawn(self) -> int:
        return len(self._views())

    def _views(self) -> list[MessageView]:
        return [view for view in self._box.children if isinstance(view, MessageView)]

    def _view(self, conversation: Conversation, message: Message) -> MessageView:
        siblings = conversation.siblings(message.id)
        position, count = siblings.index(message.id) + 1, len(siblings)
        if message.role == "user":
            return UserView(message, position, count)
        return AnswerView(message, position, count, keep_thinking_open=self.keep_thinking_open)
