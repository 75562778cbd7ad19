"""One answer from request to last token: events in, a growing message out, at a pace the screen can keep."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from glmlocal_tui import client, sse
from glmlocal_tui.client import Client, Sampling, ServerError
from glmlocal_tui.conversation import Conversation, Message, with_piece
from glmlocal_tui.inline_thinking import InlineThinking, Piece

_FRAME_S = 1 / 20
_DRAW_SHARE = 4  # drawing takes at most one part in this many of the time, however slow it gets
_RETRY_S, _MOST_RETRY_S = 1.0, 30.0


@dataclass(slots=True)
class Answering:
    """``paint(message)`` draws a newer state and is awaited; ``waits(text)`` says why nothing comes yet."""

    client: Client
    conversation: Conversation
    message: Message
    model: str
    sampling: Sampling
    paint: Callable[[Message], Awaitable[None]]
    waits: Callable[[str], None]
    tokens: int = 0  # pieces so far, about a token each
    first_token_s: float | None = None  # after the request
    _started_s: float = field(default_factory=time.monotonic)
    _first_s: float = 0.0
    _content: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _thoughts: InlineThinking = field(default_factory=InlineThinking)
    _dirty: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> Message:
        """The finished message: complete, stopped (when this is cancelled) or failed, with all that came."""
        painter = asyncio.create_task(self._paint_on())
        try:
            await self._read()
        except asyncio.CancelledError:
            self.message = replace(self.message, ending="stopped")
        except ServerError as error:
            self.message = replace(self.message, ending="error", error=str(error))
        finally:
            self._sort(self._thoughts.end())
            self._ended.set()  # not cancelled: half a paint would lose what it had taken
            self._dirty.set()
            await painter
        if not self.message.ending:
            self.message = replace(self.message, ending="stop")
        self.message = self.current()
        await self.paint(self.message)
        return self.message

    @property
    def tokens_per_s(self) -> float:
        """Since the first token."""
        elapsed = time.monotonic() - self._first_s
        return (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed > 0.2 else 0.0

    def current(self) -> Message:
        """The message with all that has come."""
        if self._content or self._reasoning:
            content, reasoning = "".join(self._content), "".join(self._reasoning)
            self._content, self._reasoning = [], []
            old = self.message
            self.message = replace(old, content=old.content + content, reasoning=old.reasoning + reasoning)
        return self.message

    async def _read(self) -> None:
        delay_s = _RETRY_S
        while True:
            try:
                parent = self.message.parent_id
                stream = self.client.chat(self.model, self.conversation.request(parent), self.sampling)
                async with contextlib.aclosing(stream) as events:  # type: ignore[type-var]
                    async for event in events:
                        self._take(event)
                return
            except ServerError as error:
                if error.kind not in (client.BUSY, client.LOADING) or self.tokens:
                    raise
                wait_s = min(error.retry_after_s or delay_s, _MOST_RETRY_S)
                self.waits(f"{error} · trying again in {wait_s:.0f} s · Esc gives up")
                await asyncio.sleep(wait_s)
                delay_s = min(2 * delay_s, _MOST_RETRY_S)

    def _take(self, event: sse.Event) -> None:
        match event:
            case sse.Delta(content, reasoning):
                self._count()
                if reasoning or self.client.ours:
                    self._thoughts.switch_off()
                self._sort(self._thoughts.feed(content), reasoning)
            case sse.ToolDelta(index, id_, name, arguments):
                self._count()
                self.message = replace(
                    self.current(), tool_calls=with_piece(self.message.tool_calls, index, id_, name, arguments)
                )
            case sse.Progress(done, total):
                if not self.tokens and total:
                    self.waits(f"reading the prompt: {done:,} of {total:,} tokens ({done / total:.0%})")
                return
            case sse.Finish(reason):
                self.message = replace(self.message, ending=reason)
                return  # the usage follows; the last state is painted at the end
            case sse.Usage():
                self.message = replace(self.message, usage=self._with_rates(event))
                return
            case sse.Failure():
                full = sse.Failure(event.message, event.code)
                text = client.context_full(event.message) if client.is_context(full) else event.message
                kind = client.CONTEXT if client.is_context(full) else client.ODD
                raise ServerError(kind, text)
        self._dirty.set()

    def _sort(self, piece: Piece, reasoning: str = "") -> None:
        """Keep a piece of the text, and thinking that came beside it, where they belong."""
        if piece.retracts:
            message = self.current()
            self.message = replace(message, content="", reasoning=message.reasoning + message.content)
        if reasoning or piece.reasoning:
            self._reasoning.append(reasoning + piece.reasoning)
        if piece.content:
            self._content.append(piece.content)

    def _with_rates(self, usage: sse.Usage) -> sse.Usage:
        """What a server does not say, as measured here."""
        return replace(
            usage,
            first_token_s=self.first_token_s if usage.first_token_s is None else usage.first_token_s,
            decode_tokens_per_s=usage.decode_tokens_per_s or self.tokens_per_s or None,
        )

    def _count(self) -> None:
        if not self.tokens:
            self._first_s = time.monotonic()
            self.first_token_s = self._first_s - self._started_s
        self.tokens += 1

    async def _paint_on(self) -> None:
        """Paint the first token at once, then at most once a frame, and seldom enough to leave time for keys."""
        while not self._ended.is_set():
            await self._dirty.wait()
            if self._ended.is_set():  # the last state is painted once, by run
                return
            self._dirty.clear()
            start_s = time.monotonic()
            await self.paint(self.current())
            pause_s = max(_FRAME_S, (_DRAW_SHARE - 1) * (time.monotonic() - start_s))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), pause_s)
