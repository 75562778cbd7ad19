"""Malformed requests and streams that break off, for minutes, against a real server process; what must stay flat.

    python benchmarks/soak.py [--minutes 10] [--requests 10000] [--model scripted|demo|DIRECTORY]

Every second request is malformed, every tenth is a stream that is left in its middle. Before, in between and at the end
a known question is asked. Prints resident memory, descriptors and threads over time, and one JSON line; the exit code
is 1 when an answer was a 5xx, the known answer changed, or memory or descriptors grew beyond the first quarter's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import malformed
from served import REAL, SCRIPTED, served

_QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "say «known»"}],
    "temperature": 0,
    "max_tokens": 24,
}
_GROWTH, _GROWTH_BYTES = 1.10, 32 << 20  # memory may grow by the larger of the two after the first quarter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="at least that long")
    parser.add_argument("--requests", type=int, default=10_000, help="at least that many malformed requests")
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    is_scripted = args.model == "scripted"
    with (
        tempfile.TemporaryDirectory() as directory,
        served(
            Path(directory), "b" if is_scripted else args.model, program=SCRIPTED if is_scripted else REAL
        ) as server,
    ):
        process = psutil.Process(server.process.pid)
        known = _answer(server.http)
        chaos, samples, statuses = random.Random(args.seed), [_sample(process)], dict[int, int]()
        start_s = next_s = time.monotonic()
        number = 0
        while number < args.requests or time.monotonic() - start_s < args.minutes * 60:
            number += 1
            status = malformed.send(server.http, chaos)
            statuses[status] = statuses.get(status, 0) + 1
            if number % 2 == 0:
                server.http.post("/v1/chat/completions", json=_QUESTION)
            if number % 10 == 0:
                _leave_a_stream(server.http)
            if time.monotonic() > next_s:
                samples.append(_sample(process))
                print(f"{number:7d} requests  {_text(samples[-1])}", flush=True)
                next_s = time.monotonic() + 10
            if number % 1000 == 0 and _answer(server.http) != known:
                break
        time.sleep(2)
        samples.append(_sample(process))
        return _report(number, statuses, samples, _answer(server.http) == known, time.monotonic() - start_s)


def _answer(http: httpx.Client) -> str:
    message = http.post("/v1/chat/completions", json=_QUESTION).json()["choices"][0]["message"]
    return f"{message.get('reasoning_content')}|{message['content']}"


def _leave_a_stream(http: httpx.Client) -> None:
    with (
        suppress(httpx.HTTPError, StopIteration),
        http.stream("POST", "/v1/chat/completions", json={**_QUESTION, "stream": True}) as answer,
    ):
        next(answer.iter_lines())


def _sample(process: psutil.Process) -> tuple[int, int, int]:
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def _text(sample: tuple[int, int, int]) -> str:
    return f"rss {sample[0] / 2**20:.1f} MiB  {sample[1]} descriptors  {sample[2]} threads"


def _report(
    number: int, statuses: dict[int, int], samples: list[tuple[int, int, int]], is_known: bool, seconds: float
) -> int:
    early = samples[max(1, len(samples) // 4)]
    last = samples[-1]
    is_flat = last[0] <= max(early[0] * _GROWTH, early[0] + _GROWTH_BYTES) and last[1] <= early[1] + 4
    worst = max(statuses)
    print(f"after a quarter: {_text(early)}\nat the end:      {_text(last)}")
    facts = {
        "requests": number,
        "seconds": round(seconds, 1),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "rss_growth": round(last[0] / early[0], 3),
        "descriptors": [early[1], last[1]],
        "threads": [early[2], last[2]],
        "known_answer": is_known,
    }
    print(json.dumps(facts))
    return 0 if is_flat and is_known and worst < 500 else 1


if __name__ == "__main__":
    sys.exit(main())
