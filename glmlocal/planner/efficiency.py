"""What part of a device's peak rates is reached: every constant of the forecast, with where it comes from. Torch-free.

Each is a guess in threes (pessimistic, expected, optimistic), so that every rate becomes a range.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmlocal.planner.machine import Gpu, Machine

GUESSES = 3
Guess = tuple[float, float, float]  # pessimistic, expected, optimistic


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What part of a peak is reached, and the times that no peak explains.

    CPU: this runtime's kernels on two cores of Zen 5 (docs/benchmarks.md). GPU: no kernel of ours has run on one yet;
    60 to 85 % of bandwidth is what serving stacks publish for decode (MBU), a third to two thirds of dense peak
    for prefill. ``_s``: seconds.
    """

    cpu_read: Guess = (0.72, 0.80, 0.85)  # native calls of a decode step over read bandwidth
    cpu_int8: Guess = (0.44, 0.50, 0.55)  # prefill of 512 to 2048 tokens over the int8 peak, attention not counted
    cpu_fp32: Guess = (0.45, 0.55, 0.70)  # products in fp32 over the multiply-add peak
    cpu_attention_decode: Guess = (0.45, 0.60, 0.70)  # of the fp32 peak: 12 query heads share a key
    cpu_attention_prefill: Guess = (0.60, 1.00, 1.30)  # of the fp32 peak; above 1 with bf16 dot products
    cpu_layer_s: Guess = (60e-6, 40e-6, 25e-6)  # three native calls and Python between them
    cpu_token_s: Guess = (3e-3, 2e-3, 1.5e-3)  # embedding row, sampling 151,552 logits, detokenizing, scheduling
    gpu_read: Guess = (0.50, 0.65, 0.80)
    gpu_arithmetic: Guess = (0.25, 0.40, 0.60)
    gpu_layer_s: Guess = (100e-6, 50e-6, 25e-6)  # launches of about ten kernels without a CUDA graph
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
        nvme = machine.nvme
        self.nvme = nvme.read_gb_per_s * e.nvme_read[guess] * unsure[nvme.basis] * 1e9 if nvme else 1e-9

    def time(self, guess: Guess) -> float:
        return guess[self.guess]

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
