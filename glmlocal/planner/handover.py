"""Outgrowing one machine: the command that starts vLLM or SGLang with a GLM on that hardware.

The flags are those of the official recipes, looked up in November 2026; docs/plan.md names each:

    zai-org/GLM-4.5 README.md            parsers, MTP 3/1/4, --mem-fraction-static 0.7 (0.8 for GLM-4.7),
                                         --disable-shared-experts-fusion for FP8 4.5 and 4.6, --cpu-offload-gb 16
    zai-org/GLM-5 README.md              glm47 parser, --mem-fraction-static 0.85
    vllm-project/recipes GLM.md, GLM5.md --speculative-config.*: 1 draft for 4.x, 3 for 5 and 5.1, 5 for 5.2, whose
                                         recipe also has --kv-cache-dtype fp8_e4m3

What the recipes leave to their reader is computed here: the tensor parallel size, whether the weights fit, and the
context that is left for them. glmlocal cannot try these commands; sizes are modelled.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from glmlocal.errors import ConfigError
from glmlocal.planner.machine import Gpu, Machine
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB, MIB, format_bytes

Engine = Literal["vllm", "sglang"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
FORMATS = ("bf16", "fp8_channel", "fp8_block128", "gptq", "awq", "compressed_tensors")  # that both engines load

# Groups of 128 weights must not be cut either, and 1408 and 1536 wide experts cannot be shared out in whole groups: the
# GPUs get whole experts, as QuantTrio's model cards have it.
_GROUPED = ("gptq", "awq", "compressed_tensors")

GPUS_PER_NODE = 8
_VLLM_FRACTION = 0.9  # --gpu-memory-utilization's default: weights, KV and activations together
_SGLANG_FRACTION = {"GLM-4.5": 0.7, "GLM-4.7": 0.8, "GLM-5": 0.85}  # --mem-fraction-static: weights and KV
_SGLANG_MOST = 0.9  # as docs.sglang.io has it for GLM-4.6: where the recipe's leaves no room
# What vLLM profiles beside weights and KV: activations of 8192 tokens, NCCL and CUDA graphs; 2 to 4 GiB in its logs.
_VLLM_BUFFERS_BYTES = 3 * GIB
_LEAST_TOKENS = 8192  # of KV, or the server is not worth starting
_OFFLOAD_STEP_GIB = 4
_EXPERT_WIDTH_IN_BLOCKS = 2048 // 128  # of GLM-5, the family with such weights
_MOST_OFFLOAD = 0.5  # of a GPU's weights: beyond, every step waits for the link


@dataclass(frozen=True, slots=True)
class Served:
    """What must be known of a release."""

    repository: str  # "zai-org/GLM-4.5-Air-FP8"
    family: str  # "GLM-4.5-Air"
    format: str  # of FORMATS; anything else is refused
    weights_bytes: int  # MTP included
    kv_bytes_per_token: int  # at 16 bits, all layers
    kv_heads: int  # 1: a latent that every GPU keeps whole, as GLM-5's
    num_attention_heads: int
    max_position_embeddings: int
    has_mtp: bool = True

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The GPUs that are used, and what each of them holds."""

    gpu: Gpu
    size: int  # tensor parallel
    unused: int  # GPUs of the machine that take no part
    offload_gib: int  # of each GPU
    context: int | None  # tokens, where the model's limit is too many or the user wants another
    fraction: float


def launch_command(engine: Engine, served: Served, machine: Machine, wants: Wants) -> str:
    """Lines for a shell: comments, then the command. Raises ConfigError where the hardware cannot run it."""
    _check(engine, served, machine, wants)
    layout = _layout(engine, served, machine, wants)
    nodes = 1 if machine.is_this_machine else math.ceil(layout.size / GPUS_PER_NODE)
    words = _vllm(served, layout, wants) if engine == "vllm" else _sglang(served, layout, wants)
    lines = [f"# {comment}" for comment in _comments(engine, served, layout, nodes)]
    return "\n".join([*lines, " \\\n  ".join([*words, *_node_words(engine, nodes)])])


def tensor_parallel_sizes(served: Served, most: int) -> tuple[int, ...]:
    """Powers of two that divide the attention heads, largest first; blocks of 128 weights are not divided."""
    if served.format == "fp8_block128":
        most = min(most, _EXPERT_WIDTH_IN_BLOCKS)
    sizes = [
        1 << exponent for exponent in range(most.bit_length()) if served.num_attention_heads % (1 << exponent) == 0
    ]
    return tuple(reversed(sizes))


