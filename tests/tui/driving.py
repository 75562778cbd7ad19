"""The app without a terminal: keys in, rendered cells out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from textual import events
from textual.keys import _character_to_key
from textual.pilot import Pilot

from glmlocal_tui.app import ChatApp
from glmlocal_tui.options import Options


class Driver:
    """One running app. Assertions read ``lines``: what the cells of the screen show."""

    def __init__(self, app: ChatApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot
        self._drawings = 0  # of the screen, so far
        app.post_display_hook = self._count  # type: ignore[method-assign]

    @property
    def lines(self) -> list[str]:
        """The screen, line by line; every line fills the width exactly, wide characters counted as two cells."""
        screen = self.app.screen
        found = []
        for strip in screen._compositor.render_strips():
            text = "".join(segment.text for segment in strip if not segment.control)
            assert cell_len(text) == screen.size.width, repr(text)
            found.append(text)
        return found

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)

    @property
    def flat(self) -> str:
        """The screen with every run of blanks and line ends as one blank, for texts that may be wrapped."""
        return " ".join(self.text.split())

    def style_at(self, word: str) -> Any:
        """The rich style of the cell where a text begins."""
        for strip in self.app.screen._compositor.render_strips():
            line = "".join(segment.text for segment in strip)
            if word in line:
                at, start = line.index(word), 0
                for segment in strip:
                    if start <= at < start + len(segment.text):
                        return segment.style
                    start += len(segment.text)
        raise AssertionError(f"no {word!r} in:\n{self.text}")

    async def wait(self, condition: str | Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Until a text is on the screen, or a condition holds."""
        if isinstance(condition, str):
            await self._look_for(condition, True, timeout_s)
            return
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never came:\n{self.text}"
            await asyncio.sleep(0.01)

    async def gone(self, text: str) -> None:
        await self._look_for(text, False, 60.0)

    async def _look_for(self, text: str, wanted: bool, timeout_s: float) -> None:
        """Look at the screen when it was drawn again, and not more often: reading it costs as much as drawing it."""
        end = time.monotonic() + timeout_s
        while (text in self.text) != wanted:
            assert time.monotonic() < end, f"{'never saw' if wanted else 'always saw'} {text!r} in:\n{self.text}"
            looked, look_s = self._drawings, time.monotonic()
            while self._drawings == looked and time.monotonic() < look_s + 0.5:
                await asyncio.sleep(0.01)

    def _count(self) -> None:
        self._drawings += 1

    async def type(self, text: str) -> None:
        """Type like a keyboard, quickly; a newline is Ctrl+J."""
        driver = self.app._driver
        assert driver is not None
        for char in text:
            key = events.Key("ctrl+j", None) if char == "\n" else events.Key(_character_to_key(char), char)
            key.set_sender(self.app)
            driver.send_message(key)
        await self.pilot.pause()

    async def say(self, text: str) -> None:
        await self.type(text)
        await self.pilot.press("enter")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path,
    url: str = "",
    *,
    size: tuple[int, int] = (80, 24),
    **options: Any,
) -> AsyncIterator[Driver]:
    """The app on a screen of its own size, with its files under ``tmp_path``."""
    app = ChatApp(
        Options(
            options.pop("target", "GLM-4.5-Air"),
            url=url,
            data_dir=tmp_path / "data",
            settings_path=tmp_path / "config" / "chat.json",
            root=options.pop("root", tmp_path),
            **options,
        )
    )
    try:
        async with app.run_test(size=size, notifications=True) as pilot:
            yield Driver(app, pilot)
    finally:
        await app.aclose()
        await asyncio.sleep(0)
