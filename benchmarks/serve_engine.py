"""The engine under several clients: does a batch pay, does a cached prefix, and who waits for a long prompt?

    python benchmarks/serve_engine.py [MODEL] [--repeats 3] [--chunks 128,256,512]

Every figure is a ratio of two runs that were taken in turns on the same engine. Answers are compared first; a
difference ends the run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from glmlocal import LLM
from glmlocal.engine.client import ClientOptions, LocalEngineClient
from glmlocal.engine.request import Request, SamplingParams

NAMES = itertools.count()


@dataclass(slots=True)
class Trace:
    """When the outputs of one request came."""

    start_s: float
    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)  # of each token

    @property
    def ttft_s(self) -> float:
        return self.at_s[0] - self.start_s


@dataclass(slots=True)
class StepClock:
    """Seconds per step, and those of the engine's thread that were not spent in the model and its head.

    The latter is CPU time: on a busy machine it does not count who else ran.
    """

    step_s: list[float] = field(default_factory=list)
    outside_s: list[float] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)  # requests, tokens

    def clear(self) -> None:
        self.step_s.clear()
        self.outside_s.clear()
        self.batches.clear()


def watch(llm: LLM) -> StepClock:
    """Measure the engine's steps from now on."""
    clock, engine, model = StepClock(), llm.engine, llm.engine.runner.model
    spent = [0.0]

    class Timed:
        """The model, with a clock around what is computed natively."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, *args: Any) -> Any:
            start_s = time.thread_time()
            try:
                return model(*args)
            finally:
                spent[0] += time.thread_time() - start_s

        def compute_logits(self, hidden_states: Any) -> Any:
            start_s = time.thread_time()
            try:
                return model.compute_logits(hidden_states)
            finally:
                spent[0] += time.thread_time() - start_s

    step, run = engine.step, engine.runner.run

    def timed_step() -> Any:
        spent[0], start_s, cpu_s, before = 0.0, time.perf_counter(), time.thread_time(), len(clock.batches)
        outputs = step()
        if len(clock.batches) > before:
            clock.step_s.append(time.perf_counter() - start_s)
            clock.outside_s.append(time.thread_time() - cpu_s - spent[0])
        return outputs

    def noted_run(batch: Any, is_cancelled: Any) -> Any:
        clock.batches.append((len(batch.requests), batch.num_tokens))
        return run(batch, is_cancelled)

    engine.runner.model = Timed()  # type: ignore[assignment]
    engine.runner.run, engine.step = noted_run, timed_step  # type: ignore[method-assign]
    return clock


class Bench:
    def __init__(self, llm: LLM, client: LocalEngineClient, clock: StepClock, seed: int) -> None:
        self.llm, self.client, self.clock = llm, client, clock
        self.random = random.Random(seed)

    def prompt(self, num_tokens: int) -> list[int]:
        return self.random.choices(range(1000, self.llm.config.vocab_size - 1000), k=num_tokens)

    async def ask(self, token_ids: Sequence[int], max_tokens: int) -> Trace:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        trace = Trace(time.perf_counter())
        async for output in self.client.submit(Request(str(next(NAMES)), tuple(token_ids), params)):
            trace.token_ids += output.token_ids
            trace.at_s += [time.perf_counter()] * len(output.token_ids)
        return trace

    async def same_text(self) -> bool:
        """Eight at odd times, and each alone."""
        prompts = [self.prompt(length) for length in (3, 20, 33, 64, 90, 128, 200, 300)]

        async def late(token_ids: list[int], delay_s: float) -> Trace:
            await asyncio.sleep(delay_s)
            return await self.ask(token_ids, 24)

        delays = [self.random.uniform(0, 0.3) for _ in prompts]
        together = await asyncio.gather(*(late(*each) for each in zip(prompts, delays, strict=True)))
        return [each.token_ids for each in together] == [(await self.ask(each, 24)).token_ids for each in prompts]

    async def tokens_per_s(self, concurrent: int, max_tokens: int) -> float:
        """Decode speed of that many streams together, from the last first token to the first last one."""
        traces = await asyncio.gather(*(self.ask(self.prompt(16), max_tokens) for _ in range(concurrent)))
        begin, end = max(each.at_s[0] for each in traces), min(each.at_s[-1] for each in traces)
        return sum(sum(begin < at_s <= end for at_s in each.at_s) for each in traces) / (end - begin)

    async def ttft_s(self, prefix: list[int]) -> float:
        return (await self.ask([*prefix, *self.prompt(16)], 1)).ttft_s

    async def delays(self, chunk: int, num_prompt_tokens: int) -> tuple[float, float, float, float]:
        """Seconds: the usual gap between a stream's tokens, the longest while a long prompt is computed, the longest
        step; and how fast the prompt went."""
        self.client.engine.scheduler.chunk_beside_decode = chunk
        streams = [asyncio.create_task(self.ask(self.prompt(16), 400)) for _ in range(3)]
        await asyncio.sleep(0.5)
        self.clock.clear()
        begin_s = time.perf_counter()
        long = await self.ask(self.prompt(num_prompt_tokens), 1)
        end_s = time.perf_counter()
        longest_step_s = max(self.clock.step_s)
        traces = await asyncio.gather(*streams)
        gaps = [(b, b - a) for each in traces for a, b in itertools.pairwise(each.at_s)]
        beside = [gap for at_s, gap in gaps if begin_s < at_s <= end_s]
        usual = [gap for at_s, gap in gaps if at_s > end_s] or [0.0]
        return median(usual), max(beside), longest_step_s, num_prompt_tokens / long.ttft_s

    async def overhead(self, concurrent: int) -> tuple[float, float]:
        """A decode step of that many requests, and what of it is not the model: median seconds."""
        self.clock.clear()
        await asyncio.gather(*(self.ask(self.prompt(8), 64) for _ in range(concurrent)))
        steps = [
            (step_s, outside_s)
            for step_s, outside_s, batch in zip(
                self.clock.step_s, self.clock.outside_s, self.clock.batches, strict=True
            )
            if batch == (concurrent, concurrent)
        ]
        return median(step for step, _ in steps), median(rest for _, rest in steps)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with LLM(args.model, context=8192, max_batch=8) as llm:
        client = LocalEngineClient(llm.engine, ClientOptions())
        clock = watch(llm)
        await client.start()
        try:
            return await _measure(Bench(llm, client, clock, args.seed), args)
        finally:
            await client.aclose()


async def _measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"model": args.model, "repeats": args.repeats}
    if not await bench.same_text():
        sys.exit("a batch changed a greedy answer: no figures")
    found["same_text"] = True
    one, eight, new, cached = [], [], [], []
    for _ in range(args.repeats):
        one.append(await bench.tokens_per_s(1, 48))
        eight.append(await bench.tokens_per_s(8, 48))
        prefix = bench.prompt(2048)
        new.append(await bench.ttft_s(prefix))
        cached.append(await bench.ttft_s(prefix))
    found["decode_tokens_per_s"] = {"1": round(median(one), 1), "8": round(median(eight), 1)}
    found["eight_over_one"] = round(median(b / a for a, b in zip(one, eight, strict=True)), 2)
    found["ttft_2k_s"] = {"new": round(median(new), 3), "cached": round(median(cached), 3)}
    found["cached_over_new"] = round(median(b / a for a, b in zip(new, cached, strict=True)), 3)
    speeds, waits = (median(one), median(eight)), (median(new), median(cached))
    print("decode   1 stream {:8.1f} tok/s   8 streams {:8.1f}   ratio".format(*speeds), found["eight_over_one"])
    print("TTFT 2K  new {:8.2f} s   cached {:8.2f} s   ratio".format(*waits), found["cached_over_new"])
    found["beside_4k_prompt"] = {}
    for chunk in args.chunks:
        usual, longest, step, prefill = await bench.delays(chunk, args.prompt)
        found["beside_4k_prompt"][str(chunk)] = {
            "gap_ms": round(usual * 1e3, 1),
            "longest_gap_ms": round(longest * 1e3, 1),
            "longest_step_ms": round(step * 1e3, 1),
            "longest_gap_over_step": round(longest / step, 2),
            "prefill_tokens_per_s": round(prefill, 1),
        }
        print(
            f"beside {args.prompt} prompt tokens, chunk {chunk:4}: gap {usual * 1e3:.0f} ms, longest "
            f"{longest * 1e3:.0f} ms = {longest / step:.2f} of the longest step; prompt at {prefill:.0f} tok/s"
        )
    found["overhead"] = {}
    for concurrent in (1, 8):
        step, rest = await bench.overhead(concurrent)
        found["overhead"][str(concurrent)] = {
            "step_ms": round(step * 1e3, 2),
            "outside_model_ms": round(rest * 1e3, 3),
            "of_32_ms": round(rest / 0.032, 4),
        }
        print(f"step of {concurrent}: {step * 1e3:.2f} ms, outside the model {rest * 1e3:.3f} ms of CPU")
    return found


def sizes(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--chunks", type=lambda text: [int(each) for each in text.split(",") if each], default=[128, 256, 512]
    )
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--seed", type=int, default=1)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
