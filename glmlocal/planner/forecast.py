"""How fast a placed model will be: bytes moved and operations per token → seconds per layer and tier. Torch-free.

The model is design.md §8. A layer's time is what its slowest resource needs; a token's is the sum over layers, because
they run one after another, and what it costs outside them. Every constant is in ``efficiency.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from glmlocal.models.footprint import Footprint, Layer, Part
from glmlocal.planner.efficiency import DEFAULT, GUESSES, Efficiency, Speeds
from glmlocal.planner.hits import distinct_experts, expected_wait, hit_rate
from glmlocal.planner.machine import Basis, Gpu, Machine
from glmlocal.planner.plan import CPU, DECODE_CONTEXTS, FIRST_TOKEN_PROMPTS, Forecast, Placement, Rate, Resolved

PREFILL_TOKENS = 2048  # the prompt that the prefill rate is stated for
MOST_DRAFTS = 3
# Chance that the first, second, third draft of a step is kept, all before it too: GLM-5.2, 3 drafts, greedy, llama.cpp
# PR 25980; GLM-4.5-Air with the MTP layer cold (ik_llama PR 1992: 0.838, 0.656, 0.500) is the same to 0.01.
ACCEPTANCE = (0.834, 0.653, 0.494)


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer as it is placed; equal ones are counted, not repeated."""

    layer: Layer
    hit_curve: tuple[float, ...] | None
    device: int
    gpu_experts: int
    ram_experts: int  # homes and slots
    nvme_experts: int
    kv_bytes: int
    attention_flops: int
    index_kv_bytes: int  # of kv_bytes, those that are read for every position whatever the window
    index_flops: int
    kv_numbers: int  # of one position's keys and values, the window's; scales are not counted
    index_kv_numbers: int

    @property
    def near(self) -> float:
        """Chance that an expert is in the fastest tier of this layer."""
        here = self.gpu_experts if self.device != CPU else self._in_ram
        return self._hits(here)

    def near_with(self, hot: float) -> float:
        """The same where only a part of the use that a cache of the hottest makes of them is made: at 0 any experts
        are there, as where engines keep whole layers' on the GPU."""
        share = self.gpu_experts / self.layer.num_experts if self.layer.num_experts else 1.0
        return share + hot * (self.near - share)

    @property
    def there(self) -> float:
        """Chance that an expert need not be read from NVMe."""
        return self._hits(self.gpu_experts + self._in_ram)

    def _hits(self, experts: int) -> float:
        return hit_rate(experts / self.layer.num_experts, self.hit_curve) if self.layer.num_experts else 1.0

    @property
    def _in_ram(self) -> int:
        return min(self.ram_experts, self.layer.num_experts - self.gpu_experts)


