"""Plain torch for every op: the truth the fast kernels are compared with, and what runs where none was built.

Activations are fp32 [tokens, features] throughout; weights keep what the checkpoint stores and are widened exactly.
Before they meet a weight that was packed for int8 activations they are rounded to 8 bits (``int8_rounded``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.errors import KernelUnavailable
from glmlocal.formats.expert_pack_layout import ExpertLayout
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.quantize import quantize as quantize  # the plain twin of cpu/quantize.py
from glmlocal.formats.schemes import Activations, QuantScheme
from glmlocal.kernels import blocks
from glmlocal.kernels.blocks import AttentionBlock, BlockOutput, LayerCache, StepIndex

_INT8_GROUP = 32  # columns that share an activation scale


@dataclass(frozen=True, slots=True)
class Weight:
    """A linear weight, fp32 [out_features, in_features]."""

    values: Tensor
    kind: str  # what the checkpoint stored: "f32", "bf16", "f16" or the quantization's name
    int8_activations: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.values.nbytes


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The routed experts of one layer: gate and up [moe_intermediate_size, hidden_size], down transposed to that."""

    gate: tuple[Weight, ...]
    up: tuple[Weight, ...]
    down: tuple[Weight, ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for group in (self.gate, self.up, self.down) for weight in group)


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """A matrix [out, in] whose rows are read a range at a time: it is never whole in memory beside the result."""

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor | QuantizedMatrix]  # rows begin … end - 1, all of one dtype or scheme

    @classmethod
    def of(cls, matrix: Tensor | QuantizedMatrix) -> MatrixRows:
        """One that is in memory already."""
        rows, columns = matrix.shape
        if isinstance(matrix, Tensor):
            return cls((rows, columns), lambda begin, end: matrix[begin:end])
        names = ("codes", "super_scale", "sub_scale", "super_min", "sub_min")
        arrays = {name: getattr(matrix, name) for name in names if getattr(matrix, name) is not None}
        return cls(
            (rows, columns),
            lambda begin, end: replace(matrix, **{name: values[begin:end] for name, values in arrays.items()}),
        )


_KIND = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def takes_int8(scheme: QuantScheme) -> bool:
    """Whether products with the scheme's codes round activations to int8 where those are used."""
    return scheme.means_int8


def pack(matrix: Tensor | QuantizedMatrix | MatrixRows, activations: Activations = "int8") -> Weight:
    """Bring one matrix [out, in] (fp32, bf16, fp16 or quantized) into the form ``linear`` takes.

    ``activations`` "int8" makes products with matrices of integer codes round their input to 8 bits, which is several
    times faster where the CPU has integer dot products; "fp32" keeps it. Other matrices always keep it.
    """
    if isinstance(matrix, MatrixRows):
        return pack(matrix.read(0, matrix.shape[0]), activations)
    if isinstance(matrix, QuantizedMatrix):
        int8 = activations == "int8" and takes_int8(matrix.scheme)
        return Weight(torch.from_numpy(matrix.dequantize()), matrix.scheme.name, int8)
    return Weight(matrix.float(), _KIND[matrix.dtype])


def pack_experts(
    gate: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    up: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    down: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    activations: Activations = "int8",
) -> ExpertWeights:
    """Bring the experts of one layer, in order of expert id, into the form ``experts_ffn`` takes, one at a time."""
    return ExpertWeights(*(tuple(pack(matrix, activations) for matrix in group) for group in (gate, up, down)))


def bind_experts(gate: tuple[Weight, ...], up: tuple[Weight, ...], down: tuple[Weight, ...]) -> ExpertWeights:
    """Experts of matrices that are packed already, in order of expert id."""
    return ExpertWeights(gate, up, down)


def record_buffer(num_bytes: int) -> NDArray[np.uint8]:
    """Memory for records of an expert pack, 64-byte aligned."""
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def bind_record(
    layout: ExpertLayout, record: NDArray[np.uint8], activations: Activations = "int8"
) -> tuple[Weight, Weight, Weight]:
    """Gate, up and down of an expert pack's record, taken out of the native layout.

    KernelUnavailable where the extension, which knows that layout, was not built.
    """
    native = _native_packing().bind_record(layout, record, activations)
    gate, up, down = (Weight(w.dequantize(), w.kind, w.int8_activations) for w in native)
    return gate, up, down


