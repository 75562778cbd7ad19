"""Decode and prefill of one GGUF file by glmlocal, llama.cpp and transformers, as ratios: same threads, same prompts.

    python benchmarks/peers.py --llama-python ~/venvs/llama/bin/python     # the demo model
    python benchmarks/peers.py --model air5.gguf --engines glmlocal,llama.cpp --llama-python …

Each engine stays loaded in its own process; they are measured by turns, one at a time, with prompts that never repeat
(a prefix cache would answer at once). Correctness comes first: the first engine's greedy text must be the reference's,
except where tokens are within 2 % of the range of its logits of each other, or nothing is measured. llama.cpp is
llama-cpp-python in this interpreter or in ``--llama-python``, else a ``llama-bench`` on PATH, which shows no tokens to
compare; transformers runs the dequantized weights in fp32, where they fit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
from _common import Summary, Worker, WorkerError, interleave, paired_ratios

from glmlocal.errors import CheckpointError, ConfigError, GlmlocalError
from glmlocal.units import format_bytes

NAMES = ("glmlocal", "llama.cpp", "transformers")
PREFILL_TOKENS = (32, 128, 512)
DECODE_TOKENS, DECODE_CONTEXTS = 64, (0, 512)
GREEDY_TOKENS, LEAST_AGREEING = 32, 32
GREEDY_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils when it is heated because",
    "def fibonacci(n):\n",
)
BUSY = 0.15  # of the processors used by others before we start: numbers are noise then
FP32_EXPANSION = 8  # bytes in memory per byte of file for transformers, at 4 bits


class Peer(Protocol):
    """An engine under measurement."""

    def prefill(self, prompt: list[int]) -> float: ...

    def decode(self, prompt: list[int], num_tokens: int) -> float: ...


@dataclass(frozen=True, slots=True)
class WorkerPeer:
    """One of ``engines.py`` in its own process."""

    worker: Worker

    def prefill(self, prompt: list[int]) -> float:
        return float(self.worker.call("prefill", prompt=prompt))

    def decode(self, prompt: list[int], num_tokens: int) -> float:
        return float(self.worker.call("decode", prompt=prompt, num_tokens=num_tokens))

    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.worker.call("greedy", prompt=prompt, num_tokens=num_tokens)
        return answer

    def encode(self, text: str) -> list[int] | None:
        ids: list[int] | None = self.worker.call("encode", text=text)
        return ids


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """llama.cpp's own benchmark program; it loads the model for every measurement and chooses its prompts itself."""

    program: str
    model: Path
    threads: int

    def prefill(self, prompt: list[int]) -> float:
        return len(prompt) / self._tokens_per_s("-p", str(len(prompt)), "-n", "0")

    def decode(self, prompt: list[int], num_tokens: int) -> float:
        return num_tokens / self._tokens_per_s("-p", "0", "-n", str(num_tokens), "-d", str(len(prompt)))

    def _tokens_per_s(self, *test: str) -> float:
        command = [self.program, "-m", str(self.model), "-t", str(self.threads), "-ngl", "0", "-r", "1", "-o", "json"]
        done = subprocess.run([*command, *test], capture_output=True, text=True, check=False)
        try:
            return float(json.loads(done.stdout)[0]["avg_ts"])
        except (ValueError, LookupError, TypeError):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise WorkerError(f"llama-bench ended with status {done.returncode}: {last}") from None


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure."""

    phase: str  # "prefill" or "decode"
    tokens: int
    context: int  # tokens before; 0 is a prompt of one token

    def measure(self, peer: Peer, prompts: Callable[[int, int], list[int]], repeat: int) -> float:
        """Tokens per second."""
        if self.phase == "prefill":
            return self.tokens / peer.prefill(prompts(repeat, self.tokens))
        return self.tokens / peer.decode(prompts(repeat, max(1, self.context)), self.tokens)

    def __str__(self) -> str:
        return f"prefill {self.tokens}" if self.phase == "prefill" else f"decode {self.tokens} at {self.context}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an engine's greedy text agrees with the reference's, over all prompts."""

    tokens: int  # that agreed before the first difference
    ties: int  # prompts whose texts part where the reference itself could have gone either way
    mismatch: str | None  # the first difference that is no tie