def _check(engine: str, served: Served, machine: Machine, wants: Wants) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"--engine is {engine[:40]!r}, wanted {' or '.join(ENGINES)}")
    if served.format not in FORMATS:
        raise ConfigError(
            f"{engine} does not serve {served.name}, which is {served.format}; take the FP8 release of {served.family}"
        )
    if not machine.gpus:
        raise ConfigError(
            f"{engine} needs GPUs and this machine has none; describe some, for example --gpus 8xH100, or run "
            f"{served.name} with glmlocal"
        )
    if wants.kv_dtype not in ("auto", "bf16", "fp8"):
        raise ConfigError(f"{engine} has no --kv-dtype {wants.kv_dtype}; give auto, bf16 or fp8")
    if wants.context is not None and wants.context > served.max_position_embeddings:
        raise ConfigError(
            f"--context {wants.context} is more than the {served.max_position_embeddings} of {served.family}"
        )


def _layout(engine: Engine, served: Served, machine: Machine, wants: Wants) -> _Layout:
    """The most GPUs of one kind that share the model evenly, and what they leave for it."""
    kinds = Counter(machine.gpus)
    gpu = max(kinds, key=lambda kind: kind.memory_bytes * kinds[kind])
    size = tensor_parallel_sizes(served, kinds[gpu])[0]
    memory = min(gpu.memory_bytes, wants.vram_bytes or gpu.memory_bytes)
    weights = served.weights_bytes / size
    least_kv = _kv_bytes(served, wants, size) * min(_LEAST_TOKENS, wants.context or _LEAST_TOKENS)
    fraction = _fraction(engine, served, memory, weights + least_kv)
    room = memory * fraction - (_VLLM_BUFFERS_BYTES if engine == "vllm" else 0)
    missing = weights + least_kv - room
    offload_gib = _offload_gib(engine, served, gpu, size, missing, weights, wants)
    tokens = int((room - weights + offload_gib * GIB) / _kv_bytes(served, wants, size))
    if wants.context is not None and wants.context > tokens:
        raise ConfigError(
            f"{size}× {gpu.name} leave room for {tokens} tokens beside {served.name}, not for the {wants.context} of "
            "--context; give fewer, --kv-dtype fp8, or more GPUs"
        )
    limit = served.max_position_embeddings
    context = wants.context or (tokens // 1024 * 1024 if tokens < limit else None)
    return _Layout(gpu, size, len(machine.gpus) - size, offload_gib, context, fraction)


def _kv_bytes(served: Served, wants: Wants, size: int) -> float:
    """KV of one token on one GPU: heads are shared out until each GPU has one, a latent is kept whole by all."""
    width = 0.5 if _kv_words(served, wants) else 1.0
    return served.kv_bytes_per_token * width / min(size, served.kv_heads)


def _fraction(engine: Engine, served: Served, memory: int, needed: float) -> float:
    if engine == "vllm":
        return _VLLM_FRACTION
    recipe = next((f for family, f in _SGLANG_FRACTION.items() if served.family.startswith(family)), 0.7)
    return recipe if needed <= recipe * memory else _SGLANG_MOST


def _offload_gib(
    engine: Engine, served: Served, gpu: Gpu, size: int, missing: float, weights: float, wants: Wants
) -> int:
    """GiB of each GPU's weights that go to the host: as asked, else what is missing. Raises ConfigError."""
    asked = wants.cpu_offload_bytes
    if missing <= 0 and not asked:
        return 0
    needed = math.ceil(max(missing, 0) / GIB / _OFFLOAD_STEP_GIB) * _OFFLOAD_STEP_GIB
    if engine == "vllm" and asked is not None and asked >= missing:
        return round(asked / GIB)
    if engine == "vllm" and asked is None and wants.offload and needed * GIB <= _MOST_OFFLOAD * weights:
        return needed
    if missing <= 0:
        raise ConfigError("--cpu-offload-gb is vLLM's alone, and SGLang needs none here; leave it out")
    would = f"{_enough(served, gpu, wants)}× {gpu.name} would hold it"
    if engine == "vllm" and needed * GIB <= _MOST_OFFLOAD * weights:
        would = f"--cpu-offload-gb {needed} (with {needed * size} GiB of free host memory), or {would}"
    raise ConfigError(
        f"{served.name} does not fit {size}× {gpu.name} under {engine}: each lacks {format_bytes(missing)}; {would}"
    )


def _enough(served: Served, gpu: Gpu, wants: Wants) -> int:
    """The least power of two of such GPUs that holds weights, a short context and the engine's buffers."""
    for size in reversed(tensor_parallel_sizes(served, 1 << 10)):
        each = served.weights_bytes / size + _kv_bytes(served, wants, size) * _LEAST_TOKENS + _VLLM_BUFFERS_BYTES
        if each <= gpu.memory_bytes * _VLLM_FRACTION:
            return size
    return math.ceil(served.weights_bytes / (gpu.memory_bytes * _VLLM_FRACTION / 2))


def _vllm(served: Served, layout: _Layout, wants: Wants) -> Iterator[str]:
    yield f"vllm serve {shlex.quote(served.repository)}"
    yield f"--tensor-parallel-size {layout.size}"
    if served.format in _GROUPED:
        yield "--enable-expert-parallel"
    if kv_dtype := _kv_words(served, wants):
        yield f"--kv-cache-dtype {kv_dtype}"
    drafts = _vllm_drafts(served.family) if wants.draft is None else wants.draft
    if served.has_mtp and drafts:
        yield "--speculative-config.method mtp"
        yield f"--speculative-config.num_speculative_tokens {drafts}"
    yield from _parsers(served.family)
    yield "--enable-auto-tool-choice"
    if layout.offload_gib:
        yield f"--cpu-offload-gb {layout.offload_gib}"
    if layout.context is not None:
        yield f"--max-model-len {layout.context}"
    if wants.batch != Wants().batch:
        yield f"--max-num-seqs {wants.batch}"
    if wants.vram_bytes is not None:
        yield f"--gpu-memory-utilization {_utilization(layout, wants)}"
    yield f"--served-model-name {shlex.quote(served.name.lower())}"


def _sglang(served: Served, layout: _Layout, wants: Wants) -> Iterator[str]:
    yield "python3 -m sglang.launch_server"
    yield f"--model-path {shlex.quote(served.repository)}"
    yield f"--tp-size {layout.size}"
    if served.format in _GROUPED:
        yield f"--ep-size {layout.size}"
    if kv_dtype := _kv_words(served, wants):
        yield f"--kv-cache-dtype {kv_dtype}"
    yield from _parsers(served.family)
    steps = 3 if wants.draft is None else wants.draft
    if served.has_mtp and steps:
        yield "--speculative-algorithm EAGLE"
        yield f"--speculative-num-steps {steps}"
        yield "--speculative-eagle-topk 1"
        yield f"--speculative-num-draft-tokens {steps + 1}"
    yield f"--mem-fraction-static {_utilization(layout, wants)}"
    if served.format.startswith("fp8") and served.family.startswith(("GLM-4.5", "GLM-4.6")):
        yield "--disable-shared-experts-fusion"
    if wants.context is not None:
        yield f"--context-length {wants.context}"
    if wants.batch != Wants().batch:
        yield f"--max-running-requests {wants.batch}"
    yield f"--served-model-name {shlex.quote(served.name.lower())}"
    yield "--host 0.0.0.0"
    yield "--port 8000"


def _utilization(layout: _Layout, wants: Wants) -> float:
    """The fraction of the card that the limit leaves, rounded down."""
    limit = min(layout.gpu.memory_bytes, wants.vram_bytes or layout.gpu.memory_bytes)
    return math.floor(layout.fraction * limit / layout.gpu.memory_bytes * 1000 + 1e-6) / 1000


def _kv_words(served: Served, wants: Wants) -> str | None:
    """Both engines call it fp8_e4m3; None is their default, 16 bits."""
    wanted = wants.kv_dtype == "fp8" or (wants.kv_dtype == "auto" and served.family == "GLM-5.2")
    return "fp8_e4m3" if wanted else None


def _vllm_drafts(family: str) -> int:
    return 5 if family == "GLM-5.2" else 3 if family.startswith("GLM-5") else 1


def _parsers(family: str) -> Iterator[str]:
    yield f"--tool-call-parser {'glm45' if family.startswith(('GLM-4.5', 'GLM-4.6')) else 'glm47'}"
    yield "--reasoning-parser glm45"


def _node_words(engine: Engine, nodes: int) -> Iterator[str]:
    if nodes == 1:
        return
    yield f"--nnodes {nodes}"
    yield "--node-rank 0"
    yield "--master-addr HEAD_ADDRESS" if engine == "vllm" else "--dist-init-addr HEAD_ADDRESS:20000"


def _comments(engine: Engine, served: Served, layout: _Layout, nodes: int) -> Iterator[str]:
    gpu, each = layout.gpu, served.weights_bytes / layout.size
    yield (
        f"{served.name} on {layout.size}× {gpu.name}: {format_bytes(each)} of weights on each of "
        f"{format_bytes(round(gpu.memory_bytes / MIB) * MIB)} (modelled, not tried)"
    )
    if layout.unused:
        yield f"{layout.unused} further GPUs take no part: tensor parallelism wants a power of two of one kind"
    if nodes > 1:
        other = "--node-rank 1 --headless" if engine == "vllm" else "--node-rank 1"
        others = "the other" if nodes == 2 else f"the {nodes - 1} others"
        yield (
            f"{nodes} nodes of {GPUS_PER_NODE} GPUs: this is the head's command, at HEAD_ADDRESS; on {others} the same "
            f"with {other}{'' if nodes == 2 else ', 2, …'}"
        )
    if layout.offload_gib:
        yield (
            f"{layout.offload_gib} GiB of each GPU's weights live in the host's memory, "
            f"{layout.offload_gib * layout.size} GiB in all: slow; twice the GPUs need none of it"
        )
    if layout.context is not None and layout.context < served.max_position_embeddings:
        yield f"room for a context of {layout.context} tokens; the model's limit is {served.max_position_embeddings}"
    if served.format.startswith("fp8") and gpu.fp8_tflop_per_s is None:
        yield f"{gpu.name} has no FP8 units: weights are widened while they are read, which is slower"
