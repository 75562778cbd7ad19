"""How long the terminal app lets a person wait: first paint, Enter to first token, and keys while an answer streams.

The app runs in a real pseudo-terminal; the server is the tests' scripted one, in this process, so that both ends read
one clock. Predicted: a key is drawn in the next frame (1/60 s) after at most one drawing of the answer (a quarter of
the time, by design). The last line is JSON.

    python benchmarks/chat_latency.py [--rate 200] [--warm 5] [--keys 60] [--earlier 25 --head 10000] [--thinking]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pexpect
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from tui.scripted_server import ScriptedServer, finish, scripted, stats, text, think, usage  # noqa: E402

SENTENCE = "The router sends **each token** to a few `experts`, and the others stay cold in memory."
WORDS = [word + " " for word in SENTENCE.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens per second of the stream")
    parser.add_argument("--tokens", type=int, default=20000, help="tokens of the long answer")
    parser.add_argument("--head", type=int, default=0, help="tokens of it that come at once, before the others")
    parser.add_argument("--earlier", type=int, default=0, help="questions that were asked and answered before")
    parser.add_argument("--warm", type=float, default=5.0, help="seconds of the answer before the first key")
    parser.add_argument("--keys", type=int, default=60, help="keys typed while it streams, and while nothing happens")
    parser.add_argument("--starts", type=int, default=5, help="starts of the app for the first paint")
    parser.add_argument("--asks", type=int, default=40, help="questions for the time to the first token")
    parser.add_argument(
        "--thinking", action="store_true", help="the first token is one of thinking, as GLM's mostly are"
    )
    args = parser.parse_args()
    with scripted(stats=stats()) as server, tempfile.TemporaryDirectory() as home:
        result = measure(server, home, args)
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(json.dumps(result))
    return 0


class RawTerminal:
    """A process in a pseudo-terminal whose output is searched as bytes: drawing it here would cost too much."""

    def __init__(self, command: list[str], **environment: str) -> None:
        variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "LC_ALL": "C.UTF-8",
            **environment,
        }
        self._process = pexpect.spawn(command[0], command[1:], env=variables, dimensions=(30, 100))
        self._process.delaybeforesend = None  # pexpect would wait 50 ms before each key

    def type(self, text: str) -> None:
        self._process.send(text)

    def see(self, text: str, timeout_s: float = 60.0) -> float:
        """Read until a text has been written in one piece; the time it was seen."""
        wanted, data, end_s = text.encode(), b"", time.monotonic() + timeout_s
        while wanted not in data:
            if select.select([self._process.child_fd], [], [], 1.0)[0]:
                data = data[-200:] + os.read(self._process.child_fd, 65536)
            assert time.monotonic() < end_s, f"never saw {text!r} in {data[-2000:]!r}"
        return time.monotonic()

    def drain(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            if select.select([self._process.child_fd], [], [], left_s)[0]:
                os.read(self._process.child_fd, 65536)

    def cpu_s(self) -> float:
        """What the app has used so far, in seconds of one core."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self) -> int:
        self._process.expect(pexpect.EOF, timeout=30)
        self._process.close()
        return int(self._process.exitstatus)


