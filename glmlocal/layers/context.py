"""ForwardContext: what a step's layers need to know besides the hidden states. Passed as an argument, never global."""

from __future__ import annotations

from dataclasses import dataclass

from glmlocal import kernels
from glmlocal.layers.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ForwardContext:
    step: kernels.BoundStep  # where each new token stands and where its keys and values go
    kv_cache: KVCache
