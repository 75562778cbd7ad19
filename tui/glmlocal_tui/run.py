"""From options to an exit code."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from pathlib import Path

from glmlocal_tui.options import Options

DRAWINGS_PER_S = 250  # at most: a change waits up to two ticks of Textual's clock, 33 ms at its own 60


def read_key(path: Path) -> str:
    """The first line of a key file. Raises ValueError with a sentence."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the key file {path} cannot be read: {error}") from None
    key = lines[0].strip() if lines else ""
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"the key file {path} has no key in its first line")
    return key


def run(options: Options) -> int:
    """Open the app and stay in it; a server of our own ends with it."""
    os.environ.setdefault("TEXTUAL_FPS", str(DRAWINGS_PER_S))  # read when Textual is imported
    from glmlocal_tui.app import ChatApp

    gc.freeze()  # code and styles stay for good: a full collection among them would hold a key up for 0.1 s
    gc.set_threshold(5_000, 5, 100)  # 20,000 were 4 to 12 ms at a time
    sys.setswitchinterval(0.001)  # a thread that saves or imports must not hold the screen up for Python's 5 ms

    async def live() -> int:
        app = ChatApp(options)

        def hang_up() -> None:
            """The terminal is gone: what is written to it would be waited for for ever."""
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            app.exit(128 + signal.SIGHUP)

        # Leave by unwinding, so that the terminal gets its settings back.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, app.exit, 128 + signal.SIGTERM)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
        try:
            code = await app.run_async()
        finally:
            await app.aclose()
        return (app.return_code or 0) if code is None else code

    return asyncio.run(live())
