"""Decode steps of an offloaded model: where their time went, what they had to read, and what the disk gives alone."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import psutil
import torch
from _routing import Trace, guesses
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.engine import Engine
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.formats.expert_pack import ExpertPack
from glmlocal.kernels.cpu.slots import SlotExperts
from glmlocal.layers.experts import Pending, Route
from glmlocal.offload import host
from glmlocal.offload.experts import OffloadedExperts
from glmlocal.offload.foresight import Foresight
from glmlocal.offload.nvme import open_reader
from glmlocal.offload.store import ExpertStore
from glmlocal.offload.tiers import ExpertKey, Residency

HISTORY = 128  # tokens of the trace that only count as uses, as if an earlier run had seen them
WARM_UP = 24  # tokens after them that fill the slots before anything is timed
PROBE_EVERY, PROBE_S = 4, 0.15  # tokens; how long the disk is measured between them
_TOUCH = 14  # tokens that bring few experts into their slots


@dataclass
class Watched:
    """Experts of a layer whose choices are noted, and are a trace's instead of the router's where there is one."""

    inner: OffloadedExperts
    spent: Spent
    choices: Sequence[list[int]] | None = None  # by token; None: the router's
    guesses: Sequence[Tensor] | None = None  # by token; None: those of the model's routers, asked early
    chosen: list[list[int]] = field(default_factory=list)
    guessed: list[list[int]] = field(default_factory=list)  # likeliest first

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def foresee(self, num_tokens: int, route: Route) -> None:
        token = len(self.chosen)
        if num_tokens > 1 or (self.guesses is not None and token >= len(self.guesses)):
            return

        def guess() -> tuple[Tensor, Tensor]:
            ids, weights = route()  # for what it costs, where it is not followed
            if self.guesses is None:
                return ids, weights
            return self.guesses[token], torch.linspace(1.0, 0.5, self.guesses[token].shape[1])[None]

        if self.choices is None:
            ids, weights = route()
            self.guessed.append(ids[0][weights[0].argsort(descending=True)].tolist())
        self.inner.foresee(num_tokens, guess)

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if x.shape[0] == 1:
            if self.choices is not None:
                topk_ids = torch.tensor([self.choices[len(self.chosen)]], dtype=torch.int32)
            self.chosen.append(sorted(topk_ids[0].tolist()))
        self.spent.needed_bytes.append(sum(map(self._is_needed, topk_ids[0].tolist())) * self.inner.pool.slot_bytes)
        return self.inner.submit(x, topk_ids, topk_weights)

    def _is_needed(self, expert: int) -> bool:
        """It has to be read for this step, or was ahead of it."""
        store, key = self.inner.store, ExpertKey(self.inner.layer, expert)
        return store.lookup(key) is not Residency.HIT or store._index(key) in store._prefetched


def watch(engine: Engine, spent: Spent, trace: Trace | None, recall: float | None) -> list[Watched]:
    """Put these between the engine's layers and their experts.

    ``recall``: of a trace's choices, how much is foreseen; None: nothing, and without a trace what the routers guess.
    """
    model, layers, watched, foresight = engine.runner.model, [], [], Foresight()
    for layer in model.layers:
        if isinstance(layer.experts, OffloadedExperts):
            experts = replace(layer.experts, foresight=foresight)
            choices = None if trace is None else [step[len(watched)] for step in trace]
            guess = None
            if choices is not None:
                guess = [] if recall is None else guesses(choices, model.config.n_routed_experts, recall)
            watched.append(Watched(experts, spent, choices, guess))
            layer = replace(layer, experts=watched[-1])
        layers.append(layer)
    engine.runner.model = replace(model, layers=tuple(layers))
    return watched


class Spent:
    """Where a step's time goes, and what each of its layers has to read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = [offload._source.reader for offload in engine.offloads.all]
        self.seconds: dict[str, float] = {}
        self.busy_s: dict[str, float] = {}  # of the disk, meanwhile
        self.needed_bytes: list[int] = []  # by layer; read ahead or not
        self._patched: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, name, what in (
            (kernels, "attention_block", "attention"),
            (kernels, "route", "guessing"),
            (kernels, "swiglu_ffn", "shared"),
            (kernels, "combine", "shared"),
            (SlotExperts, "rows", "experts"),
            (SlotExperts, "weigh", "experts"),
            (ExpertStore, "_wait", "disk"),
            (ExpertPack, "check", "checksums"),
            (type(self._engine.runner.model), "compute_logits", "head"),
        ):
            inner = getattr(owner, name)
            self._patched.append((owner, name, inner))
            setattr(owner, name, self._timed(inner, what))
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, inner in self._patched:
            setattr(owner, name, inner)

    def begin_step(self) -> None:
        self.seconds, self.busy_s, self.needed_bytes = {}, {}, []

    def disk_s(self) -> float:
        """With at least one read under way, since the start."""
        return sum(reader.busy_s for reader in self._readers)

    def _timed(self, inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s, start_busy_s = time.perf_counter(), self.disk_s()
            inside_s, inside_busy_s = sum(self.seconds.values()), sum(self.busy_s.values())
            try:
                return inner(*args, **kwargs)
            finally:  # what calls inside it took is theirs
                inside_s = sum(self.seconds.values()) - inside_s
                inside_busy_s = sum(self.busy_s.values()) - inside_busy_s
                self.busy_s[what] = self.busy_s.get(what, 0.0) + self.disk_s() - start_busy_s - inside_busy_s
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start_s - inside_s

        return timed


@dataclass(frozen=True)
class Step:
    seconds: float
    read_bytes: int
    needed_bytes: tuple[int, ...]  # of each layer with experts; what was guessed in vain is not needed
    spent_s: dict[str, float]
    disk_s: float  # of ``seconds``, with at least one read under way
    busy_s: dict[str, float]  # of ``spent_s``, the same
    disk_rate: float = 0.0  # bytes per second of reading alone, just before and after


@dataclass(frozen=True)
class Run:
    steps: list[Step]
    watched: list[Watched]  # by layer with experts


def decode(
    engine: Engine,
    trace: Trace | None,
    tokens: int,
    recall: float | None = None,
    disk: Disk | None = None,
    warm_up: int = WARM_UP,
) -> Run:
    """``tokens`` decode steps after a warm-up that fills the slots, with the disk's rate around them.

    Without a trace text is sampled, and the model's routers choose and guess.
    """
    restore, is_own = engine.runner.model, trace is None
    params = SamplingParams(
        temperature=1.0 if is_own else 0.0, seed=1, max_tokens=warm_up + tokens + 1, ignore_eos=True
    )
    engine.add(Request("bench", (11, 12, 13, 14), params))
    steps: list[Step] = []
    rates: list[float] = []
    with Spent(engine) as spent:
        watched = watch(engine, spent, trace, recall)
        engine.step()
        for token in range(warm_up + tokens):
            if disk is not None and token >= warm_up and (token - warm_up) % PROBE_EVERY == 0:
                rates.append(disk.rate(PROBE_S))
            spent.begin_step()
            before, busy_s, start_s = _read(engine), spent.disk_s(), time.perf_counter()
            engine.step()
            seconds, busy_s = time.perf_counter() - start_s, spent.disk_s() - busy_s
            needed = tuple(spent.needed_bytes)
            steps.append(Step(seconds, _read(engine) - before, needed, spent.seconds, busy_s, spent.busy_s))
        while engine.has_work:
            engine.step()
    engine.runner.model = restore
    steps = steps[warm_up:]
    if disk is not None:
        rates.append(disk.rate(PROBE_S))
        around = [(rates[i // PROBE_EVERY] + rates[i // PROBE_EVERY + 1]) / 2 for i in range(tokens)]
        steps = [replace(step, disk_rate=rate) for step, rate in zip(steps, around, strict=True)]
    return Run(steps, watched)


def with_all_in_slots(engine: Engine, slots: int, layers: int, top_k: int, tokens: int = 10) -> list[Step]:
    """Steps whose experts are all in their slots: a trace that repeats few of them."""
    few = min(2 * top_k, slots // layers - top_k)
    generator = random.Random(5)
    trace = [[generator.sample(range(few), top_k) for _ in range(layers)] for _ in range(_TOUCH + tokens)]
    steps = decode(engine, trace, tokens, warm_up=_TOUCH).steps
    assert not any(step.read_bytes for step in steps)
    return steps


def remember(engine: Engine, trace: Trace) -> None:
    """As after a long run: these tokens have been seen, and every record was compared with its checksum once."""
    for offload in engine.offloads.all:
        pack, layers = offload._pack, offload.store.layers
        offload._source._seen.update((record.layer, record.expert) for record in pack.records())
        for step in trace:
            for layer, chosen in zip(pack.layers(), step, strict=True):
                if layer in layers:
                    offload.store.touch(layer, dict.fromkeys(chosen, 1.0), 1)


def _read(engine: Engine) -> int:
    stats = engine.offloads.stats()
    return 0 if stats is None else stats.read_bytes


PARTS = ("attention", "guessing", "experts", "disk", "checksums", "shared", "head")


def ledger(steps: Sequence[Step]) -> dict[str, float]:
    """Milliseconds per token by what they went into; "other" is Python and the system."""
    found = {what: statistics.mean(step.spent_s.get(what, 0.0) for step in steps) * 1e3 for what in PARTS}
    found["other"] = statistics.mean(step.seconds for step in steps) * 1e3 - sum(found.values())
    return {what: round(value, 2) for what, value in found.items()}


def idle_disk(steps: Sequence[Step]) -> dict[str, float]:
    """Of the same milliseconds, those in which nothing was read."""
    busy = {what: statistics.mean(step.busy_s.get(what, 0.0) for step in steps) * 1e3 for what in PARTS}
    busy["other"] = statistics.mean(step.disk_s for step in steps) * 1e3 - sum(busy.values())
    return {what: round(value - busy[what], 2) for what, value in ledger(steps).items()}


class Disk:
    """Random records of the pack, ``top_k`` at a time, by a reader of its own."""

    def __init__(self, pack: ExpertPack, top_k: int) -> None:
        self._pack, self._top_k = pack, top_k
        self._size = pack.layout(pack.layers()[0]).record_bytes
        self._pool, self._reader = host.HostPool(2 * top_k, self._size), open_reader(pack, top_k)
        if not self._reader.direct:
            sys.exit(f"{pack.path} is on a filesystem without O_DIRECT; the page cache would be measured")
        for slot in range(2 * top_k):
            self._pool.view(slot)[:] = 0
        self._random, self._process = random.Random(1), psutil.Process()
        self.cpu_s = self.num_bytes = 0.0

    def rate(self, seconds: float) -> float:
        """Bytes per second."""
        slot, under_way, done = 0, 0, 0
        cpu_s, start_s = sum(self._process.cpu_times()[:2]), time.perf_counter()
        while (running := time.perf_counter() - start_s < seconds) or under_way:
            while running and under_way < self._top_k:
                layer, expert = self._random.choice(self._pack.layers()), self._random.randrange(self._pack.num_experts)
                record = self._pack.record(layer, expert)
                self._reader.submit(slot, record.offset, min(record.nbytes, self._size), self._pool.address(slot))
                slot, under_way = (slot + 1) % (2 * self._top_k), under_way + 1
            if self._reader.next(1.0):
                done, under_way = done + 1, under_way - 1
        self.cpu_s += sum(self._process.cpu_times()[:2]) - cpu_s
        self.num_bytes += done * self._size
        return done * self._size / (time.perf_counter() - start_s)
