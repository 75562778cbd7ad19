"""What benchmarks share: workers that speak JSON lines, interleaved repeats, medians with spread.

Standard library only, so that a worker runs in any interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from types import TracebackType
from typing import Any, Self

SETTLE_S = 0.05  # threads of the engine that ran before spin for some milliseconds


class WorkerError(Exception):
    """A worker could not do what it was asked."""


class Worker:
    """A long-lived child process that answers calls one at a time: ``call("prefill", tokens=[…])``.

    A context manager; leaving it ends the process. ``name`` is for messages. Raises WorkerError.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def call(self, operation: str, **arguments: Any) -> Any:
        """Send one call and wait for its result."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"operation": operation, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self._name} ended with status {status} in {operation}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._name}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "no message"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def serve(make: Callable[..., Any]) -> None:
    """The worker's side: ``make(**arguments)`` answers the call "load", its result's methods all others."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    engine: Any = None
    for line in sys.stdin:
        call = json.loads(line)
        operation, arguments = call["operation"], call["arguments"]
        try:
            if operation == "load":
                engine, result = make(**arguments), None
            else:
                result = getattr(engine, operation)(**arguments)
            answer = {"result": result}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle of some measurements and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    def rounded(self) -> dict[str, float]:
        return {"median": _significant(self.median), "low": _significant(self.low), "high": _significant(self.high)}


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def interleave(measure: Mapping[str, Callable[[int], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each by turns, A B, B A, A B …, so that a machine that slows down slows all of them.

    Each function gets the number of the repeat. One more round, numbered -1, comes first and does not count.
    """
    results: dict[str, list[float]] = {name: [] for name in measure}
    for repeat in range(-1, repeats):
        names = list(measure)
        for name in names if repeat % 2 else reversed(names):
            time.sleep(SETTLE_S)
            value = measure[name](repeat)
            if repeat >= 0:
                results[name].append(value)
    return results


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, repeat by repeat."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
