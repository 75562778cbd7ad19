"""How exactly a model runs where its user does not say: ``auto`` for activations and the KV cache. Torch-free.

Rounding activations to 8 bits and the KV cache to bf16 makes a large model several times faster and its context half
as large, and changes its predictions less than a 4-bit weight does. A small model is fast enough without, loses the
most (routers that are nearly undecided turn over), and is what people check an engine with: it runs in fp32.
"""

from __future__ import annotations

from typing import get_args

from glmlocal.errors import ConfigError
from glmlocal.formats.index import quoted
from glmlocal.formats.schemes import Activations

EXACT_BELOW_BYTES = 1 << 30


def auto_activations(weights_bytes: int) -> Activations:
    """What integer codes are multiplied with: fp32 for checkpoints below 1 GiB, else int8."""
    return "fp32" if weights_bytes < EXACT_BELOW_BYTES else "int8"


def auto_kv_dtype(weights_bytes: int, key_dtype: str) -> str:
    """fp32 for checkpoints below 1 GiB or of fp32 weights (told by ``key_dtype``, of those that make keys), else bf16.

    The name is vLLM's, and so is the idea that the checkpoint decides.
    """
    return "fp32" if weights_bytes < EXACT_BELOW_BYTES or key_dtype.upper() == "F32" else "bf16"


def check_activations(wanted: str) -> Activations:
    """Raises ConfigError for what is neither int8 nor fp32."""
    for known in get_args(Activations):
        if wanted == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"--activations is {quoted(wanted)}, wanted auto, {', '.join(get_args(Activations))}")
