"""What part of a device's peak rates is reached: every constant of the forecast, with where it comes from. Torch-free.

Each is a guess in threes (pessimistic, expected, optimistic), so that every rate becomes a range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from glmlocal.formats.forms import FORMS
from glmlocal.machine.kernel_rates import KernelRates
from glmlocal.planner.machine import Gpu, Machine

GUESSES = 3
EXPECTED = 1  # of them, the one between the others
Guess = tuple[float, float, float]  # pessimistic, expected, optimistic


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What part of a peak is reached, and the times that no peak explains.

    CPU: this runtime's kernels on two cores of Zen 5 (docs/benchmarks.md), for machines that doctor has not examined;
    where it has, the kernels' own rates take the place of ``cpu_*``, and ``measured`` is their range. GPU: no kernel of
    ours has run on one yet; 60 to 85 % of bandwidth is what serving stacks publish for decode (MBU), a third to two
    thirds of dense peak for prefill. ``_s``: seconds.
    """

    cpu_read: Guess = (0.72, 0.80, 0.85)  # native calls of a decode step over read bandwidth
    cpu_int8: Guess = (0.44, 0.50, 0.55)  # prefill of 512 to 2048 tokens over the int8 peak, attention not counted
    cpu_fp32: Guess = (0.45, 0.55, 0.70)  # products in fp32 over the multiply-add peak
    cpu_attention_decode: Guess = (0.45, 0.60, 0.70)  # of the fp32 peak: 12 query heads share a key
    cpu_attention_prefill: Guess = (0.60, 1.00, 1.30)  # of the fp32 peak; above 1 with bf16 dot products
    cpu_layer_s: Guess = (60e-6, 40e-6, 25e-6)  # three native calls and Python between them
    cpu_token_s: Guess = (3e-3, 2e-3, 1.5e-3)  # embedding row, sampling 151,552 logits, detokenizing, scheduling
    measured: Guess = (0.87, 1.00, 1.13)  # of the kernels' rates: what judging on other shapes leaves to doubt
    gpu_read: Guess = (0.50, 0.65, 0.85)
    gpu_arithmetic: Guess = (0.12, 0.25, 0.45)
    gpu_layer_s: Guess = (100e-6, 50e-6, 25e-6)  # launches of about ten kernels without a CUDA graph
    gpu_hot: Guess = (0.0, 1.0, 1.0)  # of what a cache of the hottest experts finds beyond any experts (``hits.py``)
    gpu_token_s: Guess = (2e-3, 1e-3, 0.5e-3)
    sync_s: Guess = (60e-6, 30e-6, 15e-6)  # a layer whose misses the CPU computes: there and back
    hop_s: Guess = (40e-6, 20e-6, 10e-6)  # a token's activations from one device to the next
    link: Guess = (0.80, 0.90, 1.00)  # of Gpu.link_gb_per_s, which is already what is reached in practice
    nvme_read: Guess = (0.75, 0.85, 0.95)  # random records of some MiB over the rate of doctor's
    io_overlap: Guess = (0.5, 0.8, 0.95)  # of the shorter of computing and reading that the longer one hides
    unmeasured: Guess = (0.75, 1.00, 1.25)  # CPU, RAM and NVMe rates that nobody measured


DEFAULT = Efficiency()


