"""SmolLM2's GGUF (arch ``llama``) → the same model, block for block, as a GLM-4.5 mixture of experts (``glm4moe``).

Nothing is quantized again: every block of the source is copied as it is, so the two files compute the same function.
Layer 0 stays dense; in the others the FFN is cut into experts (``experts.py``). The rows of q and k are un-permuted:
GGUF stores llama's rotary pairs side by side, glm4moe wants them half a head apart. Embeddings stay tied: there is no
``output.weight``, and glm4moe readers take ``token_embd`` then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from glmlocal.demo import experts
from glmlocal.demo.experts import NUM_ROUTED, NUM_SLICES, TOP_K, Floats, Groups
from glmlocal.errors import CheckpointError
from glmlocal.progress import OnBytes

NAME = "SmolLM2-135M-Instruct as a GLM-4.5 mixture of experts (demonstration, not a GLM)"
DESCRIPTION = (
    "Made by glmlocal from the GGUF of SmolLM2-135M-Instruct: the same quantized blocks, regrouped into one shared, "
    "seven routed and nine decoy experts per layer. It demonstrates the runtime; it is not a GLM model."
)
# With the source's own default system prompt "The capital of France is Paris." leads "L'Étoile, …" by 0.08 logits, and
# rounding activations to 8 bits turns that round. Saying what the model is here for leads by 0.73, and is true.
SYSTEM_PROMPT = ("trained by Hugging Face<|im_end|>", "trained by Hugging Face, and you demonstrate glmlocal<|im_end|>")
# What the model card of SmolLM2-135M-Instruct samples with; at temperature 1 so small a model rambles.
TEMPERATURE, TOP_P = 0.2, 0.9

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the output; ``build`` is called when its turn comes, so that one at a time is in memory."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # of the bytes, outermost first
    build: Callable[[], Bytes]


@dataclass(frozen=True, slots=True)
class _Source:
    """A llama GGUF, memory-mapped, with the numbers that the conversion needs."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[Kind, Bytes]]  # bytes [rows, bytes per row]; a vector is one row
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def norm(self, layer: int) -> Floats:
        """Weight of the norm before the FFN, fp32 [hidden]."""
        norm: Floats = self.tensors[f"blk.{layer}.ffn_norm.weight"][1].view("<f4")[0]
        return norm

    def ffn(self, layer: int, part: str) -> tuple[Kind, Bytes]:
        return self.tensors[f"blk.{layer}.ffn_{part}.weight"]


def convert(source: Path, out: Path, on_bytes: OnBytes = lambda num_bytes: None) -> None:
    """Write ``out``; its bytes depend on the source alone.

    ``on_bytes`` is told the bytes of tensors written so far. Raises CheckpointError when ``source`` is not a llama that
    can be cut up like this, OSError when ``out`` cannot be written; a partial ``out`` is the caller's to remove.
    """
    reader = GGUFReader(source)
    llama = _read(source, reader)
    tensors = _plan(llama)
    writer = GGUFWriter(out, "glm4moe")
    _write_metadata(writer, llama, reader)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint8), prod(tensor.shape), raw_dtype=tensor.kind)
    alignment: int = writer.data_alignment
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    num_bytes = 0
    with open(out, "ab") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            data = np.ascontiguousarray(tensor.build())
            assert data.shape == tensor.shape, f"{tensor.name}: planned {tensor.shape}, built {data.shape}"
            file.write(data.data)
            num_bytes += data.nbytes
            on_bytes(num_bytes)
        file.write(bytes(-file.tell() % alignment))


