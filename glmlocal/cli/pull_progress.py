"""How far a download is: bars for a person, a line per finished file for a log, JSON lines for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from glmlocal.hub.download import OnProgress, Progress
from glmlocal.units import format_bytes

_JSON_EVERY_S = 0.5
_RATE_OVER_S = 10.0


def emit(event: str, **values: Any) -> None:
    """One JSON line on stdout."""
    print(json.dumps({"event": event, **values}), flush=True)


@contextmanager
def shown(*, as_json: bool) -> Iterator[OnProgress]:
    """Yield what is told of progress, in the way that suits who is watching."""
    if as_json:
        yield _json_lines()
    elif sys.stderr.isatty():
        with _bars() as on_progress:
            yield on_progress
    else:
        yield _log_lines()


class Rate:
    """Bytes per second over the last seconds; what was there from the start does not count."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def update(self, done_bytes: int, now_s: float) -> float:
        if self._points and done_bytes < self._points[-1][1]:  # a file is fetched again
            self._points.clear()
        self._points.append((now_s, done_bytes))
        while len(self._points) > 2 and now_s - self._points[1][0] >= _RATE_OVER_S:
            self._points.pop(0)
        (start_s, start_bytes), (end_s, end_bytes) = self._points[0], self._points[-1]
        return (end_bytes - start_bytes) / (end_s - start_s) if end_s > start_s else 0.0


def totals(files: Sequence[Progress]) -> tuple[int, int]:
    return sum(file.done_bytes for file in files), sum(file.size_bytes for file in files)


def _json_lines() -> OnProgress:
    rate, finished, last_s = Rate(), set[str](), -1e9

    def on_progress(files: Sequence[Progress]) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        done, total = totals(files)
        bytes_per_s = rate.update(done, now_s)
        for file in files:
            if file.is_complete and file.path not in finished:
                finished.add(file.path)
                emit("file", path=file.path, size_bytes=file.size_bytes)
        if now_s - last_s >= _JSON_EVERY_S or done == total:
            last_s = now_s
            emit(
                "progress",
                done_bytes=done,
                total_bytes=total,
                bytes_per_s=round(bytes_per_s),
                eta_s=round((total - done) / bytes_per_s, 1) if bytes_per_s > 0 else None,
                files=[
                    {"path": file.path, "done_bytes": file.done_bytes, "size_bytes": file.size_bytes}
                    for file in files
                    if file.done_bytes > 0 and not file.is_complete
                ],
            )

    return on_progress


def _log_lines() -> OnProgress:
    finished = set[str]()

    def on_progress(files: Sequence[Progress]) -> None:
        for file in files:
            if file.is_complete and file.path not in finished:
                finished.add(file.path)
                print(f"fetched {file.path} ({format_bytes(file.size_bytes)})", file=sys.stderr, flush=True)

    return on_progress


@contextmanager
def _bars() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        total_bar: TaskID | None = None
        of_file: dict[str, TaskID] = {}

        def on_progress(files: Sequence[Progress]) -> None:
            nonlocal total_bar
            for file in files:
                if file.is_complete and file.path in of_file:
                    bars.remove_task(of_file.pop(file.path))
                elif file.done_bytes > 0 and not file.is_complete:
                    if file.path not in of_file:
                        of_file[file.path] = bars.add_task(file.path, total=file.size_bytes, completed=file.done_bytes)
                    bars.update(of_file[file.path], completed=file.done_bytes)
            done, total = totals(files)
            if total_bar is None:
                total_bar = bars.add_task("total", total=total, completed=done)
            complete = sum(file.is_complete for file in files)
            bars.update(total_bar, completed=done, description=f"total, {complete} of {len(files)} files")

        yield on_progress
