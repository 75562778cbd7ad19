"""One answer: thinking, text, tool calls, and a line about how it went."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content

from glmlocal_tui.conversation import Message
from glmlocal_tui.messages import CopyRequested, RegenerateRequested
from glmlocal_tui.widgets.laid_out import Words
from glmlocal_tui.widgets.markdown_text import MarkdownText
from glmlocal_tui.widgets.message_view import MessageView
from glmlocal_tui.widgets.thinking import Thinking
from glmlocal_tui.widgets.tool_card import ToolCard


class Note(Words):
    """The line under an answer. It is there, empty, while the answer is written: its end moves nothing."""

    DEFAULT_CSS = """
    Note { width: 1fr; height: auto; min-height: 1; color: $text-muted; }
    Note.-error { color: $text-error; }
    """

    def __init__(self, message: Message) -> None:
        super().__init__(Content(ending(message)), markup=False)
        self._look(message)

    def tell(self, message: Message) -> None:
        text = ending(message)
        self._look(message)
        fits = self.size.height == 1 and cell_len(text) <= self.size.width and "\n" not in text
        self.update(Content(text), layout=not fits)

    def _look(self, message: Message) -> None:
        self.set_class(bool(message.error), "-error")
        self.display = not message.ending or bool(ending(message))


class AnswerView(MessageView):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "regenerate", "Answer again"),
        Binding("y", "copy_code", "Copy code block"),
    ]

    def __init__(
        self, message: Message, position: int = 1, count: int = 1, *, keep_thinking_open: bool = False
    ) -> None:
        super().__init__(message, position, count)
        self._keep_open = keep_thinking_open
        self._thinking = Thinking(message.reasoning)
        self._thinks = False  # the thinking is still going on
        self._since_s: float | None = None  # when the first of the answer was there
        self._text = MarkdownText(message.content)
        self._cards: list[ToolCard] = []
        self._note = Note(message)

    def compose(self) -> ComposeResult:
        yield from self.branches()
        yield self._thinking
        yield self._text
        self._cards = [ToolCard(call) for call in self.message.tool_calls]
        yield from self._cards
        yield self._note

    def begin(self, message: Message, *, keep_thinking_open: bool) -> None:
        """An empty answer in the place of the one it was made with. Its first line is kept free from now on, so that
        the first token is drawn where nothing else moves."""
        self.message, self._keep_open = message, keep_thinking_open
        self.waiting("…")

    async def show(self, message: Message) -> None:
        """The same message with more of everything: only what is new is drawn."""
        old, self.message = self.message, message
        if not message.content.startswith(old.content):  # it was thinking, as its end has shown
            self._text.clear()
            old = replace(old, content="")
        self._since_s = self._since_s or time.monotonic()
        more = message.reasoning[len(old.reasoning) :]
        if more:
            self._think(more)
        text = message.content[len(old.content) :]
        if text:
            self._stop_thinking()
            self._text.append(text)
        for number, call in enumerate(message.tool_calls):
            self._stop_thinking()
            self._text.hold("")
            if number < len(self._cards):
                if call != old.tool_calls[number]:
                    self._cards[number].show(call)
            else:
                self._cards.append(ToolCard(call))
                await self.mount(self._cards[-1], before=self._note)
        if message.ending:
            self._stop_thinking()
            self._text.finish()
        self._note.tell(message)

    def waiting(self, text: str) -> None:
        """What happens before the first token: prompt progress, or a queue."""
        self._text.hold(text)

    def action_regenerate(self) -> None:
        self.post_message(RegenerateRequested(self.message.id))

    def action_copy(self) -> None:
        self.post_message(CopyRequested(self.message.content, "answer"))

    def action_copy_code(self) -> None:
        blocks = self._text.code_blocks()
        if blocks:
            self.post_message(CopyRequested(blocks[-1], "code block"))
        else:
            self.app.notify("this answer has no code block", markup=False)

    def _think(self, text: str) -> None:
        if not self._thinking.display:
            self._text.hold("")
            self._thinking.begin(self._since_s or time.monotonic())
            self._thinks = True
        self._thinking.append(text)

    def _stop_thinking(self) -> None:
        if self._thinks:
            self._thinks = False
            self._thinking.finish(fold=not self._keep_open)


def ending(message: Message) -> str:
    """How an answer ended and what it cost, in one line; empty while it is being written."""
    if not message.ending:
        return ""
    parts = []
    if message.ending == "stopped":
        parts.append("stopped")
    elif message.ending == "length":
        parts.append("cut: no room for more tokens")
    elif message.ending == "content_filter":
        parts.append("cut by the server's filter")
    usage = message.usage
    if usage is not None:
        cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
        parts.append(f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens{cached}")
        if usage.decode_tokens_per_s:
            parts.append(f"{usage.decode_tokens_per_s:.1f} tok/s")
        if usage.first_token_s is not None:
            parts.append(f"first token {usage.first_token_s:.2f} s")
    if message.error:
        parts.insert(0, message.error)
    return " · ".join(parts)