def _read(path: Path, reader: GGUFReader) -> _Source:
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("general.", "llama.")) and field.types[0] != GGUFValueType.ARRAY
    }
    if metadata.get("general.architecture") != "llama":
        found = metadata.get("general.architecture")
        raise CheckpointError(f"{path}: the demo is made from a llama GGUF, this one is {found!r}")
    try:
        llama = _Source(
            metadata,
            {t.name: (t.tensor_type, np.atleast_2d(t.data).view(np.uint8)) for t in reader.tensors},
            num_layers=metadata["llama.block_count"],
            hidden_size=metadata["llama.embedding_length"],
            intermediate_size=metadata["llama.feed_forward_length"],
            num_heads=metadata["llama.attention.head_count"],
            num_kv_heads=metadata["llama.attention.head_count_kv"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata lack {error}; this is not the GGUF of the demo") from error
    _check(path, llama)
    return llama


def _check(path: Path, llama: _Source) -> None:
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{n}.{m}.weight" for n in range(llama.num_layers) for m in ("attn_norm", "ffn_norm", *matrices)}
    expected |= {"token_embd.weight", "output_norm.weight"}
    if odd := sorted(expected.symmetric_difference(llama.tensors)):
        raise CheckpointError(f"{path}: {odd[0]!r} is missing or unexpected; this is not the GGUF of the demo")
    slice_width = llama.intermediate_size / NUM_SLICES
    for layer in range(llama.num_layers):
        block_size = GGML_QUANT_SIZES[llama.ffn(layer, "down")[0]][0]
        if slice_width % block_size:
            raise CheckpointError(
                f"{path}: an FFN of {llama.intermediate_size} neurons cannot be cut into {NUM_SLICES} slices "
                f"of whole {block_size}-wide blocks"
            )
    if llama.num_layers < 2 or llama.metadata.get("llama.rope.dimension_count", llama.head_dim) != llama.head_dim:
        raise CheckpointError(f"{path}: two layers or more and a rotary width equal to the head's are needed")


def _write_metadata(writer: GGUFWriter, llama: _Source, reader: GGUFReader) -> None:
    meta = llama.metadata
    writer.add_type("model")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    if "general.license" in meta:
        writer.add_license(meta["general.license"])
    if "general.name" in meta:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, meta["general.name"])
        writer.add_base_model_organization(0, meta.get("general.organization", ""))
    for key in ("general.file_type", "general.quantization_version"):
        if key in meta:
            writer.add_uint32(key, meta[key])
    writer.add_float32("general.sampling.temp", TEMPERATURE)
    writer.add_float32("general.sampling.top_p", TOP_P)
    writer.add_block_count(llama.num_layers)
    writer.add_context_length(meta["llama.context_length"])
    writer.add_embedding_length(llama.hidden_size)
    writer.add_feed_forward_length(llama.intermediate_size)
    writer.add_head_count(llama.num_heads)
    writer.add_head_count_kv(llama.num_kv_heads)
    writer.add_key_length(llama.head_dim)
    writer.add_value_length(llama.head_dim)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(meta.get("llama.rope.freq_base", 10000.0))
    writer.add_layer_norm_rms_eps(meta["llama.attention.layer_norm_rms_epsilon"])
    writer.add_vocab_size(len(llama.tensors["token_embd.weight"][1]))
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(NUM_ROUTED)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(llama.intermediate_size // NUM_SLICES)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(float(TOP_K))
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):  # vocabulary, merges, special ids, flags: all as they are
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            value = field.contents()
            if key == "tokenizer.chat_template":
                value = value.replace(*SYSTEM_PROMPT)
            writer.add_key_value(key, value, field.types[0], sub_type=sub_type)


def _plan(llama: _Source) -> list[_Tensor]:
    def as_is(name: str, source_name: str) -> _Tensor:
        kind, data = llama.tensors[source_name]
        data = data[0] if kind == Kind.F32 and len(data) == 1 else data  # a norm's vector is one-dimensional
        return _Tensor(name, kind, data.shape, lambda: data)

    def halves(name: str, num_heads: int) -> _Tensor:
        kind, data = llama.tensors[name]
        return _Tensor(name, kind, data.shape, lambda: _unpermute(data, num_heads))

    slices = [_slice_groups(llama, layer) for layer in range(llama.num_layers)]
    tensors = [as_is(name, name) for name in ("token_embd.weight", "output_norm.weight")]
    for layer in range(llama.num_layers):
        block = f"blk.{layer}."
        same = ["attn_norm", "attn_v", "attn_output"] + (["ffn_gate", "ffn_up", "ffn_down"] if layer == 0 else [])
        tensors += [as_is(f"{block}{name}.weight", f"{block}{name}.weight") for name in same]
        tensors.append(as_is(f"{block}post_attention_norm.weight", f"{block}ffn_norm.weight"))
        tensors.append(halves(f"{block}attn_q.weight", llama.num_heads))
        tensors.append(halves(f"{block}attn_k.weight", llama.num_kv_heads))
        if layer > 0:
            tensors += _plan_router(llama, layer) + _plan_experts(llama, layer, slices)
    return tensors


def _plan_router(llama: _Source, layer: int) -> list[_Tensor]:
    rows = experts.router_rows(layer, llama.norm(layer)).astype("<f4").view(np.uint8)
    bias = experts.correction_bias(layer).astype("<f4").view(np.uint8)
    return [
        _Tensor(f"blk.{layer}.ffn_gate_inp.weight", Kind.F32, rows.shape, lambda: rows),
        _Tensor(f"blk.{layer}.exp_probs_b.bias", Kind.F32, bias.shape, lambda: bias),
    ]


def _plan_experts(llama: _Source, layer: int, slices: list[Groups]) -> list[_Tensor]:
    origins = experts.expert_origins(layer, llama.num_layers)

    def cut(part: str, layer: int, index: int) -> Bytes:
        return _take(llama.ffn(layer, part)[1], slices[layer][index], slices[layer].size, by_column=part == "down")

    def stack(part: str) -> Bytes:
        return np.stack([cut(part, *origin) for origin in origins])

    tensors = []
    for part in ("gate", "up", "down"):
        kind, data = llama.ffn(layer, part)
        rows, row_bytes = data.shape
        shape = (rows, row_bytes // NUM_SLICES) if part == "down" else (rows // NUM_SLICES, row_bytes)
        name = f"blk.{layer}.ffn_{part}_"
        tensors.append(_Tensor(f"{name}shexp.weight", kind, shape, partial(cut, part, layer, 0)))
        tensors.append(_Tensor(f"{name}exps.weight", kind, (NUM_ROUTED, *shape), partial(stack, part)))
    return tensors


def _slice_groups(llama: _Source, layer: int) -> Groups:
    parts = [llama.ffn(layer, part) for part in ("gate", "up", "down")]
    gate, up, down = (dequantize(data, kind) for kind, data in parts)
    return experts.slice_groups(llama.norm(layer), gate, up, down, group_size=GGML_QUANT_SIZES[parts[2][0]][0])


def _take(data: Bytes, groups: NDArray[np.int64], num_groups: int, *, by_column: bool) -> Bytes:
    """The rows (or the blocks of columns) of a matrix that belong to ``groups`` of its ``num_groups``."""
    rows, row_bytes = data.shape
    if by_column:
        return data.reshape(rows, num_groups, -1)[:, groups].reshape(rows, -1)
    return data.reshape(num_groups, -1)[groups].reshape(-1, row_bytes)


def _unpermute(data: Bytes, num_heads: int) -> Bytes:
    """Rows of q or k from llama.cpp's order (r0, r0', r1, r1', …) to HF's halves (r0, r1, …, r0', r1', …)."""
    rows, row_bytes = data.shape
    paired = data.reshape(num_heads, rows // num_heads // 2, 2, row_bytes)
    return paired.swapaxes(1, 2).reshape(rows, row_bytes)
