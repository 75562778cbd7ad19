"""Footprint: what a model weighs, part by part, as a file and as this runtime holds it. Torch-free values.

Who makes one: ``models/footprints.py`` from a release of the catalogue or from the tensors of a checkpoint. Who reads
one: the planner, and the loader, which compares it with what it allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(frozen=True)  # without slots, as Footprint: sums are kept
class Layer:
    """One decoder layer. The routed experts of a layer are alike; layers that are alike are mostly one object."""

    parts: tuple[Part, ...]  # everything but the routed experts
    expert: Part | None = None  # ONE routed expert: gate, up and down; None in a dense layer
    num_experts: int = 0

    @cached_property
    def resident_bytes(self) -> int:
        """Of all but the routed experts."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def nbytes(self) -> int:
        return self.resident_bytes + (self.expert.nbytes * self.num_experts if self.expert else 0)

    @cached_property
    def params(self) -> int:
        experts = self.expert.params * self.num_experts if self.expert else 0
        return sum(part.params for part in self.parts) + experts

    @cached_property
    def checkpoint_bytes(self) -> int:
        experts = self.expert.checkpoint_bytes * self.num_experts if self.expert else 0
        return sum(part.checkpoint_bytes for part in self.parts) + experts


@dataclass(frozen=True)
class Footprint:
    """A model in one quantization."""

    name: str  # as a person would ask for it: "GLM-4.5-Air-FP8", or the checkpoint's name
    quant: str  # "keep", "int8", "int4": what loading does to linear weights that are not quantized yet
    top: tuple[Part, ...]  # embeddings, final norm, head; a table that is both is counted as the head
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
    # GLM-5's indexers look at all positions, in front of the window. Empty where nothing does.
    index_flops: tuple[int, ...] = ()  # as attention_flops; 0 in layers that reuse an earlier layer's choice
    index_kv_bytes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # their share of kv_bytes
    # Of a recorded route trace: hit rate with 0, 1, … all experts of a layer at hand (planner.routes); None: no trace.
    hit_curve: tuple[float, ...] | None = None

    @cached_property
    def total_params(self) -> int:
        """Of the whole checkpoint, MTP included."""
        return sum(part.params for part in self.top) + sum(layer.params for layer in self._all_layers)

    @property
    def holds_mtp(self) -> bool:
        """Does the runtime load the MTP layer? It leaves one alone that is incomplete or stored in an unknown type."""
        return self.mtp is not None and self.mtp.nbytes > 0

    @cached_property
    def active_params(self) -> int:
        """Of one token: everything but the experts that it is not sent to; MTP not counted, the embedding table is."""
        fixed = sum(part.params for part in (*self.top, *(p for layer in self.layers for p in layer.parts)))
        experts = sum(layer.expert.params for layer in self.layers if layer.expert)
        return fixed + experts * self.num_experts_per_tok

    @cached_property
    def weights_bytes(self) -> int:
        """Of all tensors in the release's files."""
        return sum(part.checkpoint_bytes for part in self.top) + sum(one.checkpoint_bytes for one in self._all_layers)

    @cached_property
    def nbytes(self) -> int:
        """Of all weights as the runtime holds them."""
        return sum(part.nbytes for part in self.top) + sum(layer.nbytes for layer in self._all_layers)

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """All layers, MTP not."""
        return sum(self.kv_bytes[kv_dtype])

    @property
    def _all_layers(self) -> tuple[Layer, ...]:
        return self.layers if self.mtp is None else (*self.layers, self.mtp)
