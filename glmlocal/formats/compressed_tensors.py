"""compressed-tensors releases of integers and 4-bit floats: which tensors make a matrix. Headers only.

    "pack-quantized"                     X.weight_packed int32 [out, in · bits / 32], X.weight_shape int64 [2]
    "int-quantized", "naive-quantized"   X.weight int8 [out, in]

with X.weight_scale [out, groups], and X.weight_zero_point where codes are not symmetric: packed along the output
beside packed codes, int8 [out, groups] beside others. weight = scale · (code − zero point), both signed. How many bits
and columns per group is in the config's groups, found by their targets: a module's name, "re:" and a regular expression
matched from its start, or "Linear", in this order of precedence. What a release says of activations is for engines that
quantize them. Packed codes that are bytes are 4-bit floats (``fp4``); FP8 releases are ``fp8``'s. ``stored_rows`` reads
the bytes. Source: compressed-tensors, compressors/ and utils/match.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats import fp4
from glmlocal.formats.gptq import compiled
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.schemes import WHOLE_ROW
from glmlocal.formats.stored_matrix import (
    BITS,
    FLOATS,
    Offset,
    StoredMatrix,
    checked,
    group_size,
    must_have_shape,
    num_groups,
    part,
    scale_type,
    scheme,
)

SUFFIXES = (".weight_packed", ".weight")
FORMATS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a config group says of weights."""

    bits: int
    group_size: int
    is_symmetric: bool


