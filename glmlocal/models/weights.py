"""Checkpoint tensors → packed weights: one reader that every model builds itself from."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal import kernels
from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.formats.expert_pack_layout import PACK_DTYPE
from glmlocal.formats.fp8 import FP8_DTYPE
from glmlocal.formats.fp8_matrix import Fp8Matrix
from glmlocal.formats.ggml_blocks import unpack
from glmlocal.formats.index import TensorIndex, TensorRef
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import INT4, INT8, QUANTIZED_DTYPES, Activations, QuantScheme
from glmlocal.formats.stored_rows import StoredRows
from glmlocal.layers.embedding import TORCH_DTYPE, AnyEmbedding, Embedding, QuantizedEmbedding
from glmlocal.layers.linear import Linear
from glmlocal.layers.norm import RMSNorm

Quant = Literal["keep", "int8", "int4"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
SCHEMES: dict[str, QuantScheme] = {"int8": INT8, "int4": INT4}


def check_quant(quant: str) -> Quant:
    """Raises ConfigError for what is not one of QUANTS."""
    for known in QUANTS:
        if quant == known:
            return known
    raise ConfigError(f"quant is {quant!r}, wanted one of {', '.join(QUANTS)}")


def finer_quant(quant: Quant) -> Quant:
    """What the head and the MTP layers become: 4 bits would hurt them."""
    return "int8" if quant == "int4" else quant


def quantized_already(tensors: TensorIndex) -> str | None:
    """What quantizing leaves as it is, in a line for people; None if that is nothing."""
    linear = [ref for name, ref in tensors.items() if _is_linear(name)]
    already = sorted({ref.dtype.removeprefix(PACK_DTYPE) for ref in linear if _stays(ref)})
    if not already:
        return None
    count = sum(map(_stays, linear))
    return (
        f"{count:,} of {len(linear):,} linear weights are quantized already ({', '.join(already)}) and stay as they are"
    )


def _stays(ref: TensorRef) -> bool:
    return ref.matrix is not None or ref.dtype in QUANTIZED_DTYPES or ref.dtype.startswith(PACK_DTYPE)


def _is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "lm_head.weight", "shared_head.head.weight"))


class _BytesRead:
    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes, self._num_bytes, self._lock = on_bytes, 0, threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            self._on_bytes(self._num_bytes)


class WeightReader:
    """Reads tensors by HF name, and quantizes the linear ones if asked to. Safe to use from several threads.

    ``on_bytes`` is told how many bytes have been read so far.
    """

    def __init__(
        self,
        tensors: TensorIndex,
        on_bytes: Callable[[int], None],
        quant: Quant = "keep",
        activations: Activations = "int8",
    ) -> None:
        self._tensors, self._bytes_read, self._quant = tensors, _BytesRead(on_bytes), quant
        self.activations = activations

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def at_least_8_bits(self) -> WeightReader:
        """The same, for weights that 4 bits would hurt: the head and the MTP layers."""
        reader = copy.copy(self)
        reader._quant = finer_quant(self._quant)
        return reader

    def rows(self, name: str) -> kernels.MatrixRows:
        """A linear weight [out, in]: as stored (floats, fp8, a GGUF type or integers of any release), or quantized."""
        ref = self._tensors[name]
        num_rows, columns = ref.shape
        read = self._rows_as_stored(ref)
        scheme = SCHEMES.get(self._quant)
        if scheme is None or _stays(ref):
            return kernels.MatrixRows((num_rows, columns), read)
        return kernels.MatrixRows((num_rows, columns), lambda begin, end: _quantized(name, read(begin, end), scheme))

    def dense(self, name: str) -> Tensor:
        """A norm weight, bias or router, fp32; quantized routers (some GGUF files) are widened."""
        ref = self._tensors[name]
        tensor = _matrix(ref.dtype, self._tensors.copy(name), ref.shape)
        self._bytes_read.add(ref.nbytes)
        return torch.from_numpy(tensor.dequantize()) if isinstance(tensor, QuantizedMatrix) else tensor.float()

    def packed_experts(self, layer: int) -> kernels.ExpertWeights | None:
        """A layer's routed experts from their pack, read at once and checked; None where they are tensors."""
        pack = self._tensors.experts
        if pack is None or layer not in pack.layers():
            return None
        layout, num_experts = pack.layout(layer), pack.num_experts
        records = kernels.record_buffer(num_experts * layout.record_bytes)
        pack.read_records(layer, 0, records)
        self._bytes_read.add(num_experts * layout.nbytes)
        each = records.reshape(num_experts, layout.record_bytes)
        bound = [kernels.bind_record(layout, record, self.activations) for record in each]
        gate, up, down = zip(*bound, strict=True)
        return kernels.bind_experts(gate, up, down)

    def weight(self, name: str) -> kernels.Weight:
        """A linear weight in the form that ``kernels.linear`` takes."""
        return kernels.pack(self.rows(name), self.activations)

    def linear(self, prefix: str) -> Linear:
        return Linear(self.weight(f"{prefix}.weight"))

    def norm(self, prefix: str, eps: float) -> RMSNorm:
        return RMSNorm(self.dense(f"{prefix}.weight"), eps)

    def embedding(self, name: str) -> AnyEmbedding:
        ref = self._tensors[name]
        self._tensors.read_ahead(name)
        if ref.matrix is not None:
            return QuantizedEmbedding(StoredRows.open(self._tensors, ref.matrix))
        rows = self._tensors.read(name).reshape(ref.shape[0], -1)
        return Embedding(rows, ref.dtype, ref.shape[1])

    def _rows_as_stored(self, ref: TensorRef) -> Callable[[int, int], Tensor | QuantizedMatrix]:
        columns, row_bytes = ref.shape[1], ref.nbytes // ref.shape[0]
        joined: Fp8Matrix | StoredRows | None = None  # what has its scales in another tensor
        if ref.matrix is not None:
            joined = StoredRows.open(self._tensors, ref.matrix)
        elif ref.dtype == FP8_DTYPE:
            joined = Fp8Matrix.open(self._tensors, ref.name)

        def read(begin: int, end: int) -> Tensor | QuantizedMatrix:
            if joined is not None:
                part: Tensor | QuantizedMatrix = joined.rows(begin, end)
            else:
                raw = self._tensors.copy(ref.name, begin * row_bytes, end * row_bytes)
                part = _matrix(ref.dtype, raw, (end - begin, columns))
            self._bytes_read.add((end - begin) * row_bytes)
            return part

        return read


def _matrix(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor | QuantizedMatrix:
    """What a tensor's bytes mean."""
    if dtype not in TORCH_DTYPE:
        return unpack(dtype, raw, shape)
    return torch.from_numpy(raw).view(TORCH_DTYPE[dtype]).view(shape)


def _quantized(name: str, part: Tensor | QuantizedMatrix, scheme: QuantScheme) -> QuantizedMatrix:
    try:
        return kernels.quantize(_wide(part), scheme)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be quantized to {scheme.name}: {error}") from error


def _wide(part: Tensor | QuantizedMatrix) -> NDArray[np.float32]:
    # In numpy: torch's aligned blocks left 40 MB behind in the heap.
    if isinstance(part, QuantizedMatrix):
        return part.dequantize()
    if part.dtype == torch.bfloat16:
        return (part.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return part.numpy().astype(np.float32)
