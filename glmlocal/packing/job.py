"""What making a pack will do, known from headers alone: the pack's header, and the tensors that stay tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.formats.expert_pack import PackHeader, expert_name, file_bytes
from glmlocal.formats.expert_pack_layout import MATRICES, ExpertLayout, expert_layout
from glmlocal.formats.fp8 import FP8_DTYPE, scales_of
from glmlocal.formats.index import Checkpoint, TensorIndex, TensorRef
from glmlocal.formats.schemes import DENSE_DTYPES, QUANTIZED_DTYPES, QuantScheme, scheme_of
from glmlocal.models.config import ModelConfig, check_tensors, mtp_problem
from glmlocal.models.weights import SCHEMES, Quant, finer_quant

_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.")
_SCALE_SUFFIXES = ("", "_scale", "_scale_inv")  # of the tensors that make a matrix


@dataclass(frozen=True, slots=True)
class PackJob:
    """A value; nothing has been read or written."""

    header: PackHeader
    config: ModelConfig
    kind: Literal["safetensors", "gguf"]
    dense: tuple[TensorRef, ...]  # in the order of the source
    source_bytes: tuple[int, ...]  # of the source, per record and then per dense tensor
    left_out: str | None  # why MTP layers of the source are not in the pack, if they are not

    @property
    def pack_bytes(self) -> int:
        return file_bytes(self.header)

    @property
    def dense_bytes(self) -> int:
        return sum(ref.nbytes for ref in self.dense)

    def records(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of every record, in the order of the file."""
        return tuple((layer, expert) for layer in self.header.layouts for expert in range(self.header.num_experts))


def plan_job(checkpoint: Checkpoint, quant: Quant, *, model: str, source: str) -> PackJob:
    """Raises CheckpointError for what cannot be packed, and where loading it would."""
    config, tensors = ModelConfig.from_hf(checkpoint.config), checkpoint.tensors
    if tensors.experts is not None:
        raise ConfigError(f"{checkpoint.path} is packed already; pack the model it was made of")
    has_mtp = check_tensors(config, tensors)
    total = config.num_hidden_layers + config.num_nextn_predict_layers
    last = total if has_mtp else config.num_hidden_layers
    layouts: dict[int, ExpertLayout] = {}
    for layer in range(config.first_k_dense_replace, last):
        in_mtp = layer >= config.num_hidden_layers
        layouts[layer] = _layout(config, tensors, layer, finer_quant(quant) if in_mtp else quant)
    if not layouts:
        raise CheckpointError(f"{checkpoint.path} has no routed experts; there is nothing to pack")
    unused = tuple(f"model.layers.{layer}." for layer in range(last, total))
    kept = (ref for ref in tensors.values() if not _EXPERT.match(ref.name) and not ref.name.startswith(unused))
    dense = [part for ref in kept for part in ref.stored]
    order = {file: place for place, file in enumerate(tensors.files)}
    dense.sort(key=lambda ref: (order[ref.file], ref.offset))
    per_record = [
        sum(ref.nbytes for ref in parts_of(tensors, layer, 0))
        for layer in layouts
        for _ in range(config.n_routed_experts)
    ]
    left_out = any(name.startswith(unused) for name in tensors) if unused else False
    return PackJob(
        PackHeader(model, quant, source, config.n_routed_experts, len(dense), layouts),
        config,
        tensors.kind,
        tuple(dense),
        (*per_record, *(ref.nbytes for ref in dense)),
        mtp_problem(config, tensors) if left_out else None,
    )


def parts_of(tensors: TensorIndex, layer: int, expert: int) -> list[TensorRef]:
    """Every tensor that the expert's record is made of: three matrices, and their scales where they have some."""
    names = (expert_name(layer, expert, matrix) + suffix for matrix in MATRICES for suffix in _SCALE_SUFFIXES)
    return [part for name in names if name in tensors for part in tensors[name].stored]


def _layout(config: ModelConfig, tensors: TensorIndex, layer: int, quant: Quant) -> ExpertLayout:
    """Of all experts of a layer, which must be alike."""
    found: dict[tuple[str | QuantScheme, ...], str] = {}
    for expert in range(config.n_routed_experts):
        names = [expert_name(layer, expert, matrix) for matrix in MATRICES]
        found.setdefault(tuple(_packed_kind(tensors, name, quant) for name in names), names[0])
    if len(found) > 1:
        first, other, *_ = found.values()
        raise CheckpointError(
            f"{tensors.source} stores {first} and {other} in different types; a pack has one for the experts of a "
            "layer: use --quant int8 or int4, or run the model without a pack"
        )
    return expert_layout(config.hidden_size, config.moe_intermediate_size, next(iter(found)))


def _packed_kind(tensors: TensorIndex, name: str, quant: Quant) -> str | QuantScheme:
    dtype, matrix = tensors[name].dtype, tensors[name].matrix
    if matrix is not None:
        return matrix.scheme
    if dtype in QUANTIZED_DTYPES:
        return scheme_of(dtype)
    if quant in SCHEMES:
        return SCHEMES[quant]
    if dtype == FP8_DTYPE:
        return scales_of(tensors, name)[0]
    assert dtype in DENSE_DTYPES  # check_tensors saw to it
    return dtype.lower()
