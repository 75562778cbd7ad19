"""The ops that models are made of: one function per op, whatever runs it.

Shapes, dtypes and meaning are those of ``reference.py``. Weights packed by ``pack`` run on the native CPU kernels where
those are built (``cpu/``), and in plain torch where they are not; both give the same numbers within

    linear, swiglu_ffn, experts_ffn     4 · 2^-24 · sqrt(in_features) · |x| · |w|, the rounding of fp32 sums, where x is
                                        what int8 activations make of it (``reference.int8_rounded``)
    rms_norm, rope_store_               1e-6 of the largest value
    paged_attention                     1e-5 relative; where the CPU has AVX512_BF16 and the cache is not fp32, queries
                                        and probabilities are rounded to bf16 first, 2^-9 to 2^-8 of themselves
    router_topk                         the same experts unless two scores tie to 1e-6

and the native ones give the same bits for a row whatever batch it is part of and however many threads run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from glmlocal.kernels import cpu
from glmlocal.kernels.blocks import AttentionBlock, BlockOutput, LayerCache, Router, StepIndex
from glmlocal.kernels.reference import MatrixRows

# The signatures are the reference's in both cases, so that is what a type checker is shown.
if TYPE_CHECKING or not cpu.available:
    from glmlocal.kernels.reference import (
        BoundAttention,
        BoundCache,
        BoundStep,
        ExpertWeights,
        Weight,
        attention_block,
        bind_attention,
        bind_cache,
        bind_experts,
        bind_record,
        bind_step,
        combine,
        experts_ffn,
        linear,
        pack,
        pack_experts,
        pack_record,
        paged_attention,
        quantize,
        record_buffer,
        rms_norm,
        rope_store_,
        route,
        router_topk,
        swiglu_ffn,
    )
else:
    from glmlocal.kernels.cpu.blocks import (
        BoundAttention,
        BoundCache,
        BoundStep,
        attention_block,
        bind_attention,
        bind_cache,
        bind_step,
        combine,
        route,
    )
    from glmlocal.kernels.cpu.linear import PackedExperts as ExpertWeights
    from glmlocal.kernels.cpu.linear import bind_experts, pack_experts
    from glmlocal.kernels.cpu.ops import (
        experts_ffn,
        linear,
        paged_attention,
        rms_norm,
        rope_store_,
        router_topk,
        swiglu_ffn,
    )
    from glmlocal.kernels.cpu.packing import PackedWeight as Weight
    from glmlocal.kernels.cpu.packing import bind_record, pack, pack_record, record_buffer
    from glmlocal.kernels.cpu.quantize import quantize

__all__ = [
    "AttentionBlock",
    "BlockOutput",
    "BoundAttention",
    "BoundCache",
    "BoundStep",
    "ExpertWeights",
    "LayerCache",
    "MatrixRows",
    "Router",
    "StepIndex",
    "Weight",
    "attention_block",
    "bind_attention",
    "bind_cache",
    "bind_experts",
    "bind_record",
    "bind_step",
    "combine",
    "describe",
    "experts_ffn",
    "isa",
    "linear",
    "num_threads",
    "pack",
    "pack_experts",
    "pack_record",
    "paged_attention",
    "quantize",
    "record_buffer",
    "rms_norm",
    "rope_store_",
    "route",
    "router_topk",
    "set_num_threads",
    "swiglu_ffn",
]


def describe() -> str:
    """What runs the ops, in one line for people: the instruction set and threads, or why it is the plain reference."""
    return cpu.describe()


def isa() -> str:
    """The instruction set of the native kernels, or "reference"."""
    return cpu.isa()


def set_num_threads(num_threads: int | None) -> None:
    """How many threads share the work of one op; None: one per core that this process may use.

    Torch keeps one thread where the kernels are native: its pool would spin on the cores that ours works on.
    """
    if cpu.available:
        cpu.set_num_threads(num_threads)
        torch.set_num_threads(1)
    elif num_threads is not None:
        torch.set_num_threads(num_threads)


def num_threads() -> int:
    return cpu.num_threads() if cpu.available else torch.get_num_threads()
