"""Matrix products on packed weights. Arguments as in ``kernels/reference.py``, checked here because the native side
takes addresses; a tensor of another shape, dtype, device or layout is a ValueError, never a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import Activations
from glmlocal.kernels.cpu import _cpu
from glmlocal.kernels.cpu.packing import PackedWeight, pack
from glmlocal.kernels.reference import MatrixRows


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The routed experts of one layer, packed."""

    native: _cpu.Experts
    gate: tuple[PackedWeight, ...]
    up: tuple[PackedWeight, ...]
    down: tuple[PackedWeight, ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for group in (self.gate, self.up, self.down) for weight in group)


def pack_experts(
    gate: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    up: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    down: Iterable[Tensor | QuantizedMatrix | MatrixRows],
    activations: Activations = "int8",
) -> PackedExperts:
    return bind_experts(*(tuple(pack(matrix, activations) for matrix in group) for group in (gate, up, down)))


def bind_experts(
    gate: tuple[PackedWeight, ...], up: tuple[PackedWeight, ...], down: tuple[PackedWeight, ...]
) -> PackedExperts:
    """Experts of matrices that are packed already."""
    native = _cpu.Experts(*([weight.native for weight in group] for group in (gate, up, down)))
    return PackedExperts(native, gate, up, down)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    out_features, in_features = weight.shape
    check_rows("linear: x", x, in_features)
    if bias is None:
        bias_address = 0
    else:
        check_tensor("linear: bias", bias, torch.float32, (out_features,))
        bias_address = bias.data_ptr()
    num_rows = x.shape[0]
    out = torch.empty((num_rows, out_features))
    weight.native.linear(x.data_ptr(), num_rows, bias_address, out.data_ptr())
    return out


def swiglu_ffn(x: Tensor, gate: PackedWeight, up: PackedWeight, down: PackedWeight) -> Tensor:
    check_rows("swiglu_ffn: x", x, gate.shape[1])
    out = torch.empty_like(x)
    _cpu.swiglu_ffn(gate.native, up.native, down.native, x.data_ptr(), x.shape[0], out.data_ptr())
    return out


def experts_ffn(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: PackedExperts) -> Tensor:
    native = experts.native
    check_rows("experts_ffn: x", x, native.hidden_size)
    num_tokens, top_k = x.shape[0], topk_ids.shape[-1]
    check_tensor("experts_ffn: topk_ids", topk_ids, torch.int32, (num_tokens, top_k))
    check_tensor("experts_ffn: topk_weights", topk_weights, torch.float32, (num_tokens, top_k))
    out = torch.empty_like(x)
    native.ffn(x.data_ptr(), num_tokens, topk_ids.data_ptr(), topk_weights.data_ptr(), top_k, out.data_ptr())
    return out


def check_rows(name: str, x: Tensor, features: int) -> None:
    """x is contiguous fp32 [any, features] on the CPU; ValueError else."""
    if x.dtype is torch.float32 and x.dim() == 2 and x.shape[1] == features and x.is_contiguous() and x.is_cpu:
        return
    raise ValueError(f"{name} wanted contiguous fp32 [tokens, {features}] on the CPU, found {_describe(x)}")


def check_tensor(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """x is contiguous, of this dtype and shape, on the CPU; ValueError else."""
    if x.dtype is dtype and x.shape == shape and x.is_contiguous() and x.is_cpu:
        return
    raise ValueError(f"{name} wanted contiguous {dtype} {list(shape)} on the CPU, found {_describe(x)}")


def _describe(x: Tensor) -> str:
    layout = "contiguous" if x.is_contiguous() else f"strides {list(x.stride())}"
    return f"{x.dtype} {list(x.shape)}, {layout}, on {x.device}"
