"""Token embedding, read row by row from the checkpoint file: the table is never held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmlocal.formats.ggml_blocks import unpack
from glmlocal.formats.stored_rows import StoredRows

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Embedding:
    """``rows`` is the mapped table, uint8 [vocab, bytes of a row]; rows of every format stand on their own."""

    rows: NDArray[np.uint8]
    dtype: str  # as in TensorRef
    hidden_size: int

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [tokens] → fp32 [tokens, hidden]."""
        raw = self.rows[input_ids.numpy()]  # a copy of just these rows
        if self.dtype in TORCH_DTYPE:
            return torch.from_numpy(raw).view(TORCH_DTYPE[self.dtype]).float()
        return torch.from_numpy(unpack(self.dtype, raw, (len(raw), self.hidden_size)).dequantize())


@dataclass(frozen=True, slots=True)
class QuantizedEmbedding:
    """The same of a table whose scales are in a tensor of their own (MLX)."""

    table: StoredRows

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [tokens] → fp32 [tokens, hidden]."""
        return torch.from_numpy(self.table.take(input_ids.numpy()).dequantize())


AnyEmbedding = Embedding | QuantizedEmbedding
