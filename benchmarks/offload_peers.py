"""A model larger than its memory: our packed experts against llama.cpp's mapped file, in control groups of one size.

    python benchmarks/offload_peers.py PACK GGUF --memory 3GiB --llama-python PATH [--tokens 24] [--repeats 3]

Both engines run in a memory group of their own with that limit (as root; versions 1 and 2) and get the same random
tokens, one at a time, each as a prompt of one token: a decode step at context 0 whose experts no earlier step knows.
llama.cpp maps the GGUF file, whose pages come and go as the kernel likes; ours read the pack past the page cache. First
the next token after some prompts has to be the same, or within a tie. Repeats are taken in turns; ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from _common import Summary, Worker, WorkerError, interleave, paired_ratios
from _groups import inside, memory_group

from glmlocal.errors import ConfigError
from glmlocal.units import parse_size

ENGINES = Path(__file__).with_name("engines.py")
CONTEXT = 64


def drop_pages(path: Path) -> None:
    """Out of the page cache: pages that are there already count against the group that read them first."""
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def check(ours: Worker, theirs: Worker, vocab_size: int, rng: random.Random) -> None:
    """Exit unless the tokens that follow some prompts are those of llama.cpp, ties aside."""
    for _ in range(4):
        prompt = [rng.randrange(vocab_size) for _ in range(8)]
        found = ours.call("greedy", prompt=prompt, num_tokens=1)["tokens"][0]
        near = theirs.call("greedy", prompt=prompt, num_tokens=1)["near"][0]
        if found not in near:
            sys.exit(f"after {prompt} glmlocal says {found}, which is not among llama.cpp's best: {near[:5]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("gguf")
    parser.add_argument("--memory", required=True, help="of each engine, for example 3GiB")
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    memory_bytes, rng = parse_size(args.memory, "--memory"), random.Random(0)
    with ExitStack() as stack:
        workers = {}
        for name, python, model in (
            ("glmlocal", sys.executable, args.pack),
            ("llama.cpp", args.llama_python, args.gguf),
        ):
            drop_pages(Path(model))
            group = stack.enter_context(memory_group(name, memory_bytes))
            workers[name] = stack.enter_context(Worker(name, inside(group, [python, str(ENGINES), name])))
            mapped = {"only_mapped": True} if name == "llama.cpp" else {}
            workers[name].call("load", model=model, threads=args.threads, context=CONTEXT, **mapped)
        vocab_size = workers["llama.cpp"].call("vocab_size")
        check(workers["glmlocal"], workers["llama.cpp"], vocab_size, rng)
        tokens = [[rng.randrange(vocab_size) for _ in range(args.tokens)] for _ in range(args.repeats + 1)]

        def rate(worker: Worker) -> Callable[[int], float]:
            return lambda repeat: args.tokens / sum(worker.call("prefill", prompt=[token]) for token in tokens[repeat])

        runs = interleave({name: rate(worker) for name, worker in workers.items()}, args.repeats)
    ratio = Summary.of(paired_ratios(runs["glmlocal"], runs["llama.cpp"]))
    for name, rates in runs.items():
        print(f"{name:10} {median(rates):.2f} tok/s ({min(rates):.2f} to {max(rates):.2f})")
    print(f"glmlocal/llama.cpp {ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})")
    print(
        json.dumps(
            {"benchmark": "offload_peers", "memory_bytes": memory_bytes, "tokens_per_s": runs, "ratio": ratio.rounded()}
        )
    )


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, OSError, WorkerError) as error:
        sys.exit(str(error))
