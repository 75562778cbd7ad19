"""How long the terminal app lets a person wait: first paint, Enter to first token, and keys while an answer streams.

The app runs in a real pseudo-terminal; the server is the tests' scripted one, in this process, so that both ends read
one clock. Predicted: a key is drawn in the next frame (1/60 s) after at most one drawing of the answer (a quarter of
the time, by design). The last line is JSON.

    python benchmarks/chat_latency.py [--rate 200] [--tokens 2000] [--keys 60]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from pty_terminal import Terminal  # noqa: E402
from tui.scripted_server import GATE, ScriptedServer, finish, scripted, stats, text, usage  # noqa: E402

SENTENCE = "The router sends **each token** to a few `experts`, and the others stay cold in memory."
WORDS = [word + " " for word in SENTENCE.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens per second of the stream")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the long answer")
    parser.add_argument("--keys", type=int, default=60, help="keys typed while it streams, and while nothing happens")
    parser.add_argument("--asks", type=int, default=10, help="questions for the time to the first token")
    args = parser.parse_args()
    with scripted(stats=stats()) as server, tempfile.TemporaryDirectory() as home:
        result = measure(server, home, args)
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(json.dumps(result))
    return 0


def measure(server: ScriptedServer, home: str, args: argparse.Namespace) -> dict[str, Any]:
    start_s = time.monotonic()
    cpu_before = os.times()
    terminal = Terminal(
        [sys.executable, "-m", "glmlocal_tui", "--url", server.url],
        columns=100,
        rows=30,
        XDG_DATA_HOME=home,
        XDG_CONFIG_HOME=home,
    )
    terminal.wait("Ask something")
    first_paint_s = time.monotonic() - start_s
    terminal.wait("ready: ask")
    firsts = [_first_token_ms(terminal, server, number) for number in range(args.asks)]
    idle = _key_echo_ms(terminal, args.keys)
    server.step_s = 1 / args.rate
    tokens = [text(WORDS[n % len(WORDS)] + ("" if n % 60 else "\n\n")) for n in range(args.tokens)]
    server.script([GATE, *tokens, finish(), usage()])
    terminal.type("long\r")
    server.open_gate()
    terminal.wait("router")
    server.sent_s.clear()
    began_s = time.monotonic()
    busy = _key_echo_ms(terminal, args.keys)
    streamed = len(server.sent_s) / (time.monotonic() - began_s)
    terminal.type("\x1b")
    terminal.wait("stopped")
    terminal.type("\x11")
    code = terminal.end()
    assert code == 0, code
    cpu = os.times()
    return {
        "first_paint_s": round(first_paint_s, 3),
        "app_cpu_s": round(cpu.children_user + cpu.children_system - cpu_before.children_user, 2),
        **_spread("first_token_over_server_ms", firsts),
        **_spread("key_echo_idle_ms", idle),
        **_spread("key_echo_streaming_ms", busy),
        "streamed_tokens_per_s": round(streamed, 1),
        "load_average": os.getloadavg()[0],
    }


def _first_token_ms(terminal: Terminal, server: ScriptedServer, number: int) -> float:
    """From the server's sending of the first token to its cells on the screen."""
    word = f"first{number:03}"
    server.script([text(word), finish(), usage()])
    terminal.type(f"q{number}")
    terminal.wait(f"q{number}")
    server.sent_s.clear()
    terminal.type("\r")
    while word not in "\n".join(terminal.screen.display):
        terminal.read(0.5)
    elapsed = time.monotonic() - server.sent_s[0]
    terminal.wait(lambda: "answering" not in terminal.screen.display[-1])
    return 1000 * elapsed


def _key_echo_ms(terminal: Terminal, keys: int) -> list[float]:
    """Type one letter at a time and wait until its cell is drawn; the prompt is empty again at the end."""
    found = []
    line = len(terminal.screen.display) - 3
    typed = ""
    for number in range(keys):
        letter = "abcdefghijklmnopqrstuvwxyz"[number % 26]
        typed += letter
        start_s = time.monotonic()
        terminal.type(letter)
        while typed[-20:] not in terminal.screen.display[line]:
            terminal.read(0.5)
            assert time.monotonic() - start_s < 30, terminal.text
        found.append(1000 * (time.monotonic() - start_s))
        end_s = time.monotonic() + 0.03
        while (left_s := end_s - time.monotonic()) > 0:  # a fast typist, and the screen goes on meanwhile
            terminal.read(left_s)
    terminal.type("\x15")
    return found


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {
        f"{name}_median": round(median(values), 1),
        f"{name}_p95": round(quantiles(values, n=20)[-1], 1),
    }


if __name__ == "__main__":
    sys.exit(main())
