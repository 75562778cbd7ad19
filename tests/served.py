"""``glmlocal serve`` as a process, on the scripted engine or a real model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

TESTS = Path(__file__).parent
SCRIPTED = (str(TESTS / "scripted.py"),)
REAL = ("-m", "glmlocal")


@dataclass
class Process:
    url: str
    process: subprocess.Popen[str]
    http: httpx.Client
    log: Path

    def wait_until_ready(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while self.http.get("/health").status_code != 200:
            assert time.monotonic() < end, self.log.read_text("utf-8")
            assert self.process.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def served(
    directory: Path, *arguments: str, program: tuple[str, ...] = SCRIPTED, ready: bool = True, **environment: str
) -> Iterator[Process]:
    """Starts ``glmlocal serve ARGUMENTS --port 0 --announce``; logs go to a file of ``directory``."""
    log = directory / "serve.log"
    command = [sys.executable, *program, "serve", *arguments, "--port", "0", "--announce"]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text("utf-8")
        announced = json.loads(line)
        assert announced["pid"] == process.pid
        with httpx.Client(base_url=announced["url"], timeout=60, trust_env=False) as http:
            server = Process(announced["url"], process, http, log)
            if ready:
                server.wait_until_ready()
            yield server
    finally:
        process.kill()
        process.communicate()