def agreement(texts: Sequence[Sequence[int]], reference: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare greedy ``texts`` with the reference's answers, which have ``tokens`` and ``near`` (see engines.py).

    After a tie the texts are different ones, so what follows is not compared.
    """
    agreed, ties, mismatch = 0, 0, None
    for n, (text, answer) in enumerate(zip(texts, reference, strict=True)):
        for step, (token, wanted) in enumerate(zip(text, answer["tokens"], strict=True)):
            if token == wanted:
                agreed += 1
                continue
            if token in answer["near"][step]:
                ties += 1
            elif mismatch is None:
                mismatch = f"prompt {n}, token {step}: {token} instead of {wanted}"
            break
    return Agreement(agreed, ties, mismatch)


def make_prompt(vocab_size: int, seed: str, length: int) -> list[int]:
    """Random ids from the middle of the vocabulary, where ordinary text is; another seed, another first token."""
    chosen = random.Random(seed)
    return [chosen.randrange(vocab_size // 100, vocab_size * 9 // 10) for _ in range(length)]


def check_greedy(peers: Mapping[str, Peer], vocab_size: int) -> dict[str, Agreement]:
    """Compare every engine's greedy text with the reference's: transformers, whose arithmetic is fp32, else llama.cpp.

    Empty when there is nothing to compare. Raises WorkerError.
    """
    speaking = {name: peer for name, peer in peers.items() if isinstance(peer, WorkerPeer)}
    reference = next((name for name in ("transformers", "llama.cpp") if name in speaking), None)
    if reference is None or len(speaking) < 2:
        return {}
    encoder = next((peer for peer in speaking.values() if peer.encode("a")), None)
    prompts = [
        make_prompt(vocab_size, text, 8) if encoder is None else encoder.encode(text) or [] for text in GREEDY_PROMPTS
    ]
    answers = {name: [peer.greedy(prompt, GREEDY_TOKENS) for prompt in prompts] for name, peer in speaking.items()}
    return {
        name: agreement([answer["tokens"] for answer in texts], answers[reference])
        for name, texts in answers.items()
        if name != reference
    }


def wrong_engines(greedy: Mapping[str, Agreement], first: str) -> list[str]:
    """Engines whose speed means nothing: the first if its text differs, any whose text is another altogether."""
    return [
        name
        for name, result in greedy.items()
        if result.tokens < LEAST_AGREEING or (name == first and result.mismatch is not None)
    ]


def open_peers(args: argparse.Namespace, model: Path, stack: ExitStack) -> tuple[dict[str, Peer], dict[str, str], int]:
    """Start and load the engines. Returns them, why others were left out, and the vocabulary's size.

    Raises ConfigError when the first one, or one that was asked for by name, cannot run.
    """
    context = max(max(args.prefill) + 1, max(args.context) + args.decode + 2, 256)
    peers: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    vocab_size = 0
    names = args.engines or NAMES
    for name in names:
        try:
            python = _interpreter(name, args.llama_python, model)
            if python is None:
                program = shutil.which("llama-bench")
                assert program
                peers[name] = LlamaBench(program, model, args.threads)
                continue
            worker = stack.enter_context(Worker(name, [python, str(Path(__file__).with_name("engines.py")), name]))
            worker.call("load", model=str(model), threads=args.threads, context=context)
            peers[name] = WorkerPeer(worker)
            vocab_size = worker.call("vocab_size")
        except WorkerError as error:
            if args.engines or name == names[0]:
                raise ConfigError(f"{error}; name the others with --engines") from None
            skipped[name] = str(error)
    return peers, skipped, vocab_size


def _interpreter(name: str, llama_python: str | None, model: Path) -> str | None:
    """The Python that runs an engine, None for llama-bench. Raises WorkerError when there is nothing to run it."""
    if name == "llama.cpp":
        if llama_python is not None or importlib.util.find_spec("llama_cpp"):
            return llama_python or sys.executable
        if shutil.which("llama-bench"):
            return None
        raise WorkerError("no llama-cpp-python in this interpreter, no --llama-python and no llama-bench on PATH")
    if name == "transformers":
        if not importlib.util.find_spec("transformers"):
            raise WorkerError("transformers is not installed: pip install 'glmlocal[test]'")
        needed, free = model.stat().st_size * FP32_EXPANSION, psutil.virtual_memory().available
        if needed > free // 2:
            raise WorkerError(
                f"fp32 weights take about {format_bytes(needed)}, half of what is free is {format_bytes(free // 2)}"
            )
    return sys.executable


def find_model(name: str) -> Path:
    """The GGUF file that is meant. Raises CheckpointError, or DownloadError for demo."""
    path = Path(name)
    if not path.exists():
        from glmlocal.resolve import resolve

        path = Path(resolve(name, progress=sys.stderr.isatty()))
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file, wanted a .gguf, which all engines can read")
    return path


def run(args: argparse.Namespace) -> int:
    model = find_model(args.model)
    busy = psutil.cpu_percent(1.0) / 100
    if busy > BUSY:
        print(f"warning: other programs use {busy:.0%} of the processors; ratios will be noise", file=sys.stderr)
    with ExitStack() as stack:
        peers, skipped, vocab_size = open_peers(args, model, stack)
        for name, why in skipped.items():
            print(f"without {name}: {why}")
        greedy = check_greedy(peers, vocab_size)
        print_greedy(greedy)
        wrong = wrong_engines(greedy, next(iter(peers)))
        cells = [Cell("prefill", n, 0) for n in args.prefill] + [Cell("decode", args.decode, c) for c in args.context]
        results: list[dict[str, Any]] = []
        for cell in [] if wrong else cells:
            prompts = partial(_cell_prompt, vocab_size, str(cell))
            speeds = interleave(
                {name: partial(cell.measure, peer, prompts) for name, peer in peers.items()}, args.repeats
            )
            results.append(report(cell, speeds))
    record = {
        "benchmark": "peers", "model": args.model, "threads": args.threads, "repeats": args.repeats,
        "others_busy": round(busy, 3), "skipped": skipped,
        "greedy": {name: {"tokens": r.tokens, "ties": r.ties, "mismatch": r.mismatch} for name, r in greedy.items()},
        "cells": results,
    }  # fmt: skip
    if wrong:
        print(f"{' and '.join(wrong)}: greedy text differs, so nothing was measured")
    print(json.dumps(record))
    return 1 if wrong else 0


def _cell_prompt(vocab_size: int, cell: str, repeat: int, length: int) -> list[int]:
    return make_prompt(vocab_size, f"{cell} {repeat}", length)


def print_greedy(greedy: Mapping[str, Agreement]) -> None:
    for name, result in greedy.items():
        verdict = (
            result.mismatch
            or f"{result.tokens} tokens agree, {result.ties} of {len(GREEDY_PROMPTS)} texts part at a tie"
        )
        print(f"greedy  {name}: {verdict}")
    if not greedy:
        print("greedy text not compared: no other engine that shows its tokens")


def report(cell: Cell, speeds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Print one cell; returns it for the JSON line."""
    summaries = {name: Summary.of(values) for name, values in speeds.items()}
    first, *others = speeds
    ratios = {name: Summary.of(paired_ratios(speeds[first], speeds[name])) for name in others}
    columns = [f"{name} {s.median:8.1f} tok/s ±{s.spread:4.0%}" for name, s in summaries.items()]
    columns += [f"{first}/{name} {r.median:5.2f}× ({r.low:.2f}–{r.high:.2f})" for name, r in ratios.items()]
    print(f"{cell!s:<18}" + "   ".join(columns), flush=True)
    return {
        "phase": cell.phase, "tokens": cell.tokens, "context": cell.context,
        "tokens_per_s": {name: summary.rounded() for name, summary in summaries.items()},
        "ratio": {name: ratio.rounded() for name, ratio in ratios.items()},
    }  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _engines(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted some of {', '.join(NAMES)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a GGUF file or demo")
    parser.add_argument(
        "--engines", type=_engines, help=f"comma-separated, the first over the others: {','.join(NAMES)}"
    )
    parser.add_argument("--llama-python", help="a Python interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prefill", type=_numbers, default=PREFILL_TOKENS, help="prompts; default 32,128,512")
    parser.add_argument("--decode", type=int, default=DECODE_TOKENS, help="tokens to generate; default 64")
    parser.add_argument("--context", type=_numbers, default=DECODE_CONTEXTS, help="to decode at; default 0,512")
    args = parser.parse_args(argv)
    try:
        if min(args.threads, args.repeats, args.decode, *args.prefill, *(c + 1 for c in args.context)) < 1:
            raise ConfigError("--threads, --repeats, --decode and --prefill are at least 1, --context at least 0")
        return run(args)
    except (GlmlocalError, WorkerError) as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
