"""Checkpoint tensors → packed weights: one reader that every model builds itself from."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal import kernels
from glmlocal.formats.ggml_blocks import unpack
from glmlocal.formats.index import TensorIndex
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.layers.embedding import TORCH_DTYPE, Embedding
from glmlocal.layers.linear import Linear
from glmlocal.layers.norm import RMSNorm


class WeightReader:
    """Reads tensors by HF name and reports progress. Safe to use from several threads."""

    def __init__(self, tensors: TensorIndex, on_bytes: Callable[[int], None]) -> None:
        self._tensors, self._on_bytes = tensors, on_bytes
        self._num_bytes, self._lock = 0, threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def matrix(self, name: str) -> Tensor | QuantizedMatrix:
        """One matrix [out, in] as stored: fp32, bf16, fp16 or quantized."""
        ref = self._tensors[name]
        matrix = self._copy(ref.dtype, self._tensors.read(name), ref.shape)
        self._tensors.release(name)
        with self._lock:
            self._num_bytes += ref.nbytes
            self._on_bytes(self._num_bytes)
        return matrix

    @staticmethod
    def _copy(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor | QuantizedMatrix:
        if dtype not in TORCH_DTYPE:
            return unpack(dtype, raw, shape)
        return torch.from_numpy(np.array(raw)).view(TORCH_DTYPE[dtype]).view(shape)

    def dense(self, name: str) -> Tensor:
        """A norm weight, bias or router, fp32; quantized routers (some GGUF files) are widened."""
        tensor = self.matrix(name)
        return torch.from_numpy(tensor.dequantize()) if isinstance(tensor, QuantizedMatrix) else tensor.float()

    def weight(self, name: str) -> kernels.Weight:
        """A matrix in the form that ``kernels.linear`` takes."""
        return kernels.pack(self.matrix(name))

    def linear(self, prefix: str, *, bias: bool = False) -> Linear:
        return Linear(self.weight(f"{prefix}.weight"), self.dense(f"{prefix}.bias") if bias else None)

    def norm(self, prefix: str, eps: float) -> RMSNorm:
        return RMSNorm(self.dense(f"{prefix}.weight"), eps)

    def embedding(self, name: str) -> Embedding:
        ref = self._tensors[name]
        rows = self._tensors.read(name).reshape(ref.shape[0], -1)
        return Embedding(rows, ref.dtype, ref.shape[1])
