"""Checkpoint files written byte by byte, so that any of their bytes can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from glmlocal.models.config import ModelConfig, expected_mtp_tensors, expected_tensors, optional_mtp_tensors

Array = NDArray[Any]
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "uint8": "F8_E4M3"}
_STRUCT = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

TINY: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
    "rope_theta": 1000000,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "eos_token_id": [1, 2],
}


def tiny_tensors(
    config: Mapping[str, Any], *, mtp: bool = True, copies: bool = True, seed: int = 0
) -> dict[str, Array]:
    """Random fp32 tensors of every name that the config implies."""
    rng = np.random.default_rng(seed)
    parsed = ModelConfig.from_hf(config)
    shapes = expected_tensors(parsed)
    if mtp:
        shapes |= expected_mtp_tensors(parsed) | (optional_mtp_tensors(parsed) if copies else {})
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# --- safetensors


def safetensors_bytes(tensors: Mapping[str, Array], dtypes: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        dtype = (dtypes or {}).get(name, _SAFETENSORS_NAMES[array.dtype.name])
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    return with_header(header, data)


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header (an object, or raw bytes), claiming ``length`` bytes of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], shards: int = 1) -> Path:
    """A release directory: config.json and one file, or an index and several."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return directory
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        (directory / shard).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- GGUF


@dataclass(frozen=True)
class GgufTensor:
    name: Any  # str; bytes where it is to be wrong
    dims: tuple[int, ...]  # ggml order: [in, out]
    type_id: int
    data: bytes
    offset: int | None = None  # None: where it belongs


@dataclass(frozen=True)
class Gguf:
    """A GGUF file to be; every part of it can be replaced by a wrong one."""

    keys: tuple[tuple[Any, int, Any], ...] = ()  # name (bytes where it is to be wrong), kind, value
    tensors: tuple[GgufTensor, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    tail: bytes = field(default=b"")

    def with_keys(self, **values: tuple[int, Any] | None) -> Gguf:
        """Replace, add or (None) remove keys; ``__`` stands for a dot."""
        changed = {name.replace("__", "."): value for name, value in values.items()}
        kept = tuple(key for key in self.keys if key[0] not in changed)
        added = tuple((name, *value) for name, value in changed.items() if value is not None)
        return replace(self, keys=kept + added)

    def with_tensor(self, name: str, /, **changes: Any) -> Gguf:
        return replace(self, tensors=tuple(replace(t, **changes) if t.name == name else t for t in self.tensors))

    def without(self, test: Callable[[str], bool]) -> Gguf:
        return replace(self, tensors=tuple(t for t in self.tensors if not test(t.name)))

    def encode(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        out = self.magic + struct.pack("<IQQ", self.version, *counts)
        out += b"".join(string(name) + struct.pack("<I", kind) + value(kind, v) for name, kind, v in self.keys)
        data = b""
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            out += string(tensor.name) + dims + struct.pack("<IQ", tensor.type_id, offset)
            data += tensor.data
        return out + bytes(-len(out) % self.alignment) + data + self.tail

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path


class Raw(bytes):
    """Written as it is where an encoded name or value would be."""


def string(text: str | bytes) -> bytes:
    if isinstance(text, Raw):
        return text
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, v: Any) -> bytes:
    """A value; an array is ``(element kind, elements)``."""
    if isinstance(v, Raw):
        return v
    if kind == STRING:
        return string(v)
    if kind == ARRAY:
        element, items = v
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, item) for item in items)
    return struct.pack("<" + _STRUCT[kind], v)


def tiny_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, Array], type_of: Callable[[str], str] = lambda name: "F32"
) -> Gguf:
    """The checkpoint as llama.cpp's converter would write it; ``type_of`` gets the GGUF name of a matrix.

    Tensor names come from the gguf package's own table for this architecture.
    """
    blocks = config["num_hidden_layers"] + config["num_nextn_predict_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, blocks)
    stacks: dict[str, list[Array]] = {}
    for name, array in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            parts.pop(parts.index("experts") + 1)
        stored = ".".join(parts).replace("e_score_correction_bias", "e_score_correction.bias")
        stacks.setdefault(stored, []).append(array)
    entries = []
    for name, arrays in stacks.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        array = np.stack(arrays) if ".mlp.experts." in name else arrays[0]
        kind = gguf.GGMLQuantizationType[type_of(mapped) if array.ndim > 1 else "F32"]
        data = array if kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(array, kind)
        entries.append(GgufTensor(mapped, tuple(reversed(array.shape)), int(kind), data.tobytes()))
    return Gguf(_keys(config), tuple(entries))


def _keys(config: Mapping[str, Any]) -> tuple[tuple[str, int, Any], ...]:
    rotary = int(config["head_dim"] * config["partial_rotary_factor"])
    arch = {
        "block_count": (U32, config["num_hidden_layers"] + config["num_nextn_predict_layers"]),
        "context_length": (U32, config["max_position_embeddings"]),
        "embedding_length": (U32, config["hidden_size"]),
        "feed_forward_length": (U32, config["intermediate_size"]),
        "attention.head_count": (U32, config["num_attention_heads"]),
        "attention.head_count_kv": (U32, config["num_key_value_heads"]),
        "attention.key_length": (U32, config["head_dim"]),
        "attention.value_length": (U32, config["head_dim"]),
        "attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "rope.dimension_count": (U32, rotary),
        "rope.freq_base": (F32, config["rope_theta"]),
        "expert_count": (U32, config["n_routed_experts"]),
        "expert_used_count": (U32, config["num_experts_per_tok"]),
        "expert_feed_forward_length": (U32, config["moe_intermediate_size"]),
        "expert_shared_count": (U32, 1),
        "leading_dense_block_count": (U32, config["first_k_dense_replace"]),
        "expert_gating_func": (U32, 2),
        "expert_weights_scale": (F32, config["routed_scaling_factor"]),
        "expert_weights_norm": (BOOL, True),
        "nextn_predict_layers": (U32, config["num_nextn_predict_layers"]),
    }
    return (
        ("general.architecture", STRING, "glm4moe"),
        ("general.name", STRING, "tiny"),
        *((f"glm4moe.{name}", *value) for name, value in arch.items()),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, [f"t{i}" for i in range(config["vocab_size"])])),
        ("tokenizer.ggml.eos_token_id", U32, 1),
        ("tokenizer.ggml.eot_token_id", U32, 2),
        ("tokenizer.ggml.eom_token_id", U32, 1),
        ("tokenizer.chat_template", STRING, "{{ messages }}"),
    )


def random_blocks(dtype: str, blocks: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random bytes [blocks, block bytes] with finite fp16 fields; zeros, subnormals and extremes are among them."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    raw = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    special = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF, 0x3C00], np.uint16)
    for at in HALF_FIELDS[dtype]:
        halves = rng.integers(0, 1 << 16, blocks, dtype=np.uint16)
        halves = np.where(rng.random(blocks) < 0.3, rng.choice(special, blocks), halves)
        halves = np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves)  # no infinities, no NaN
        raw[:, at : at + 2] = halves.astype("<u2").reshape(-1, 1).view(np.uint8)
    if dtype == "IQ1_M":  # a quarter of its fp16 scale in each of four words; this bit is of the exponent
        raw[:, 55] &= 0xBF
    if dtype == "MXFP4":  # its exponent, such that no weight is infinite
        raw[:, 0] = np.minimum(raw[:, 0], 250)
    return raw


# Where a block of the type keeps its fp16 numbers.
HALF_FIELDS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("IQ1_M", "MXFP4", "NVFP4"), ()),
}
