"""Through HTTP, as clients see it: do eight streams pay, and does a cached prefix?

    python benchmarks/serve_http.py [MODEL] [--repeats 3]

Ratios of runs that were taken in turns on one server. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import httpx

TOKENS, PREFIX = 64, 2048


def complete(http: httpx.Client, prompt: list[int], max_tokens: int) -> list[float]:
    """When each token of a streamed answer came, the start of the request first."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    at_s = [time.perf_counter()]
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        at_s += [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return at_s


def tokens_per_s(http: httpx.Client, dice: random.Random, concurrent: int) -> float:
    """Of whole requests, prefill of 16 tokens included."""
    prompts = [ids(dice, 16) for _ in range(concurrent)]
    start_s = time.perf_counter()
    with ThreadPoolExecutor(concurrent) as pool:
        list(pool.map(lambda prompt: complete(http, prompt, TOKENS), prompts))
    return concurrent * TOKENS / (time.perf_counter() - start_s)


def ids(dice: random.Random, count: int) -> list[int]:
    return dice.choices(range(1000, 40000), k=count)


def measure(url: str, repeats: int) -> dict[str, object]:
    dice, ones, eights, news, cacheds = random.Random(0), [], [], [], []
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        while http.get("/health").status_code != 200:
            time.sleep(0.2)
        tokens_per_s(http, dice, 8)  # warm
        for _ in range(repeats):
            ones.append(tokens_per_s(http, dice, 1))
            eights.append(tokens_per_s(http, dice, 8))
            prefix = ids(dice, PREFIX)
            for found in (news, cacheds):
                begin_s, first_s, *_ = complete(http, [*prefix, *ids(dice, 16)], 2)
                found.append(first_s - begin_s)
    return {
        "tokens_per_s": {"1": round(median(ones), 1), "8": round(median(eights), 1)},
        "eight_over_one": round(median(b / a for a, b in zip(ones, eights, strict=True)), 2),
        "ttft_2k_s": {"new": round(median(news), 3), "cached": round(median(cacheds), 3)},
        "cached_over_new": round(median(b / a for a, b in zip(news, cacheds, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    command = [sys.executable, "-m", "glmlocal", "serve", args.model, "--port", "0", "--announce", "--context", "4096"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            print(json.dumps(measure(json.loads(server.stdout.readline())["url"], args.repeats)))
        finally:
            server.stdin.close()  # it ends with its parent


if __name__ == "__main__":
    main()