class Speeds:
    """Rates of one guess: bytes and operations per second."""

    def __init__(self, machine: Machine, efficiency: Efficiency, guess: int) -> None:
        e, cpu = efficiency, machine.cpu
        unsure = {basis: 1.0 for basis in ("measured", "exact")} | {"modelled": e.unmeasured[guess]}
        ram, arithmetic = unsure[machine.ram.basis] * 1e9, unsure[cpu.basis] * 1e9
        self.machine, self.guess, self.e = machine, guess, efficiency
        self.cpu_read = machine.ram.read_gb_per_s * e.cpu_read[guess] * ram
        self.cpu_fp32 = cpu.fp32_gflop_per_s * e.cpu_fp32[guess] * arithmetic
        self.cpu_int8 = (cpu.int8_gop_per_s or 0.0) * e.cpu_int8[guess] * arithmetic or self.cpu_fp32
        self.attention_decode = cpu.fp32_gflop_per_s * e.cpu_attention_decode[guess] * arithmetic
        self.attention_prefill = cpu.fp32_gflop_per_s * e.cpu_attention_prefill[guess] * arithmetic
        self.token_s = e.cpu_token_s[guess]
        self.kernels = cpu.kernels
        if cpu.kernels is not None:
            self.token_s = cpu.kernels.token_s / e.measured[guess]
        nvme = machine.nvme
        self.nvme = nvme.read_gb_per_s * e.nvme_read[guess] * unsure[nvme.basis] * 1e9 if nvme else 1e-9

    def time(self, guess: Guess) -> float:
        return guess[self.guess]

    def product(
        self, scheme: str, nbytes: float, weights: float, rows: float, *, is_integer: bool
    ) -> tuple[float, float]:
        """Seconds of reading and of computing a product on the CPU; where kernels were measured, one of them is 0."""
        measured = None if self.kernels is None else _weight_s(self.kernels, scheme, rows, is_integer)
        if measured is None:
            arithmetic = self.cpu_int8 if is_integer else self.cpu_fp32
            return nbytes / self.cpu_read, 2 * weights * rows / arithmetic
        seconds_each, is_memory_bound = measured
        seconds = weights * seconds_each / self.e.measured[self.guess]
        return (seconds, 0.0) if is_memory_bound else (0.0, seconds)

    def layer_s(self, activations: str) -> float:
        """Seconds of a layer on the CPU, beside products and attention."""
        if self.kernels is not None:
            return self.kernels.layer_s[activations] / self.e.measured[self.guess]
        return self.e.cpu_layer_s[self.guess]

    def row_s(self, activations: str) -> float:
        """Seconds of a layer for each number of each hidden state of a chunk, beside products and attention."""
        if self.kernels is None:
            return 0.0
        return self.kernels.row_s[activations] / self.e.measured[self.guess]

    def attention(self, kv_dtype: str, numbers: float, operations: float, *, in_prefill: bool) -> float:
        """Seconds of attention on the CPU over so many numbers of a cache of that dtype, with so many operations."""
        if self.kernels is not None:
            found = (self.kernels.attention_prefill if in_prefill else self.kernels.attention_decode).get(kv_dtype)
            if found is not None:
                return found.seconds(numbers, operations) / self.e.measured[self.guess]
        return operations / (self.attention_prefill if in_prefill else self.attention_decode)

    def gpu_read(self, gpu: Gpu) -> float:
        return gpu.read_gb_per_s * self.e.gpu_read[self.guess] * 1e9

    def gpu_arithmetic(self, gpu: Gpu, scheme: str) -> float:
        """FP8 weights meet FP8 activations where the GPU can; everything else is widened to bf16."""
        peak = gpu.bf16_tflop_per_s
        if scheme.startswith("fp8") and gpu.fp8_tflop_per_s is not None:
            peak = max(peak, gpu.fp8_tflop_per_s)
        return peak * self.e.gpu_arithmetic[self.guess] * 1e12

    def link(self, gpu: Gpu) -> float:
        return gpu.link_gb_per_s * self.e.link[self.guess] * 1e9


@lru_cache(maxsize=1 << 14)
def _class_rates(scheme: str) -> tuple[str, ...]:
    """The measured schemes that stand for one; several for an expert whose matrices differ, one for each matrix."""
    parts = [kernel_class(part) for part in scheme.split(" + ")]
    return (parts[0], parts[0], parts[1]) if len(parts) == 2 else tuple(parts)


def _weight_s(kernels: KernelRates, scheme: str, rows: float, is_integer: bool) -> tuple[float, bool] | None:
    """Seconds per weight of a product with so many rows, and is it bound by memory; None: nothing like it is known."""
    found = [kernels.product(name, "int8" if is_integer else "fp32") for name in _class_rates(scheme)]
    rates = [rate for rate in found if rate is not None]
    if len(rates) < len(found):
        return None
    seconds = sum(1 / rate.at(rows) for rate in rates) / len(rates)
    return seconds, all(rate.is_memory_bound(rows) for rate in rates)


def kernel_class(scheme: str) -> str:
    """Which of the schemes that doctor measures runs like this one: as many bits, levels of scales, and offsets."""
    form = FORMS.get(scheme)
    if form is None:
        return scheme  # of which nothing was measured
    if form.scheme is None:
        return "f32" if scheme == "f32" else "bf16"
    if form.scheme.code_type == "e4m3":
        return "fp8_block128"
    if form.scheme.bits == 4:
        if form.scheme.scale_codec == "two_level":
            return "Q4_K"
        return "Q4_0" if form.scheme.offset_codec == "symmetric" else "Q4_1"
    return {2: "Q2_K", 3: "Q3_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}[form.scheme.bits]
