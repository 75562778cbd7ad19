"""Footprints, GPUs and machines for the planner's tests, written down by hand from configs and datasheets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from glmlocal.models.footprint import Footprint, Layer, Part
from glmlocal.planner.hardware import parse_ram
from glmlocal.planner.machine import Cpu, Gpu, Machine, Nvme, Ram
from glmlocal.planner.plan import Plan, Wants
from glmlocal.planner.solve import plan
from glmlocal.units import GIB, MIB

H100 = Gpu("H100", 81559 * MIB, 3350, 50, 989, 1979, 1979)
H200 = Gpu("H200", 143771 * MIB, 4800, 50, 989, 1979, 1979)
RTX4090 = Gpu("RTX4090", 24564 * MIB, 1008, 25, 165, 660, 330)
RTX3090 = Gpu("RTX3090", 24576 * MIB, 936, 25, 71, 284, None)


def machine(*gpus: Gpu, ram_gib: float = 24, ram_gb_per_s: float = 60, nvme: Nvme | None = None) -> Machine:
    """16 cores of an AVX-512 desktop, nothing of it measured."""
    nbytes = int(ram_gib * GIB)
    return Machine(gpus, Cpu("test", 16, 1500.0, 6000.0), Ram(nbytes, nbytes, ram_gb_per_s), nvme)


def footprint(
    name: str,
    *,
    scheme: str = "bf16",
    bits: float = 16,
    layers: int = 46,
    dense: int = 1,
    hidden: int = 4096,
    intermediate: int = 10944,
    moe: int = 1408,
    experts: int = 128,
    context: int = 131072,
    vocab: int = 151552,
    quant: str = "keep",
    has_mtp: bool = True,
) -> Footprint:
    """A GLM-4.x with 96 heads and 8 kv heads of 128, all linear weights but router and head in ``scheme``."""

    def part(component: str, params: int, scheme: str = scheme, bits: float = bits) -> Part:
        nbytes = int(params * bits / 8)
        return Part(component, scheme, params, nbytes, nbytes, is_integer=scheme.startswith("int"))

    def moe_layer(*more: Part) -> Layer:
        router = (part("router", experts * (hidden + 1), "f32", 32), part("shared", 3 * hidden * moe))
        return Layer((attention, norms, *router, *more), part("routed", 3 * hidden * moe), experts)

    attention = part("attention", hidden * (2 * 12288 + 2 * 1024))
    norms = part("norms", 2 * hidden + 12288 + 2048, "f32", 32)
    head = part("head", vocab * hidden, "bf16", 16)
    embeddings = Part("embeddings", "bf16", vocab * hidden, vocab * hidden * 2, 0)
    dense_layer = Layer((attention, norms, part("dense", 3 * hidden * intermediate)))
    kv = {"fp32": 8192, "bf16": 4096, "fp8": 2048, "int8": 2112}
    mtp = moe_layer(part("mtp", 2 * hidden * hidden, "bf16", 16), embeddings, head) if has_mtp else None
    all_layers = (dense_layer,) * dense + (moe_layer(),) * (layers - dense)
    made = Footprint(
        name=name,
        quant=quant,
        top=(embeddings, part("norms", hidden, "f32", 32), head),
        layers=all_layers,
        mtp=mtp,
        num_experts_per_tok=min(8, experts),
        hidden_size=hidden,
        vocab_size=vocab,
        max_position_embeddings=context,
        kv_bytes={dtype: (nbytes,) * layers for dtype, nbytes in kv.items()},
        mtp_kv_bytes=kv,
        attention_flops=(4 * 96 * 128,) * layers,
        attention_window=None,
        file_bytes=0,
        is_exact=True,
    )
    return made


def air(scheme: str = "bf16", bits: float = 16, **more: object) -> Footprint:
    return footprint("GLM-4.5-Air", scheme=scheme, bits=bits, **more)  # type: ignore[arg-type]


def glm45(scheme: str = "bf16", bits: float = 16, **more: object) -> Footprint:
    shape = {"layers": 92, "dense": 3, "hidden": 5120, "intermediate": 12288, "moe": 1536, "experts": 160}
    return footprint("GLM-4.5", scheme=scheme, bits=bits, **shape, **more)  # type: ignore[arg-type]


def follow(model: Footprint, hardware: Machine, wants: Wants, option: str, others: Sequence[Footprint] = ()) -> Plan:
    """What happens when somebody types the advice behind the same command."""
    words = option.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name == "--cpu-offload-gb":
            wants = replace(wants, cpu_offload_bytes=int(value) * GIB, offload=True)
        elif name == "--ram":
            hardware = replace(hardware, ram=parse_ram(value))
            wants = replace(wants, ram_bytes=None)
        elif name == "--gpus":
            hardware = replace(hardware, gpus=hardware.gpus[:1] * int(value.split("x")[0]))
        elif name == "--quant":
            model = next(each for each in others if each.quant == value)
        else:
            key = {"--context": "context", "--kv-dtype": "kv_dtype", "--batch": "batch", "--draft": "draft"}[name]
            wants = replace(wants, **{key: value if key == "kv_dtype" else int(value)})
    return plan(model, hardware, wants)


def planned_bytes(footprint: Footprint) -> dict[str, int]:
    """What a footprint says is held, in the words of ``models.held``."""
    counts: Counter[str] = Counter()

    def add(parts: Iterable[Part], prefix: str = "") -> None:
        for part in parts:
            counts[prefix + ("weights" if part.component == "mtp" else part.component)] += part.nbytes

    def layer(one: Layer, prefix: str = "") -> None:
        add(one.parts, prefix)
        if one.expert is not None:
            counts[f"{prefix}routed experts"] += one.expert.nbytes * one.num_experts

    add(footprint.top)
    for one in footprint.layers:
        layer(one)
    if footprint.mtp is not None:
        layer(footprint.mtp, "MTP ")
    return {name: count for name, count in counts.items() if count}
