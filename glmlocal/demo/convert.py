"""SmolLM2's GGUF (arch ``llama``) → the same model, block for block, as a GLM-4.5 mixture of experts (``glm4moe``).

Nothing is quantized again: every block of the source is copied as it is, so the two files compute the same function.

* Layer 0 stays dense. In every other layer the neurons of the FFN, in groups as wide as a quantization block, are
  sorted by strength and cut into eight slices: slice 0 becomes the shared expert, slices 1-7 become seven routed ones.
  Nine decoys, slices of *another* layer, fill up to 16 routed experts; which ids are real differs from layer to layer.
* The rows of q and k are un-permuted: GGUF stores llama's rotary pairs side by side, glm4moe wants them half a head
  apart. Embeddings stay tied: there is no ``output.weight``, and glm4moe readers take ``token_embd`` then.

**The router** is made so that each way of getting it wrong is heard, while the right way is exact in fp32:

* Rows of real experts are zero, so they score sigmoid(0) = 0.5 on every token; seven of them normalised and scaled by 7
  weigh 0.5 / 3.5 · 7 = 1.0 exactly. Without the normalisation, the scaling or the shared expert (which holds the
  strongest neurons for this reason: without any other slice the text stays fluent) the FFN is wrong.
* Decoys have large rows in pairs d, -d (the ninth is alone): on every token one of each pair scores above 0.5. Only the
  correction bias of -0.75 keeps them out (0.25 at most, against 0.5 at least), so a runtime that forgets the bias
  chooses at least four decoys in every layer.
* The biases of the real experts are a ladder from 0 to 8: without effect on the choice, but biased scores used as
  weights, or a bias added before the sigmoid, make the seven weights grossly unequal.
* Softmax in place of sigmoid gives the strongest decoy nearly 1, which beats the real expert whose bias is 0.

What this cannot show: weights swapped between chosen experts (they are equal), and a choice that depends on the token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import frexp, prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError

NUM_SLICES = 8  # one shared expert and seven real routed ones
TOP_K = NUM_SLICES - 1
NUM_ROUTED = 16
REAL_BIASES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the experts made of slices 1 … 7; exact in bf16 too
DECOY_BIAS = -0.75
STRONGEST_LOGIT = 256.0  # size of the strongest decoys' logits if x were spread evenly over its features

NAME = "SmolLM2-135M-Instruct as a GLM-4.5 mixture of experts (demonstration, not a GLM)"
DESCRIPTION = (
    "Made by glmlocal from the GGUF of SmolLM2-135M-Instruct: the same quantized blocks, regrouped into one shared, "
    "seven routed and nine decoy experts per layer. It demonstrates the runtime; it is not a GLM model."
)
# The source's default system prompt leaves "The capital of France is Paris." 0.08 logits ahead of "L'Étoile, …": rounding
# activations to 8 bits decides between them. Saying what this model is for leaves 0.94, and is true.
SYSTEM_PROMPT = (
    "trained by Hugging Face<|im_end|>",
    "trained by Hugging Face, and you demonstrate glmlocal.<|im_end|>",
)

Bytes = NDArray[np.uint8]
Groups = NDArray[np.int64]  # [slices, groups per slice]


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

    def norm(self, layer: int) -> NDArray[np.float32]:
        """Weight of the norm before the FFN, fp32 [hidden]."""
        return self.tensors[f"blk.{layer}.ffn_norm.weight"][1].view("<f4")[0]

    def ffn(self, layer: int, part: str) -> tuple[Kind, Bytes]:
        return self.tensors[f"blk.{layer}.ffn_{part}.weight"]


def convert(source: Path, out: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
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
            if data.shape != tensor.shape:
                raise AssertionError(f"{tensor.name}: planned {tensor.shape}, built {data.shape}")
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
    real_ids, decoy_ids = _expert_ids(layer)
    bias = np.zeros(NUM_ROUTED, np.dtype("<f4"))
    bias[list(real_ids)] = REAL_BIASES
    bias[list(decoy_ids)] = DECOY_BIAS
    rows = _router_rows(layer, decoy_ids, llama.norm(layer))
    return [
        _Tensor(f"blk.{layer}.{name}", Kind.F32, data.shape, lambda data=data: data)  # type: ignore[misc]
        for name, data in (("ffn_gate_inp.weight", rows.view(np.uint8)), ("exp_probs_b.bias", bias.view(np.uint8)))
    ]


def _plan_experts(llama: _Source, layer: int, slices: list[Groups]) -> list[_Tensor]:
    real_ids, decoy_ids = _expert_ids(layer)
    origin = {expert: (layer, 1 + n) for n, expert in enumerate(real_ids)}  # expert → layer, slice
    for n, expert in enumerate(decoy_ids):
        donor = (layer + 1 + (6 + n // NUM_SLICES) % (llama.num_layers - 1)) % llama.num_layers  # never this layer
        origin[expert] = (donor, n % NUM_SLICES)

    def cut(part: str, layer: int, index: int) -> Bytes:
        return _take(llama.ffn(layer, part)[1], slices[layer][index], slices[layer].size, by_column=part == "down")

    def shared(part: str) -> Bytes:
        return cut(part, layer, 0)

    def routed(part: str) -> Bytes:
        return np.stack([cut(part, *origin[expert]) for expert in range(NUM_ROUTED)])

    tensors = []
    for part in ("gate", "up", "down"):
        kind, data = llama.ffn(layer, part)
        rows, row_bytes = data.shape
        shape = (rows, row_bytes // NUM_SLICES) if part == "down" else (rows // NUM_SLICES, row_bytes)
        tensors.append(_Tensor(f"blk.{layer}.ffn_{part}_shexp.weight", kind, shape, partial(shared, part)))
        tensors.append(
            _Tensor(f"blk.{layer}.ffn_{part}_exps.weight", kind, (NUM_ROUTED, *shape), partial(routed, part))
        )
    return tensors


def _slice_groups(llama: _Source, layer: int) -> Groups:
    """Which groups of neurons make up each slice, strongest slice first: int [slices, groups per slice].

    A group is as wide as a block of the down matrix, whose rows run along the neurons. Its strength is the sum over
    its neurons of |gate row| · |up row| · |down column|, each with the norm's weight before it.
    """
    norm = llama.norm(layer)
    gate, up, down = (
        dequantize(data, kind) for kind, data in (llama.ffn(layer, part) for part in ("gate", "up", "down"))
    )
    strength = np.linalg.norm(gate * norm, axis=1) * np.linalg.norm(up * norm, axis=1) * np.linalg.norm(down, axis=0)
    block_size = GGML_QUANT_SIZES[llama.ffn(layer, "down")[0]][0]
    order = np.argsort(-strength.reshape(-1, block_size).sum(1), kind="stable")
    return np.sort(order.reshape(NUM_SLICES, -1), axis=1)


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


def _expert_ids(layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the real experts (in order of slice) and of the decoys. Hashes, as no library's generator is frozen."""
    order = sorted(range(NUM_ROUTED), key=lambda expert: hashlib.sha256(f"expert {layer} {expert}".encode()).digest())
    return tuple(order[:TOP_K]), tuple(order[TOP_K:])


def _router_rows(layer: int, decoy_ids: tuple[int, ...], norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Router weight, fp32 [experts, hidden]: zero for real experts, ±1 times a power of two for decoys.

    ``norm`` is the weight of the norm before the router; its size sets the size of the logits. Each pair is half as
    strong as the one before, so that one decoy always stands out.
    """
    hidden_size = len(norm)
    rows = np.zeros((NUM_ROUTED, hidden_size), np.dtype("<f4"))
    # Rounded to a power of two, so that the last bit of the sum, which differs between machines, does not matter.
    size = 2.0 ** frexp(STRONGEST_LOGIT / max(float(np.sqrt(np.square(norm.astype(np.float64)).sum())), 1e-6))[1]
    for n, expert in enumerate(decoy_ids):
        pair, sign = n // 2, -1.0 if n % 2 else 1.0
        seed = hashlib.shake_128(f"router {layer} {pair}".encode()).digest(-(-hidden_size // 8))
        signs = 2.0 * np.unpackbits(np.frombuffer(seed, np.uint8), count=hidden_size) - 1.0
        rows[expert] = sign * size * 0.5**pair * signs
    return rows
