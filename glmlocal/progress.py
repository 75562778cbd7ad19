"""The progress bar of long work, on stderr, and nothing where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading_bar(total_bytes: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called, from any thread, with the number of bytes just read."""
    if not enabled:
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as p:
        task = p.add_task("loading", total=total_bytes)
        yield lambda num_bytes: p.advance(task, num_bytes)
