"""Runs one answer at a time for the app: begins it, paints it where the reader is, stops it, and says how it went."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from textual.worker import Worker

from glmlocal_tui.answering import Answering
from glmlocal_tui.connection import LOADS, STARTING
from glmlocal_tui.conversation import Conversation, Message, new_id
from glmlocal_tui.widgets.answer_view import AnswerView
from glmlocal_tui.widgets.dashboard import Measured
from glmlocal_tui.widgets.prompt import Prompt
from glmlocal_tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from glmlocal_tui.app import ChatApp

QUIET_S = 0.3  # after a question: its first token is what is waited for
KEY_S, MOST_HOLD_S = 0.03, 0.1  # the time a key has for itself, and the most that keys hold the answer up


class AnswerRunner:
    """``answering`` is the answer that is being written, ``measured`` how fast the last finished one was."""

    def __init__(self, app: ChatApp) -> None:
        self._app = app
        self._worker: Worker[None] | None = None
        self.answering: Answering | None = None
        self.measured = Measured()

    def start(self, parent_id: str, *new: Message) -> None:
        """Ask for an answer to a message; it is drawn as it comes, after messages that are not drawn yet."""
        self._app.connection.be_quiet(QUIET_S)
        gc.disable()  # a collection takes up to 8 ms
        asyncio.get_running_loop().call_later(QUIET_S, gc.enable)
        run = self._run(self._app.conversation, parent_id, new)
        self._worker = self._app.run_worker(run, group="answer")

    async def stop(self) -> None:
        """Stop, keep what came, and wait until it is so."""
        if self._worker is None or self.answering is None:
            return
        self._worker.cancel()
        while self.answering is not None:
            await asyncio.sleep(0.01)

    async def _run(self, conversation: Conversation, parent_id: str, new: Sequence[Message]) -> None:
        app = self._app
        message = Message(new_id(), parent_id, "assistant", "", model=app.model_name, created_s=time.time())
        conversation.add(message)
        transcript = app.query_one(Transcript)
        showing = asyncio.create_task(app.show_new(*new, message))  # while the server reads the prompt

        async def paint(newer: Message) -> None:
            await asyncio.shield(showing)
            await self._keys_first()
            conversation.update(newer)
            app.keeper.changed(conversation, newer)
            view = transcript.view_of(newer.id)  # looked up: the reader may have had the transcript drawn anew
            if isinstance(view, AnswerView):
                await view.show(newer)
                if not newer.ending:  # an end is not waited for: the key that made it would be, and the app with it
                    await self._drawn()

        def waits(text: str) -> None:
            view = transcript.view_of(message.id)
            if isinstance(view, AnswerView):
                view.waiting(text)

        answering = Answering(app.client, conversation, message, app.model_name, app.sampling, paint, waits)
        self.answering = answering
        try:
            await self._until_ready(waits)
            answering.model = app.model_name
            finished = await answering.run()
        except asyncio.CancelledError:  # stopped before the request was sent
            finished = replace(answering.current(), ending="stopped")
            await paint(finished)
        finally:
            gc.enable()
            await asyncio.shield(showing)
        self._done(finished)
        await self._drawn()  # what is tidied up now is not to keep the end of the answer from the screen
        await transcript.let_go()
        await transcript.make_ready()
        await app.show_sessions()

    async def _keys_first(self) -> None:
        """A key is on the screen a frame later; the answer can wait for that, though not for a person who goes on."""
        prompt, end_s = self._app.query_one_optional(Prompt), time.monotonic() + MOST_HOLD_S
        while prompt and (left_s := min(prompt.last_key_s + KEY_S, end_s) - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    async def _drawn(self) -> None:
        """Until the screen shows it: laying out and writing cost more than the text, and the pace counts them too."""
        if self._app.is_running and self._app.screen_stack and self._app.screen.is_current:
            drawn = asyncio.Event()
            if self._app.call_after_refresh(drawn.set):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(drawn.wait(), 1.0)

    async def _until_ready(self, waits: Callable[[str], None]) -> None:
        """A message may be sent while the model loads: it waits for it."""
        while self._app.state.phase in (STARTING, LOADS):
            waits("waiting for the model · Esc takes the message back from the queue")
            await asyncio.sleep(0.1)

    def _done(self, finished: Message) -> None:
        if finished.ending == "error":
            self._app.connection.hurry()
        usage = finished.usage
        if usage is not None:
            self.measured = Measured(usage.decode_tokens_per_s or 0.0, usage.first_token_s, 0)
        self.answering = None
        self._app.update_status()