@dataclass(slots=True)
class _Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, resource: str, seconds: float) -> None:
        if seconds > 0:
            self.seconds[resource] = self.seconds.get(resource, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def largest_first(self) -> list[tuple[str, float]]:
        return sorted(self.seconds.items(), key=lambda item: -item[1])

    @property
    def bound_by(self) -> str:
        return self.largest_first[0][0]


def forecast(
    footprint: Footprint,
    placement: Placement,
    machine: Machine,
    resolved: Resolved,
    efficiency: Efficiency = DEFAULT,
    *,
    in_brief: bool = False,
) -> Forecast:
    """Decode, prefill and time to first token of one sequence that has the machine to itself, without drafts.

    ``in_brief``: for tables, decode at an empty context and prefill alone.
    """
    model = PlacedModel(footprint, placement, machine, resolved, efficiency)
    contexts = [0] if in_brief else sorted({c for c in DECODE_CONTEXTS if c < resolved.context} | {resolved.context})
    prompts = [] if in_brief else [n for n in FIRST_TOKEN_PROMPTS if n <= resolved.context]
    prefill_tokens = min(PREFILL_TOKENS, resolved.context)
    return Forecast(
        decode_tokens_per_s={context: model.rate(partial(model.decode, context=context)) for context in contexts},
        prefill_tokens_per_s=model.rate(partial(model.prefill, tokens=prefill_tokens), prefill_tokens),
        time_to_first_token_s={n: model.duration(partial(model.prefill, tokens=n)) for n in prompts},
        hit_rate=model.hit_rate,
        hit_rate_basis="modelled" if footprint.hit_curve is None else "measured",
        drafts_tokens_per_s={} if in_brief else model.drafts(),
    )


class PlacedModel:
    """A placed model and the machine: clocks for one decode step and for a prompt."""

    def __init__(
        self, footprint: Footprint, placement: Placement, machine: Machine, resolved: Resolved, efficiency: Efficiency
    ) -> None:
        if resolved.threads != machine.cpu.threads:  # rates of kernels are those of the threads they were measured with
            machine = replace(machine, cpu=replace(machine.cpu, kernels=None, basis="modelled"))
        self.footprint, self.placement, self.machine, self.resolved = footprint, placement, machine, resolved
        self.efficiency = efficiency
        self.speeds = [Speeds(machine, efficiency, guess) for guess in range(GUESSES)]
        self.steps = _steps(footprint, placement, resolved.kv_dtype)
        self.head = [part for part in footprint.top if part.component != "embeddings"]
        # As if every GPU had layers: more memory may spread them over more GPUs, and is not to cost a hop for that.
        self.hops = len(machine.gpus) + 1 if set(placement.layer_device) != {CPU} else 0

    @cached_property
    def mtp(self) -> _Step:
        """The MTP layer of a model that has one."""
        return _mtp_step(self.footprint, self.placement, self.resolved.kv_dtype)

    @property
    def hit_rate(self) -> float | None:
        moe = [(step.near, count) for step, count in self.steps.items() if step.layer.num_experts]
        total = sum(count for _, count in moe)
        mean = sum(near * count for near, count in moe) / total if total else 1.0
        return None if mean >= 1.0 else mean

    def rate(self, clock: Callable[[Speeds], _Clock], tokens: float = 1.0) -> Rate:
        low, value, high = (clock(speeds) for speeds in self.speeds)
        note = " + ".join(f"{what} {seconds * 1e3:.3g} ms" for what, seconds in value.largest_first)
        return Rate(tokens / value.total, tokens / low.total, tokens / high.total, self._basis(), value.bound_by, note)

    def duration(self, clock: Callable[[Speeds], _Clock]) -> Rate:
        slow, value, quick = (clock(speeds) for speeds in self.speeds)
        note = " + ".join(f"{what} {seconds:.3g} s" for what, seconds in value.largest_first)
        return Rate(value.total, quick.total, slow.total, self._basis(), value.bound_by, note)

    def decode(self, speeds: Speeds, context: int, rows: int = 1) -> _Clock:
        """One step of ``rows`` tokens of one sequence (more than one: a verify batch) after ``context`` tokens."""
        clock = _Clock()
        for step, count in self.steps.items():
            if step.device == CPU:
                self._decode_on_cpu(clock, speeds, step, count, context, rows)
            else:
                self._decode_on_gpu(clock, speeds, step, count, context, rows)
        self._around(clock, speeds, rows)
        return clock

    def _decode_on_cpu(self, clock: _Clock, s: Speeds, step: _Step, count: int, context: int, rows: int) -> None:
        for part in step.layer.parts:
            self._add_cpu(clock, s, part, count, part.nbytes, part.params * rows)
        numbers, operations = self._kv_numbers(step, context), self._attention_flops(step, context)
        attention = rows * s.attention(self.resolved.kv_dtype, numbers, operations, in_prefill=False)
        keys = self._kv_read(step, context) / s.cpu_read
        clock.add("cpu arithmetic" if attention > keys else "cpu memory", count * max(attention, keys))
        clock.add("overhead", count * s.layer_s(self.resolved.activations))
        expert = step.layer.expert
        if expert is None:
            return
        wanted = self._experts(step.layer, rows)
        if step.near == 1.0:
            macs = expert.params * rows * self._per_token(step.layer)
            self._add_cpu(clock, s, expert, count, wanted * expert.nbytes, macs)
            return
        compute, resource = self._one_expert(s, step.layer, expert, rows)
        read = expert.nbytes / s.nvme
        longer = expected_wait(wanted, 0.0, step.near, wanted * compute, 0.0, read)
        both = wanted * compute + wanted * (1 - step.near) * read
        shorter = max(0.0, both - longer)  # E[min] = E[a] + E[b] − E[max]
        overlap = s.time(s.e.io_overlap)
        clock.add("nvme" if read * (1 - step.near) > compute else resource, count * longer)
        clock.add("nvme", count * (1 - overlap) * shorter)

    def _decode_on_gpu(self, clock: _Clock, s: Speeds, step: _Step, count: int, context: int, rows: int) -> None:
        gpu = self.machine.gpus[step.device]
        fixed = step.layer.resident_bytes + self._kv_read(step, context)
        clock.add("gpu memory", count * fixed / s.gpu_read(gpu))
        clock.add("overhead", count * s.time(s.e.gpu_layer_s))
        expert = step.layer.expert
        if expert is None:
            return
        wanted = self._experts(step.layer, rows)
        busy = wanted * expert.nbytes / s.gpu_read(gpu)
        near = step.near_with(s.time(s.e.gpu_hot))
        if near == 1.0:
            clock.add("gpu memory", count * busy)
            return
        compute, resource = self._one_expert(s, step.layer, expert, rows)
        read = expert.nbytes / s.nvme
        wait = expected_wait(wanted, near, step.there, busy, compute, read)
        clock.add("gpu memory", count * busy)
        slowest = "nvme" if read * (1 - step.there) > compute * (1 - near) else resource
        clock.add(slowest, count * (wait - busy))
        clock.add("overhead", count * s.time(s.e.sync_s) * (1 - near**wanted))

    def _around(self, clock: _Clock, s: Speeds, rows: int) -> None:
        """The head, hops between devices, and what a step costs outside the model."""
        self._head(clock, s, rows)
        on_cpu = self.placement.head_device == CPU
        clock.add("overhead", (s.token_s if on_cpu else s.time(s.e.gpu_token_s)) + self.hops * s.time(s.e.hop_s))

    def _head(self, clock: _Clock, s: Speeds, rows: int) -> None:
        device = self.placement.head_device
        if device == CPU:
            for part in self.head:
                self._add_cpu(clock, s, part, 1, part.nbytes, part.params * rows)
        else:
            nbytes = sum(part.nbytes for part in self.head)
            clock.add("gpu memory", nbytes / s.gpu_read(self.machine.gpus[device]))

    def prefill(self, speeds: Speeds, tokens: int) -> _Clock:
        """A prompt of so many tokens in chunks, to its first token. Weights count per chunk, attention in all."""
        clock = _Clock()
        chunk = self.resolved.max_num_batched_tokens
        whole, rest = divmod(tokens, chunk)
        for size, times in ((chunk, whole), (rest, 1)):
            if size and times:
                for step, count in self.steps.items():
                    if step.device == CPU:
                        self._prefill_on_cpu(clock, speeds, step, count * times, size)
                    else:
                        self._prefill_on_gpu(clock, speeds, step, count * times, size)
        windowed, everything = self._pairs(tokens), tokens * (tokens + 1) // 2
        for step, count in self.steps.items():
            flops = count * (step.attention_flops * windowed + step.index_flops * everything)
            if step.device == CPU:
                numbers = count * (step.kv_numbers * windowed + step.index_kv_numbers * everything)
                seconds = speeds.attention(self.resolved.kv_dtype, numbers, flops, in_prefill=True)
                clock.add("cpu arithmetic", seconds)
            else:
                clock.add("gpu arithmetic", flops / speeds.gpu_arithmetic(self.machine.gpus[step.device], "bf16"))
        self._around(clock, speeds, 1)
        return clock

    def _prefill_on_cpu(self, clock: _Clock, s: Speeds, step: _Step, count: int, tokens: int) -> None:
        for part in step.layer.parts:
            self._add_cpu(clock, s, part, count, part.nbytes, part.params * tokens)
        clock.add("overhead", count * s.layer_s(self.resolved.activations))
        numbers = tokens * self.footprint.hidden_size
        clock.add("cpu arithmetic", count * numbers * s.row_s(self.resolved.activations))
        if step.layer.expert is None:
            return
        touched = distinct_experts(step.layer.num_experts, self._per_token(step.layer), tokens)
        operations = step.layer.expert.params * tokens * self._per_token(step.layer)
        away = max(0, step.nvme_experts - step.ram_experts) / step.layer.num_experts
        seconds = self._seconds_on_cpu(s, step.layer.expert, touched * step.layer.expert.nbytes, operations)
        reading = touched * away * step.layer.expert.nbytes / s.nvme
        clock.add("nvme", count * max(0.0, reading - max(seconds)))
        clock.add("cpu memory" if seconds[0] > seconds[1] else "cpu arithmetic", count * max(seconds))

    def _prefill_on_gpu(self, clock: _Clock, s: Speeds, step: _Step, count: int, tokens: int) -> None:
        gpu = self.machine.gpus[step.device]
        for part in step.layer.parts:
            self._add_gpu(clock, s, gpu, part, count, part.nbytes, part.params * tokens)
        clock.add("overhead", count * s.time(s.e.gpu_layer_s))
        expert, total = step.layer.expert, step.layer.num_experts
        if expert is None:
            return
        touched = distinct_experts(total, self._per_token(step.layer), tokens)
        operations = expert.params * tokens * self._per_token(step.layer)
        busy = self._add_gpu(clock, s, gpu, expert, count, touched * expert.nbytes, operations)
        if step.near == 1.0:
            return
        missing = touched * (total - step.gpu_experts) / total * expert.nbytes
        away = touched * max(0, step.nvme_experts - step.ram_experts) / total * expert.nbytes
        on_cpu = max(self._seconds_on_cpu(s, expert, missing, operations * (1 - step.near)))
        stream = missing / s.link(gpu)
        slow = {"link" if stream < on_cpu else "cpu arithmetic": min(stream, on_cpu), "nvme": away / s.nvme}
        resource = max(slow, key=lambda name: slow[name])
        clock.add(resource, count * max(0.0, slow[resource] - busy))

    def drafts(self) -> dict[int, Rate]:
        """Decode at context 0 with 1 to 3 MTP drafts per step, at ACCEPTANCE; empty without an MTP layer.

        A step verifies the drafts in one batch, in which the tokens' experts add up, and runs the MTP layer and the
        head once per draft where the last layer is.
        """
        if not self.footprint.holds_mtp or self.resolved.context <= MOST_DRAFTS:
            return {}
        return {
            count: self.rate(partial(self._speculate, drafts=count), 1.0 + sum(ACCEPTANCE[:count]))
            for count in range(1, MOST_DRAFTS + 1)
        }

    def _speculate(self, s: Speeds, drafts: int) -> _Clock:
        clock = self.decode(s, 0, rows=drafts + 1)
        step, mtp = self.mtp, _Clock()
        if step.device == CPU:
            self._decode_on_cpu(mtp, s, step, 1, 0, 1)
        else:
            self._decode_on_gpu(mtp, s, step, 1, 0, 1)
        if all(part.component != "head" for part in step.layer.parts):
            self._head(mtp, s, 1)
        for resource, seconds in mtp.seconds.items():
            clock.add(resource, drafts * seconds)
        return clock

    def _add_cpu(self, clock: _Clock, s: Speeds, part: Part, count: int, nbytes: float, macs: float) -> None:
        memory, arithmetic = self._seconds_on_cpu(s, part, nbytes, macs)
        clock.add("cpu memory" if memory > arithmetic else "cpu arithmetic", count * max(memory, arithmetic))

    def _add_gpu(self, clock: _Clock, s: Speeds, gpu: Gpu, part: Part, count: int, nbytes: float, macs: float) -> float:
        """Seconds of one of ``count``."""
        memory, arithmetic = nbytes / s.gpu_read(gpu), 2 * macs / s.gpu_arithmetic(gpu, part.scheme)
        clock.add("gpu memory" if memory > arithmetic else "gpu arithmetic", count * max(memory, arithmetic))
        return max(memory, arithmetic)

    def _one_expert(self, s: Speeds, layer: Layer, expert: Part, rows: int) -> tuple[float, str]:
        """Seconds that the CPU takes for one of the experts that so many tokens touch, and what binds it."""
        rows_each = rows * self._per_token(layer) / self._experts(layer, rows)
        memory, arithmetic = self._seconds_on_cpu(s, expert, expert.nbytes, expert.params * rows_each)
        return max(memory, arithmetic), "cpu memory" if memory > arithmetic else "cpu arithmetic"

    def _seconds_on_cpu(self, s: Speeds, part: Part, nbytes: float, macs: float) -> tuple[float, float]:
        """Reading and computing."""
        is_integer = part.is_integer and self.resolved.activations == "int8"
        weights = part.params * nbytes / part.nbytes if part.nbytes else 0.0
        rows = macs / weights if weights else 1.0
        return s.product(part.scheme, nbytes, weights, rows, is_integer=is_integer)

    def _per_token(self, layer: Layer) -> int:
        return min(self.footprint.num_experts_per_tok, layer.num_experts)

    def _experts(self, layer: Layer, rows: int) -> float:
        """Distinct experts that so many tokens touch."""
        return distinct_experts(layer.num_experts, self._per_token(layer), rows)

    def _positions(self, context: int) -> int:
        """That a query attends to, itself among them."""
        window = self.footprint.attention_window
        return context + 1 if window is None else min(context + 1, window)

    def _kv_read(self, step: _Step, context: int) -> int:
        """Bytes of the cache that a query reads."""
        return (step.kv_bytes - step.index_kv_bytes) * self._positions(context) + step.index_kv_bytes * (context + 1)

    def _kv_numbers(self, step: _Step, context: int) -> int:
        """Numbers of the cache that a query meets."""
        return step.kv_numbers * self._positions(context) + step.index_kv_numbers * (context + 1)

    def _attention_flops(self, step: _Step, context: int) -> int:
        return step.attention_flops * self._positions(context) + step.index_flops * (context + 1)

    def _pairs(self, tokens: int) -> int:
        """Of queries and positions in a prompt."""
        window = min(self.footprint.attention_window or tokens, tokens)
        return window * (window + 1) // 2 + (tokens - window) * window

    def _basis(self) -> Basis:
        """Measured where every rate that is used is."""
        place, machine = self.placement, self.machine
        used = [machine.gpus[i].basis for i in set(place.layer_device) if i != CPU]
        if CPU in place.layer_device or any(place.ram_experts) or any(place.nvme_experts):
            used += [machine.ram.basis, machine.cpu.basis]
        if any(place.nvme_experts) and machine.nvme is not None:
            used.append(machine.nvme.basis)
        return "modelled" if "modelled" in used else "measured"


def _steps(footprint: Footprint, placement: Placement, kv_dtype: str) -> dict[_Step, int]:
    """The layers as they are placed, and how many are alike."""
    layers = {id(layer): layer for layer in footprint.layers}  # alike ones are mostly one: told apart without a look
    steps: dict[_Step, int] = {}
    for (layer, *rest), count in Counter(_placed(footprint, placement, kv_dtype)).items():
        step = _Step(layers[layer], footprint.hit_curve, *rest)
        steps[step] = steps.get(step, 0) + count
    return steps


def _placed(footprint: Footprint, placement: Placement, kv_dtype: str) -> list[tuple[int, ...]]:
    """For each decoder layer its id and what a _Step has from ``device`` on."""
    num_layers, kv = len(footprint.layers), footprint.kv_bytes[kv_dtype]
    nothing = (0,) * num_layers
    index_kv, index_flops = footprint.index_kv_bytes.get(kv_dtype, nothing), footprint.index_flops or nothing
    index_numbers = [nbytes // 2 for nbytes in footprint.index_kv_bytes.get("bf16", nothing)]
    numbers = [nbytes // 2 - own for nbytes, own in zip(footprint.kv_bytes["bf16"], index_numbers, strict=True)]
    in_ram = [homes + slots for homes, slots in zip(placement.ram_experts, placement.ram_slots, strict=True)]
    columns = (map(id, footprint.layers), placement.layer_device, placement.gpu_experts, in_ram, placement.nvme_experts)
    more = (kv, footprint.attention_flops, index_kv, index_flops, numbers, index_numbers)
    return list(zip(*columns, *more, strict=False))  # a placement may have the MTP layer behind these


def _mtp_step(footprint: Footprint, placement: Placement, kv_dtype: str) -> _Step:
    """The MTP layer as it is placed, or as it would be: all of it beside the last layer."""
    layer, last = footprint.mtp, len(footprint.layers)
    assert layer is not None
    _, *rest = _placed(footprint, placement, kv_dtype)[-1]
    like = _Step(footprint.layers[-1], footprint.hit_curve, *rest)  # its attention is that of the decoder layers
    device = placement.layer_device[-1]
    if len(placement.layer_device) > last:
        gpu, nvme = placement.gpu_experts[last], placement.nvme_experts[last]
        ram = placement.ram_experts[last] + placement.ram_slots[last]
    else:
        gpu, ram, nvme = (0, layer.num_experts, 0) if device == CPU else (layer.num_experts, 0, 0)
    kv = footprint.mtp_kv_bytes[kv_dtype]
    return replace(like, layer=layer, device=device, gpu_experts=gpu, ram_experts=ram, nvme_experts=nvme, kv_bytes=kv)
