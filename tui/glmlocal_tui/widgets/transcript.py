"""The messages on the screen. It follows the newest text until the reader scrolls away, and again from the end on."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Button

from glmlocal_tui.conversation import Conversation, Message
from glmlocal_tui.messages import EarlierRequested
from glmlocal_tui.widgets.answer_view import AnswerView
from glmlocal_tui.widgets.bars import counted
from glmlocal_tui.widgets.laid_out import Column, LaidOutOnce
from glmlocal_tui.widgets.message_view import MessageView, UserView

SHOWN = 8  # messages of a long conversation that are drawn: what is drawn is laid out again at each new line


class Earlier(Button):
    """Stands for the messages above that are not drawn yet."""

    DEFAULT_CSS = "Earlier { width: 1fr; min-width: 10; margin: 0 1 1 1; }"

    def __init__(self, count: int) -> None:
        super().__init__(f"show {counted(count, 'earlier message')}", compact=True)
        self.count = count

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(EarlierRequested())


class Transcript(LaidOutOnce, VerticalScroll, can_focus=False):
    # The bar has its place always (one that comes and goes is two more layouts), and is not seen without need.
    # The box inside is never shorter than the screen: Textual's anchor would scroll a short one below its start.
    DEFAULT_CSS = """
    Transcript { height: 1fr; overflow-y: scroll; scrollbar-size-vertical: 1; scrollbar-background: $background; }
    Transcript > Column { height: auto; min-height: 100%; padding: 1 0 0 0; }
    """

    keep_thinking_open = False

    def __init__(self) -> None:
        super().__init__()
        self._box = Column()
        self._ready: tuple[UserView, AnswerView] | None = None  # the next question and its answer, out of sight

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
            self._ready = None
            await self._box.remove_children()
            await self._box.mount_all([*([Earlier(first)] if first else []), *views])

    async def make_ready(self) -> None:
        """Make the widgets of the next question and its answer: that takes longer than filling them."""
        if self._ready is None and self._box.is_attached:
            nothing = Message("", None, "", "")
            self._ready = UserView(nothing), AnswerView(nothing)
            for view in self._ready:
                view.display = False
            await self._box.mount_all(self._ready)

    async def add(self, conversation: Conversation, messages: Sequence[Message]) -> None:
        """Draw messages at the end, and follow them."""
        ready, self._ready = self._ready, None
        if ready is not None and [message.role for message in messages] == ["user", "assistant"]:
            question, answer = ready
            question.show_message(messages[0])
            answer.begin(messages[1], keep_thinking_open=self.keep_thinking_open)
            question.display = answer.display = True
        else:
            if ready is not None:
                await self._box.remove_children(ready)
            await self._box.mount_all([self._view(conversation, message) for message in messages])
        self.follow()

    async def let_go(self) -> None:
        """Take the messages far above away, unless the reader is there."""
        views = self._views()
        if not self.follows or len(views) <= SHOWN:
            return
        above = sum(button.count for button in self._box.query_children(Earlier)) + len(views) - SHOWN
        with self.app.batch_update():
            await self._box.remove_children([*self._box.query_children(Earlier), *views[:-SHOWN]])
            await self._box.mount(Earlier(above), before=0)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if new_value <= 0 < old_value and not self.follows:
            self.reach_up()

    def on_mouse_scroll_up(self) -> None:
        if self.scroll_y <= 0:  # what is drawn may be less than the screen
            self.reach_up()

    def reach_up(self) -> None:
        """The reader is at the top and goes on: more comes."""
        if self._box.query_children(Earlier):
            self.post_message(EarlierRequested())

    def follow(self) -> None:
        self.anchor()
        self._anchor_released = False

    def view_of(self, message_id: str) -> MessageView | None:
        return next((view for view in reversed(self._views()) if view.message.id == message_id), None)

    def drawn(self) -> int:
        return len(self._views())

    def _views(self) -> list[MessageView]:
        ready = self._ready or ()
        return [view for view in self._box.children if isinstance(view, MessageView) and view not in ready]

    def _view(self, conversation: Conversation, message: Message) -> MessageView:
        siblings = conversation.siblings(message.id)
        position, count = siblings.index(message.id) + 1, len(siblings)
        if message.role == "user":
            return UserView(message, position, count)
        view = AnswerView(message, position, count, keep_thinking_open=self.keep_thinking_open)
        if not message.ending:
            view.waiting("…")
        return view
