"""For the tests of the demo: a miniature of the GGUF that it is made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 256, 4, 4, 2, 96


def write_mini_llama(path: Path, *, seed: int = 0, **changed: object) -> Path:
    """A random llama GGUF with the demo source's tensor names and types, in miniature; ``changed`` overrides metadata
    (underscores twice for a dot) or, with an array, replaces or adds a tensor; None leaves either out."""
    rng = np.random.default_rng(seed)
    metadata: dict[str, object] = {
        "general__name": "Mini",
        "general__license": "apache-2.0",
        "general__organization": "Nobody",
        "general__file_type": 3,
        "general__quantization_version": 2,
        "llama__block_count": LAYERS,
        "llama__context_length": 128,
        "llama__embedding_length": HIDDEN,
        "llama__feed_forward_length": INTERMEDIATE,
        "llama__attention__head_count": HEADS,
        "llama__attention__head_count_kv": KV_HEADS,
        "llama__rope__freq_base": 5000.0,
        "llama__attention__layer_norm_rms_epsilon": 1e-5,
        "llama__rope__dimension_count": HIDDEN // HEADS,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": [f"t{n}" for n in range(VOCAB - 1)] + ["Ġé"],
        "tokenizer__ggml__token_type": [3] + [1] * (VOCAB - 1),
        "tokenizer__ggml__merges": ["t 1", "t 2"],
        "tokenizer__ggml__add_bos_token": False,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__chat_template": "{{ messages }}",
    }
    arch = str(changed.pop("arch", "llama"))
    tensors = _mini_tensors(rng)
    for key, value in changed.items():
        (tensors if isinstance(value, np.ndarray) or key.replace("__", ".") in tensors else metadata)[key] = value  # type: ignore[index]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    for key, array in tensors.items():
        if array is not None:
            name = key.replace("__", ".")
            kind = Kind.F32 if "norm" in name else Kind.Q8_0 if name == "token_embd.weight" else Kind.Q4_1
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _mini_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32] | None]:
    def random(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * 2.0 / shape[-1] ** 0.5).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors: dict[str, NDArray[np.float32] | None] = {"token_embd.weight": random(VOCAB, HIDDEN)}
    for n in range(LAYERS):
        tensors |= {
            f"blk.{n}.attn_norm.weight": norm(),
            f"blk.{n}.ffn_norm.weight": norm(),
            f"blk.{n}.attn_q.weight": random(HIDDEN, HIDDEN),
            f"blk.{n}.attn_k.weight": random(kv, HIDDEN),
            f"blk.{n}.attn_v.weight": random(kv, HIDDEN),
            f"blk.{n}.attn_output.weight": random(HIDDEN, HIDDEN),
            f"blk.{n}.ffn_gate.weight": random(INTERMEDIATE, HIDDEN),
            f"blk.{n}.ffn_up.weight": random(INTERMEDIATE, HIDDEN),
            f"blk.{n}.ffn_down.weight": random(HIDDEN, INTERMEDIATE),
        }
    return tensors | {"output_norm.weight": norm()}
