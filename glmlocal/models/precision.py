"""How exactly a model runs where its user does not say: ``auto`` for activations and the KV cache. Torch-free.

Rounding activations to 8 bits and the KV cache to bf16 makes a large model several times faster and its context half
as large, and changes its predictions less than a 4-bit weight does. A small model is fast enough without, loses the
most (routers that are nearly undecided turn over), and is what people check an engine with: it runs in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from glmlocal.errors import ConfigError
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.quant import Activations
from glmlocal.models.config import KV_DTYPES

EXACT_BELOW_BYTES = 1 << 30


def choose_activations(wanted: str, tensors: Mapping[str, TensorRef]) -> Activations:
    """What integer codes are multiplied with: ``auto`` → fp32 below 1 GiB, else int8. Raises ConfigError."""
    if wanted == "auto":
        return "fp32" if _is_small(tensors) else "int8"
    for known in get_args(Activations):
        if wanted == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"--activations is {quoted(wanted)}, wanted auto, {', '.join(get_args(Activations))}")


def choose_kv_dtype(wanted: str, tensors: Mapping[str, TensorRef]) -> str:
    """``auto`` → fp32 for checkpoints below 1 GiB or of fp32 weights (told by those that make keys), else bf16.

    The name is vLLM's, and so is the idea that the checkpoint decides. Raises ConfigError for another dtype.
    """
    if wanted == "auto":
        ref = tensors.get("model.layers.0.self_attn.k_proj.weight")
        return "fp32" if _is_small(tensors) or (ref is not None and ref.dtype == "F32") else "bf16"
    if wanted not in KV_DTYPES:
        raise ConfigError(f"--kv-dtype is {quoted(wanted)}, wanted auto, {', '.join(KV_DTYPES)}")
    return wanted


def _is_small(tensors: Mapping[str, TensorRef]) -> bool:
    return sum(ref.nbytes for ref in tensors.values()) < EXACT_BELOW_BYTES