def pack_record(matrices: tuple[MatrixRows, MatrixRows, MatrixRows], layout: ExpertLayout) -> NDArray[np.uint8]:
    """Gate, up and down as a record of an expert pack, uint8 [record_bytes], 64-byte aligned.

    ValueError for matrices that are not what the layout says; KernelUnavailable as ``bind_record``.
    """
    record: NDArray[np.uint8] = _native_packing().pack_record(matrices, layout)
    return record


def _native_packing() -> Any:
    try:
        from glmlocal.kernels.cpu import packing
    except ImportError as error:
        raise KernelUnavailable("an expert pack needs the native kernels, which were not built here") from error
    return packing


def int8_rounded(x: Tensor) -> Tensor:
    """x fp32 [tokens, features] as products with int8 activations see it.

    Each 32 neighbouring features share a scale of (largest magnitude) / 127, as in llama.cpp's Q8_0 but without its
    last two of 24 binary digits, and are rounded half to even to -127 … 127 times that; where the scale is subnormal
    they become 0. NaN and infinity spoil their 32; scales of 2^103 and more count as infinite (``int8_rows.h``).
    """
    padded = F.pad(x, (0, -x.shape[-1] % _INT8_GROUP))
    groups = padded.view(x.shape[0], padded.shape[-1] // _INT8_GROUP, _INT8_GROUP)
    largest = groups.abs().amax(-1, keepdim=True) if groups.numel() else groups[..., :1]
    scale = ((largest / 127).view(torch.int32) & ~3).view(torch.float32)
    scale = torch.where(scale < 2.0**103, scale, scale * math.inf)
    usable = (scale >= torch.finfo(torch.float32).tiny) & (scale < math.inf)
    inverse = torch.where(usable, torch.full_like(largest, 127) / largest, 0.0)
    rounded = (groups * inverse).round().nan_to_num(0.0) * scale
    return rounded.view_as(padded)[:, : x.shape[-1]]


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x fp32 [tokens, in] → fp32 [tokens, out]."""
    return F.linear(int8_rounded(x) if weight.int8_activations else x, weight.values, bias)


def swiglu_ffn(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """down(silu(gate(x)) · up(x)); x fp32 [tokens, hidden] → fp32 [tokens, hidden]."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def experts_ffn(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """Σ over each token's experts of weight · FFN(x).

    x fp32 [tokens, hidden]; topk_ids int32 [tokens, top_k]; topk_weights fp32 [tokens, top_k] → fp32 [tokens, hidden].
    """
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, slot = torch.where(topk_ids == expert)
        y = swiglu_ffn(x[token], experts.gate[expert], experts.up[expert], experts.down[expert])
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension; fp32, any leading shape."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def router_topk(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts (glm-4.5's noaux_tc router: transformers ``Glm4MoeTopkRouter``).

    logits fp32 [tokens, experts]; correction_bias fp32 [experts], used for choosing only.
    Returns topk_ids int32 [tokens, top_k] and topk_weights fp32 [tokens, top_k]; their order is unspecified.
    """
    scores = logits.sigmoid()
    choice = scores + correction_bias
    if n_group > 1:
        grouped = choice.view(len(logits), n_group, logits.shape[1] // n_group)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(topk_group, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view_as(choice)
    topk_ids = choice.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids.int(), topk_weights * routed_scaling_factor


def rope_(x: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Rotate the first rotary_dim features of every head in place, pairing (j, j + rotary_dim / 2) ("half split").

    x fp32 [tokens, heads, head_dim]; cos_sin fp32 [max_positions, rotary_dim] = cos | sin of rotary_dim / 2 angles;
    positions int64 [tokens].
    """
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions, None].split(half, dim=-1)
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = first * cos - second * sin
    x[..., half : 2 * half] = second * cos + first * sin


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Store this step's keys and values, rounded to what the caches hold, to nearest with ties to even.

    k, v fp32 [tokens, kv_heads, head_dim]; caches fp32, bf16, fp8 (e4m3fn: ±448 at most, NaN stays NaN) or int8
    [blocks, block_size, kv_heads, head_dim]; int8 with scales fp32 [blocks, kv_heads, block_size]: the largest of a
    token's features in a kv head is ±127, value = code · scale; what is not finite makes the scale so.
    slot_mapping int64 [tokens] = block · block_size + offset.
    """
    block, slot = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]
    for x, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is not None:
            scale = x.abs().amax(-1) / 127
            scales[block, :, slot] = scale
            x = (x / scale.unsqueeze(-1)).nan_to_num(nan=0.0).clamp(-127, 127).round()
        elif cache.dtype == torch.float8_e4m3fn:
            x = x.clamp(-448, 448)
        cache[block, slot] = x.to(cache.dtype)


def _widen(cache: Tensor, scales: Tensor | None) -> Tensor:
    """[blocks, block_size, kv_heads, head_dim] as fp32."""
    return cache.float() if scales is None else cache.float() * scales.transpose(1, 2).unsqueeze(-1)


def rope_store_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """What comes before attention: ``rms_norm`` of each head where norms are given, ``rope_``, ``kv_write``.

    q fp32 [tokens, heads, head_dim] and k are changed in place; q_norm, k_norm fp32 [head_dim]; the rest as there.
    """
    for x, norm in ((q, q_norm), (k, k_norm)):
        if norm is not None:
            x.copy_(rms_norm(x, norm, eps))
        rope_(x, cos_sin, positions)
    kv_write(k, v, k_cache, v_cache, slot_mapping, k_scales, v_scales)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over the paged cache, prefill chunks and decode alike.

    q fp32 [tokens, heads, head_dim], the new tokens of all requests one after another: those of request r are
    query_start_loc[r] … query_start_loc[r+1] and are its last ones; caches and scales as in ``kv_write``, already
    holding them.
    block_tables int32 [requests, max_blocks]; query_start_loc int32 [requests + 1]; seq_lens int32 [requests] counts
    all cached tokens, the new ones included. Head h reads kv head h // (heads / kv_heads).
    Returns fp32 [tokens, heads, head_dim].
    """
    out = torch.empty_like(q)
    groups = q.shape[1] // k_cache.shape[2]
    for r, seq_len in enumerate(seq_lens.tolist()):
        start, end = int(query_start_loc[r]), int(query_start_loc[r + 1])
        if start == end:
            continue
        blocks = block_tables[r, : -(-seq_len // k_cache.shape[1])].long()
        k, v = (  # [seq, heads, head_dim]
            _widen(cache[blocks], None if scales is None else scales[blocks])
            .flatten(0, 1)[:seq_len]
            .repeat_interleave(groups, 1)
            for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
        )
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k) * scale
        query_position = torch.arange(seq_len - (end - start), seq_len).unsqueeze(1)
        scores.masked_fill_(torch.arange(seq_len) > query_position, float("-inf"))
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


BoundAttention = AttentionBlock[Weight]
BoundCache = LayerCache
BoundStep = StepIndex


def bind_attention(block: AttentionBlock[Weight]) -> BoundAttention:
    """Bring an attention block into the form ``attention_block`` takes."""
    return block


def bind_cache(cache: LayerCache) -> BoundCache:
    return cache


def bind_step(step: StepIndex) -> BoundStep:
    return step


def attention_block(block: BoundAttention, x: Tensor, step: BoundStep, cache: BoundCache) -> BlockOutput:
    """x fp32 [tokens, hidden] through pre-norm attention, residual, post-norm and router (see ``blocks.py``)."""
    return blocks.attention_block(sys.modules[__name__], block, x, step, cache)


def route(block: BoundAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the block's router would choose for x fp32 [tokens, hidden] without its attention (see ``blocks.py``)."""
    return blocks.route(sys.modules[__name__], block, x)


def combine(
    residual: Tensor, hidden: Tensor, routed: Tensor | None, ffn: tuple[Weight, Weight, Weight] | None
) -> Tensor:
    """residual + (FFN(hidden) + routed), all fp32 [tokens, hidden]; ffn is gate, up, down; either may be None."""
    return blocks.combine(sys.modules[__name__], residual, hidden, routed, ffn)
