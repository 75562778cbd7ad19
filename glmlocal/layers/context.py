"""ForwardContext: what a step's layers need to know besides the hidden states. Passed as an argument, never global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from glmlocal import kernels
from glmlocal.layers.kv_cache import KVCache


class StepCancelled(Exception):
    """Nobody wants this step any more. It may have written keys and values of tokens that do not count as computed."""


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class ForwardContext:
    step: kernels.BoundStep  # where each new token stands and where its keys and values go
    kv_cache: KVCache
    is_cancelled: Callable[[], bool] = never  # asked before each layer
