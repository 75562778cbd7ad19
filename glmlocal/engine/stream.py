"""OutputStream: one request's outputs, from the engine's thread to whoever awaits them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from glmlocal.engine.request import RequestOutput
from glmlocal.errors import GlmlocalError


class OutputStream:
    """An AsyncIterator that ends after the output with a finish reason, or raises the error that ended the request.

    Belongs to the event loop it was made in; ``push`` is called there. Closing or dropping it aborts the request.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop, abort: Callable[[str], None]) -> None:
        self.request_id, self.loop = request_id, loop
        self._abort = abort
        self._items: deque[RequestOutput | GlmlocalError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_last = False  # nothing more will be pushed
        self._is_over = False  # the reader has seen the end

    def push(self, item: RequestOutput | GlmlocalError) -> None:
        """Add what the reader sees next."""
        if self._is_last:
            return
        self._is_last = isinstance(item, GlmlocalError) or item.finish_reason is not None
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._items:
            if self._is_over or self._is_last:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if isinstance(item, GlmlocalError):
            self._is_over = True
            raise item
        if item.finish_reason is not None:
            self._is_over = True
        return item

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        self._is_over = True
        self._items.clear()
        if not self._is_last:
            self._is_last = True
            self._abort(self.request_id)

    def __del__(self) -> None:
        if not self._is_last:
            self._abort(self.request_id)
