"""Tensors → the Parts and Layers of a Footprint: what each tensor is for, and what the runtime holds of it. Torch-free.

This follows ``weights.py`` and ``glm4_moe.py``: matrices packed for the native kernels; norms, biases and routers in
fp32; embedding tables not at all, their rows are read from the file. What the runtime cannot run yet is counted as if
it were packed the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from glmlocal.formats.forms import FORMS, Form
from glmlocal.formats.index import TensorRef
from glmlocal.models.footprint import Layer, Part

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a release or a file."""

    name: str  # the checkpoint's
    shape: tuple[int, ...]
    form: Form
    nbytes: int  # with its scales
    is_packed: bool = False  # of an expert pack: held just as it is


@lru_cache(maxsize=1 << 12)
def component_of(name: str) -> str:
    """One of ``footprint.COMPONENTS``."""
    for component, mark in _MARKS:
        if mark in name:
            return component
    return "attention"


_MARKS = (
    ("routed", ".mlp.experts."),
    ("shared", ".mlp.shared_experts."),
    ("router", ".mlp.gate."),
    ("dense", ".mlp."),
    ("embeddings", "embed_tokens."),
    ("head", "lm_head."),
    ("head", ".shared_head.head."),
    ("norms", "norm."),  # input_layernorm, q_norm, enorm, shared_head.norm …
    ("mtp", ".eh_proj."),
)


def top_parts(tensors: Iterable[Stored], quant: str, *, is_tied: bool = False) -> tuple[Part, ...]:
    """Of what is in no layer. A tied table is packed as the head, and all that there is of it is counted there."""
    parts = []
    for tensor in tensors:
        component = component_of(tensor.name)
        if component == "embeddings" and is_tied:
            component = "head"
        parts.append(_part(tensor, component, quant))
    return merged(parts)


def layer_of(
    tensors: Iterable[Stored], quant: str, *, in_mtp: bool = False, num_experts: int | None = None
) -> tuple[Layer, bool]:
    """One layer, and whether its routed experts are alike; where they are not, the largest stands for all.

    ``num_experts`` says for how many the given ones stand; None: for themselves. MTP layers keep at least 8 bits.
    """
    quant = "int8" if in_mtp and quant == "int4" else quant
    parts: list[Part] = []
    experts: dict[str, list[Stored]] = {}
    for tensor in tensors:
        expert = _EXPERT.search(tensor.name)
        if expert is not None:
            experts.setdefault(expert[1], []).append(tensor)
        else:
            parts.append(_part(tensor, component_of(tensor.name), quant))
    if not experts:
        return Layer(merged(parts)), True
    kinds = {tuple((one.shape, one.form.name, one.nbytes) for one in three): three for three in experts.values()}
    found = [_one_expert([_part(matrix, "routed", quant) for matrix in three]) for three in kinds.values()]
    largest = max(found, key=lambda part: (part.nbytes, part.checkpoint_bytes))
    return Layer(merged(parts), largest, num_experts or len(experts)), len(found) == 1


def unused_layer(refs: Iterable[TensorRef], weights: Collection[str]) -> Layer:
    """A layer that is in the file and that the runtime leaves there; ``weights`` tells parameters from scales."""
    return Layer(
        merged(
            Part(
                component_of(ref.name), ref.dtype, ref.num_elements if ref.name in weights else 0, ref.nbytes, nbytes=0
            )
            for ref in refs
        )
    )


def joined(layers: Iterable[Layer]) -> Layer | None:
    """MTP layers as one, which they are in every release; None if there are none."""
    result: Layer | None = None
    for layer in layers:
        if result is None:
            result = layer
        else:
            parts = merged((*result.parts, *layer.parts))
            result = Layer(parts, result.expert, result.num_experts + layer.num_experts)
    return result


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts that differ in numbers only, as one."""
    found: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        found.setdefault((part.component, part.scheme), []).append(part)
    return tuple(_sum(alike, alike[0].scheme) for alike in found.values())


def _one_expert(matrices: list[Part]) -> Part:
    """Gate, up and down; of several schemes where the file mixes them ("Q4_K + Q6_K")."""
    expert = _sum(matrices, " + ".join(dict.fromkeys(part.scheme for part in matrices)))
    return replace(expert, is_integer=all(part.is_integer for part in matrices))


def _sum(parts: Sequence[Part], scheme: str) -> Part:
    return Part(
        component=parts[0].component,
        scheme=scheme,
        params=sum(part.params for part in parts),
        checkpoint_bytes=sum(part.checkpoint_bytes for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        is_integer=parts[0].is_integer,
    )


def _part(tensor: Stored, component: str, quant: str) -> Part:
    params = math.prod(tensor.shape)
    if component == "embeddings":
        return Part(component, tensor.form.name, params, tensor.nbytes, nbytes=0)
    if len(tensor.shape) == 1:
        return Part(component, "f32", params, tensor.nbytes, params * _F32_BYTES)
    rows, columns = tensor.shape
    form = FORMS["f32"] if component == "router" else tensor.form
    if component != "router" and not tensor.is_packed:
        form = _held_form(form, component, quant)
    return Part(component, form.name, params, tensor.nbytes, form.held_bytes(rows, columns), form.is_integer)


def _held_form(form: Form, component: str, quant: str) -> Form:
    """As stored, or what ``--quant`` makes of plain floats and FP8; the head never goes below 8 bits."""
    if quant == "keep" or (form.scheme is not None and form.scheme.code_type == "integer"):
        return form
    return FORMS["int8" if component == "head" else quant]