def measure(server: ScriptedServer, home: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "glmlocal", "chat", "--url", server.url]
    # An installed program has its bytecode: the first start makes it and does not count.
    places = {"XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home, "PYTHONPYCACHEPREFIX": f"{home}/bytecode"}
    paints = []
    for left in reversed(range(args.starts + 1)):
        start_s = time.monotonic()
        terminal = RawTerminal(command, **places)
        # of "Ask something": the cursor stands on its first letter
        paints.append((terminal.see("sk something") - start_s, terminal.cpu_s()))
        if left:
            terminal.see("ready")
            terminal.type("\x11")
            terminal.end()
    terminal.see("ready")
    terminal.drain(1.0)
    for number in range(args.earlier):
        _ask(terminal, server, f"{SENTENCE}\n\n- one\n- two\n\n```py\nx = 1\n```\n\nearlier{number:03}")
    firsts = [_first_token_ms(terminal, server, number, thinking=args.thinking) for number in range(args.asks)]
    idle = _key_echo_ms(terminal, args.keys)
    server.step_s = 1 / args.rate
    tokens = [WORDS[n % len(WORDS)] + ("" if n % 60 else "\n\n") for n in range(args.head + args.tokens)]
    head = [text("".join(tokens[: args.head]))] if args.head else []
    server.script([*head, *(text(token) for token in tokens[args.head :]), finish(), usage()])
    terminal.type("long\r")
    terminal.see("router")
    terminal.drain(args.warm)
    server.sent_s.clear()
    began_s = time.monotonic()
    cpu_s = terminal.cpu_s()
    busy = _key_echo_ms(terminal, args.keys)
    cpu_s = terminal.cpu_s() - cpu_s
    streamed_s = time.monotonic() - began_s
    streamed = len(server.sent_s) / streamed_s
    assert streamed > 0, "the answer ended before the last key: --tokens must be larger"
    terminal.type("\x1b")
    terminal.see("stopped")
    terminal.type("\x11")
    code = terminal.end()
    assert code == 0, code
    return {
        "first_paint_s_median": round(median(wall_s for wall_s, _ in paints[1:]), 3),
        "first_paint_cpu_s_median": round(median(cpu_s for _, cpu_s in paints[1:]), 3),  # on an idle core
        **_spread("first_token_over_server_ms", [over_ms for over_ms, _ in firsts]),
        **_spread("first_token_after_sent_ms", [sent_ms for _, sent_ms in firsts]),
        **_spread("key_echo_idle_ms", idle),
        **_spread("key_echo_streaming_ms", busy),
        "app_cpu_share_streaming": round(cpu_s / streamed_s, 2),
        "streamed_tokens_per_s": round(streamed, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _first_token_ms(
    terminal: RawTerminal, server: ScriptedServer, number: int, *, thinking: bool
) -> tuple[float, float]:
    """From Enter to the writing of the first token's cells, less what the server took; and from its sending alone."""
    start_s, seen_s = _ask(terminal, server, f"first{number:03}", thinking=thinking)
    sent_s = server.sent_s[0]
    return 1000 * (seen_s - start_s - (sent_s - server.asked_s[0])), 1000 * (seen_s - sent_s)


def _ask(terminal: RawTerminal, server: ScriptedServer, answer: str, *, thinking: bool = False) -> tuple[float, float]:
    """A question whose answer comes in one piece, or is thought first: when Enter was pressed, and when its last word
    was seen."""
    # Thinking folds when the answer begins, so that comes later.
    server.step_s = 0.15 if thinking else 0.0
    server.script([think(answer), text("So."), finish(), usage()] if thinking else [text(answer), finish(), usage()])
    terminal.type("q")
    terminal.drain(0.3)
    server.sent_s.clear()
    server.asked_s.clear()
    start_s = time.monotonic()
    terminal.type("\r")
    seen_s = terminal.see(answer.split()[-1])
    terminal.drain(1.2 if thinking else 0.7)
    return start_s, seen_s


def _key_echo_ms(terminal: RawTerminal, keys: int) -> list[float]:
    """Type one rare character at a time and wait until it is drawn; the prompt is empty again at the end."""
    found = []
    for number in range(keys):
        letter = chr(0x9F00 + number)
        start_s = time.monotonic()
        terminal.type(letter)
        found.append(1000 * (terminal.see(letter) - start_s))
        terminal.drain(0.05)  # a fast typist
    terminal.type("\x15")
    terminal.drain(0.3)
    return found


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {
        f"{name}_median": round(median(values), 1),
        f"{name}_p95": round(quantiles(values, n=20)[-1], 1),
    }


if __name__ == "__main__":
    sys.exit(main())
