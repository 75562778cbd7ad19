"""The app without a terminal: keys in, rendered cells out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from textual.pilot import Pilot

from glmlocal_tui.app import ChatApp
from glmlocal_tui.options import Options


class Driver:
    """One running app. Assertions read ``lines``: what the cells of the screen show."""

    def __init__(self, app: ChatApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot

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
        end = time.monotonic() + timeout_s
        while not (condition in self.text if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"never saw {condition!r} in:\n{self.text}"
            await asyncio.sleep(0.04)

    async def gone(self, text: str) -> None:
        await self.wait(lambda: text not in self.text)

    async def type(self, text: str) -> None:
        """Type like a keyboard; a newline is Ctrl+J."""
        names = {"\n": "ctrl+j", " ": "space"}
        from textual.keys import _character_to_key

        await self.pilot.press(*(names.get(char) or _character_to_key(char) for char in text))

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
