"""Keeps the conversation on disk: saves what has changed, a little later and in a thread, until it is really there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from glmlocal_tui.conversation import Conversation, Message
from glmlocal_tui.store import CORRUPT, Store, StoreError

T = TypeVar("T")
_SAVE_EVERY_S, _RETRY_EVERY_S = 1.0, 5.0
_SAVE_AFTER_S = 0.3  # not in the moment in which the answer is waited for


class Keeper:
    """``told`` gets a sentence about what is wrong with the store, or an empty one when it is well again."""

    def __init__(self, store: Store, told: Callable[[str], None]) -> None:
        self.store = store
        self._told = told
        self._changed: dict[str, tuple[Conversation, dict[str, Message]]] = {}  # by conversation
        self._typed: list[str] = []  # for the prompt's history
        self._wake = asyncio.Event()
        self._saving = asyncio.Lock()

    @property
    def unsaved(self) -> int:
        """How many conversations have something that is not on disk."""
        return len(self._changed)

    async def open(self) -> list[str]:
        """Open the store; returns what was typed before. Trouble is told, and the app goes on."""
        await self.ask(self.store.open, None)
        if self.store.set_aside is not None:
            self._told(
                f"the saved conversations could not be read: kept as {self.store.set_aside}; a new file is begun"
            )
        return await self.ask(self.store.prompts, [])

    def changed(self, conversation: Conversation, *messages: Message) -> None:
        """Save the head of a conversation and these messages soon. An empty conversation is not worth a row."""
        if not conversation.messages:
            return
        _, known = self._changed.setdefault(conversation.id, (conversation, {}))
        known.update({message.id: message for message in messages})
        self._wake.set()

    def remember(self, typed: str) -> None:
        """Save a line of the prompt's history soon."""
        self._typed.append(typed)
        self._wake.set()

    async def run(self) -> None:
        """Save until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_SAVE_AFTER_S)
            self._wake.clear()
            if not await self.flush():
                await asyncio.sleep(_RETRY_EVERY_S)
                self._wake.set()
            await asyncio.sleep(_SAVE_EVERY_S)

    async def flush(self) -> bool:
        """Save now; False, and told why, if it did not work."""
        async with self._saving:
            for id_, (conversation, messages) in list(self._changed.items()):
                self._changed.pop(id_)
                try:
                    await self._save(conversation, list(messages.values()))
                except StoreError as error:
                    _, newer = self._changed.get(id_, (conversation, {}))
                    self._changed[id_] = (conversation, messages | newer)
                    self._told(f"not saved: {error} · /export FILE.md keeps a copy elsewhere; saving is tried again")
                    return False
                self._told(self._aside())
            while self._typed:
                typed = self._typed.pop(0)
                await self.ask(lambda: self.store.remember_prompt(typed), None)  # noqa: B023 - awaited here
        return True

    async def ask(self, action: Callable[[], T], otherwise: T) -> T:
        """What the store says, or ``otherwise`` where it cannot."""
        try:
            return await asyncio.to_thread(action)
        except StoreError as error:
            self._told(str(error))
            return otherwise

    async def _save(self, conversation: Conversation, messages: list[Message]) -> None:
        try:
            await asyncio.to_thread(self.store.save, conversation, messages)
        except StoreError as error:
            if error.kind != CORRUPT:
                raise
            await asyncio.to_thread(self.store.move_aside)
            # the new file has nothing yet: the whole conversation goes there
            await asyncio.to_thread(self.store.save, conversation, list(conversation.messages.values()))

    def _aside(self) -> str:
        aside = self.store.set_aside
        return f"the saved conversations could not be read: kept as {aside}; a new file is begun" if aside else ""