@dataclass(frozen=True, slots=True)
class _Target:
    rank: int  # a name 0, a pattern 1, a class 2
    name: str
    pattern: re.Pattern[str] | None
    group: Mapping[str, Any]

    def matches(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.match(module) is not None
        return self.name in (module, "Linear")


def reader(settings: Mapping[str, Any]) -> Callable[[str, Mapping[str, TensorRef]], StoredMatrix]:
    """Module name, tensors → the matrix. Raises CheckpointError now for settings that cannot be read, and then."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(f"config_groups in the quantization config is {quoted(groups)}; objects were expected")
    for found in (settings, *groups.values()):
        if found.get("format") not in (None, *FORMATS):
            raise CheckpointError(
                f"it is compressed-tensors in the format {quoted(found['format'])}; {', '.join(FORMATS)} are supported"
            )
    targets = sorted((target for group in groups.values() for target in _targets(group)), key=lambda found: found.rank)

    def read(module: str, tensors: Mapping[str, TensorRef]) -> StoredMatrix:
        target = next((target for target in targets if target.matches(module)), None)
        if target is None:
            raise CheckpointError(f"{quoted(module)} is quantized, but no target of the quantization config names it")
        if f"{module}.weight_packed" in tensors and tensors[f"{module}.weight_packed"].dtype == "U8":
            return fp4.compressed(module, tensors)
        weights = _weights(target.group, module)
        if f"{module}.weight_packed" in tensors:
            return _packed(module, tensors, weights)
        return _int8(module, tensors, weights)

    return read


def _targets(group: Mapping[str, Any]) -> list[_Target]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"targets in the quantization config are {quoted(targets)}; a list of names was expected")
    found = []
    for target in targets:
        if target.startswith("re:"):
            found.append(_Target(1, target, compiled(target[3:]), group))
        else:
            found.append(_Target(2 if target == "Linear" else 0, target, None, group))
    return found


def _weights(group: Mapping[str, Any], module: str) -> _Weights:
    where = f"the quantization config of {quoted(module)}"
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} says {quoted(weights)} of weights; an object was expected")
    kind, bits, symmetric = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("symmetric", True)
    if kind != "int" or type(bits) is not int or bits not in BITS or type(symmetric) is not bool:
        raise CheckpointError(
            f"{where} says type {quoted(kind)}, num_bits {quoted(bits)}, symmetric {quoted(symmetric)}; integers of "
            f"{', '.join(map(str, BITS))} bits are supported"
        )
    size = group_size(weights.get("group_size"), where)
    strategy = weights.get("strategy") or ("channel" if size == WHOLE_ROW else "group")
    if strategy not in _STRATEGIES:
        raise CheckpointError(f"{where} says strategy {quoted(strategy)}; {', '.join(_STRATEGIES)} are supported")
    return _Weights(bits, size if strategy == "group" else WHOLE_ROW, symmetric)


def _packed(module: str, tensors: Mapping[str, TensorRef], weights: _Weights) -> StoredMatrix:
    codes = part(tensors, f"{module}.weight_packed", ("I32",))
    scales = _scales(module, tensors)
    rows, columns = codes.shape[0], _columns(codes, scales, weights)
    groups = num_groups(columns, weights.group_size)
    if codes.shape[1] != -(-columns * weights.bits // 32):
        raise CheckpointError(
            f"tensor {codes.name} has {codes.shape[1]} words a row; {columns} columns of {weights.bits} bits without "
            f"gaps are {-(-columns * weights.bits // 32)}"
        )
    must_have_shape(scales, *_per_group(rows, groups))
    zeros = tensors.get(f"{module}.weight_zero_point")
    if zeros is not None:
        zeros = checked(zeros, ("I32", "I8"), 2)
        must_have_shape(zeros, (rows if zeros.dtype == "I8" else -(-rows * weights.bits // 32), groups))
    g_idx = tensors.get(f"{module}.weight_g_idx")
    if g_idx is not None:
        must_have_shape(checked(g_idx, ("I32", "I64"), 1), (columns,))
    shape = tensors.get(f"{module}.weight_shape")
    if shape is not None:
        must_have_shape(checked(shape, ("I64", "I32"), 1), (2,))
    made = scheme("compressed", weights.bits, weights.group_size, _offset(weights, zeros, codes), scale_type(scales))
    return StoredMatrix("packed", made, (rows, columns), codes, scales, zeros, g_idx, shape)


def _columns(codes: TensorRef, scales: TensorRef, weights: _Weights) -> int:
    """Words hold up to this many codes; whole groups may be fewer, by less than a word."""
    most = 32 * codes.shape[1] // weights.bits
    in_groups = scales.shape[-1] * weights.group_size if len(scales.shape) == 2 else most
    fewest = 32 * (codes.shape[1] - 1) // weights.bits + 1
    return in_groups if fewest <= in_groups <= most else most


def _int8(module: str, tensors: Mapping[str, TensorRef], weights: _Weights) -> StoredMatrix:
    codes = part(tensors, f"{module}.weight", ("I8",))
    scales = _scales(module, tensors)
    rows, columns = codes.shape
    groups = num_groups(columns, weights.group_size)
    must_have_shape(scales, *_per_group(rows, groups))
    zeros = tensors.get(f"{module}.weight_zero_point")
    if zeros is not None:
        must_have_shape(checked(zeros, ("I8",), 2), (rows, groups))
    made = scheme("compressed", 8, weights.group_size, _offset(weights, zeros, codes), scale_type(scales))
    return StoredMatrix("int8", made, (rows, columns), codes, scales, zeros)


def _scales(module: str, tensors: Mapping[str, TensorRef]) -> TensorRef:
    name = f"{module}.weight_scale"
    rank = len(tensors[name].shape) if name in tensors else 2
    return part(tensors, name, FLOATS, min(rank, 2))


def _per_group(rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that scales may have; one number is for the whole matrix."""
    return ((rows, groups), (rows,), (1, 1), (1,), ()) if groups == 1 else ((rows, groups),)


def _offset(weights: _Weights, zeros: TensorRef | None, codes: TensorRef) -> Offset:
    if weights.is_symmetric:
        return "symmetric"
    if zeros is None:
        raise CheckpointError(f"the zero points of {codes.name} are missing; download the checkpoint again")
    return "zero_point"
