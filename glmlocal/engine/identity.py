"""What a model's KV blocks belong to. Torch-free."""

from __future__ import annotations

import hashlib
import json

from glmlocal.formats.index import Checkpoint

_NUM_SAMPLES, _SAMPLE_BYTES = 32, 4096


def model_identity(checkpoint: Checkpoint, *computed_with: str) -> str:
    """A hex name for everything that keys and values depend on: the config, all tensors' names, types and shapes, and
    a sample of their bytes, so that a fine-tune of the same shape is another model. ``computed_with`` are choices such
    as the quantization and the activations. Reads at most 128 KiB."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([checkpoint.config, computed_with], sort_keys=True, default=str).encode())
    tensors = checkpoint.tensors
    names = sorted(tensors)
    for name in names:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
    for name in names[:: max(1, len(names) // _NUM_SAMPLES)][:_NUM_SAMPLES]:
        middle = max(0, tensors[name].nbytes // 2 - _SAMPLE_BYTES)
        digest.update(tensors.copy(name, middle, min(tensors[name].nbytes, middle + _SAMPLE_BYTES)).tobytes())
    return digest.hexdigest()
