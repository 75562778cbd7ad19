"""Footprint: what a model weighs, part by part, as a file and as this runtime holds it. Torch-free values.

Who makes one: ``models/footprints.py`` from a release of the catalogue or from the tensors of a checkpoint. Who reads
one: the planner, and the loader, which compares it with what it allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COMPONENTS = ("embeddings", "attention", "dense", "shared", "routed", "router", "norms", "mtp", "head")


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of one component that are stored alike and live together."""

    component: str  # one of COMPONENTS
    scheme: str  # as held: "bf16", "f32", "fp8_channel", "int4 group 32", "Q4_K", …
    params: int  # the model's parameters; scales and zero points are not parameters
    checkpoint_bytes: int  # in the release's files, scales included
    nbytes: int  # as the runtime holds them, scales and padding included
    is_integer: bool = False  # codes are integers: multiplied with int8 activations where those are used


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. The routed experts of a layer are alike."""

    parts: tuple[Part, ...]  # everything but the routed experts
    expert: Part | None = None  # ONE routed expert: gate, up and down; None in a dense layer
    num_experts: int = 0

    @property
    def resident_bytes(self) -> int:
        """Of all but the routed experts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        return self.resident_bytes + (self.expert.nbytes * self.num_experts if self.expert else 0)


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model in one quantization."""

    name: str  # as a person would ask for it: "GLM-4.5-Air-FP8", or the checkpoint's name
    quant: str  # "keep", "int8", "int4": what loading does to linear weights that are not quantized yet
    top: tuple[Part, ...]  # embeddings, final norm, head
    layers: tuple[Layer, ...]
    mtp: Layer | None  # the MTP layer with eh_proj, its norms, and its copies of embeddings and head where it has them
    num_experts_per_tok: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    kv_bytes: Mapping[str, tuple[int, ...]]  # KV dtype → bytes of one token in each layer, scales included
    mtp_kv_bytes: Mapping[str, int]
    attention_flops: tuple[int, ...]  # of one query with one stored position, in each layer; 2 per multiply-add
    attention_window: int | None  # positions that one query attends to at most (GLM-5's index_topk); None: all
    file_bytes: int  # what is downloaded: weights, tokenizer, config
    is_exact: bool  # from the tensors' own sizes; False where a release's form is known but not each tensor's

    @property
    def total_params(self) -> int:
        """Of the whole checkpoint, MTP included."""
        return sum(part.params * count for part, count in self._parts())

    @property
    def active_params(self) -> int:
        """Of one token: everything but the experts that it is not sent to; MTP not counted, the embedding table is."""
        fixed = sum(part.params for part in (*self.top, *(p for layer in self.layers for p in layer.parts)))
        experts = sum(layer.expert.params for layer in self.layers if layer.expert)
        return fixed + experts * self.num_experts_per_tok

    @property
    def weights_bytes(self) -> int:
        """Of all tensors in the release's files."""
        return sum(part.checkpoint_bytes * count for part, count in self._parts())

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """All layers, MTP not."""
        return sum(self.kv_bytes[kv_dtype])

    def _parts(self) -> Iterator[tuple[Part, int]]:
        """Every part with how many there are of it."""
        yield from ((part, 1) for part in self.top)
        for layer in (*self.layers, *([self.mtp] if self.mtp else [])):
            yield from ((part, 1) for part in layer.parts)
            if layer.expert is not None:
                yield layer.expert, layer.num_experts
