"""Progress of something measured in bytes, on stderr, for people only: nothing is drawn where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnBytes = Callable[[int], None]  # is told the bytes done so far; may go back, when an attempt starts again


@contextmanager
def byte_bar(label: str, total_bytes: int, *, show: bool) -> Iterator[OnBytes]:
    """Yield what moves the bar."""
    if not (show and sys.stderr.isatty()):
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total_bytes)
        yield lambda num_bytes: progress.update(task, completed=num_bytes)


def say(line: str, *, show: bool, only_unwatched: bool = False) -> None:
    """One line on stderr; ``only_unwatched`` leaves it to the bar where there is one."""
    if show and not (only_unwatched and sys.stderr.isatty()):
        print(line, file=sys.stderr, flush=True)
