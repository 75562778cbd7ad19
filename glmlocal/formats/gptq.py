"""GPTQ releases (AutoGPTQ, GPTQModel): which tensors make a matrix. Headers only; ``stored_rows`` reads the bytes.

    X.qweight int32 [in · bits / 32, out], X.qzeros int32 [groups, out · bits / 32], X.scales [groups, out], and maybe
    X.g_idx int32 [in].       weight = scale · (code − zero point)

Bits follow from the shapes of qzeros and scales, so mixed releases need no word of the config; it says the group size,
whether all zero points are the middle (``sym``), and whether they are stored minus one (``checkpoint_format`` "gptq")
or as they are ("gptq_v2"). ``dynamic`` overrides that per module: regular expressions matched from the start of the
name, the first one counts; what one beginning with "-:" matches is not quantized.
Sources: GPTQModel, quantization/config.py (dynamic), nn_modules/qlinear (packing), utils/model.py (v1 and v2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.schemes import WHOLE_ROW
from glmlocal.formats.stored_matrix import (
    FLOATS,
    SMALLEST_GROUP,
    Layout,
    StoredMatrix,
    group_size,
    must_have_shape,
    num_groups,
    part,
    scale_type,
    scheme,
)

SUFFIX = ".qweight"
_BITS = (2, 3, 4, 8)
_LAYOUTS: dict[object, Layout] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
_MAX_PATTERN = 1000  # characters of a regular expression in a config
_REPETITION, _REPEATED_GROUP, _MAX_REPETITIONS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 8


def reader(settings: Mapping[str, Any]) -> Callable[[str, Mapping[str, TensorRef]], StoredMatrix]:
    """Module name, tensors → the matrix. Raises CheckpointError now for settings that cannot be read, and then."""
    stored_as = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    layout = _LAYOUTS.get(stored_as) if isinstance(stored_as, str) else None
    if layout is None:
        raise CheckpointError(f"it is GPTQ in the format {quoted(stored_as)}; gptq and gptq_v2 are supported")
    rules = _rules(settings.get("dynamic"))

    def read(module: str, tensors: Mapping[str, TensorRef]) -> StoredMatrix:
        override = next((values for pattern, values in rules if pattern.match(module)), {})
        return _matrix(module, tensors, layout, {**settings, **override})

    return read


def _rules(dynamic: Any) -> list[tuple[re.Pattern[str], Mapping[str, Any]]]:
    if dynamic is None or dynamic is False:
        return []
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic in the quantization config is {quoted(dynamic)}; an object was expected")
    rules: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
    for key, values in dynamic.items():
        excludes, pattern = key.startswith("-:"), key[2:] if key.startswith(("-:", "+:")) else key
        if not excludes and not isinstance(values, Mapping):
            raise CheckpointError(f"dynamic says {quoted(values)} of {quoted(key)}; an object was expected")
        rules.append((compiled(pattern), {} if excludes else values))  # what is quantized all the same, the shapes tell
    return rules


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression of a config, but for such as could take forever on a name. Raises CheckpointError."""
    try:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError("too long")
        if _REPEATED_GROUP.search(pattern):
            raise ValueError("a group is repeated")
        if len(_REPETITION.findall(pattern)) > _MAX_REPETITIONS:
            raise ValueError(f"more than {_MAX_REPETITIONS} repetitions")
        return re.compile(pattern)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"the quantization config has {quoted(pattern)}, which is no regular expression that is taken: "
            f"{str(error)[:80]}"
        ) from error


def _matrix(module: str, tensors: Mapping[str, TensorRef], layout: Layout, settings: Mapping[str, Any]) -> StoredMatrix:
    codes = part(tensors, f"{module}.qweight", ("I32",))
    zeros = part(tensors, f"{module}.qzeros", ("I32",))
    scales = part(tensors, f"{module}.scales", FLOATS)
    groups, rows = scales.shape
    bits = next((bits for bits in _BITS if -(-rows * bits // 32) == zeros.shape[1]), None)
    if bits is None:
        raise CheckpointError(
            f"tensors {zeros.name} {list(zeros.shape)} and {scales.name} {list(scales.shape)} are of no known number "
            f"of bits; {', '.join(map(str, _BITS))} are supported"
        )
    columns, rest = divmod(32 * codes.shape[0], bits)
    if rest or codes.shape[1] != rows or zeros.shape[0] != groups:
        raise CheckpointError(
            f"tensors {codes.name} {list(codes.shape)}, {zeros.name} {list(zeros.shape)} and {scales.name} "
            f"{list(scales.shape)} do not belong together; download the checkpoint again"
        )
    g_idx = tensors.get(f"{module}.g_idx")
    if g_idx is not None:
        g_idx = part(tensors, g_idx.name, ("I32", "I64"), 1)
        must_have_shape(g_idx, (columns,))
    size = _group_size(settings.get("group_size", 128), columns, groups, scales)
    offset = "symmetric" if settings.get("sym") is True else "zero_point"
    made = scheme("gptq", bits, size, offset, scale_type(scales))
    return StoredMatrix(layout, made, (rows, columns), codes, scales, zeros, g_idx)


def _group_size(said: Any, columns: int, groups: int, scales: TensorRef) -> int:
    """What the config says, if that makes as many groups as there are; else what makes them evenly."""
    size = group_size(said, f"the quantization config of {scales.name}")
    if groups == 1 and size >= columns:
        return WHOLE_ROW
    if num_groups(columns, size) == groups:
        return size
    even, rest = divmod(columns, groups)
    if groups == 1:
        return WHOLE_ROW
    if rest or even < SMALLEST_GROUP or even & (even - 1):
        raise CheckpointError(
            f"tensor {scales.name} has scales of {groups} groups for {columns} columns; the config's group_size "
            f"{'-1' if size == WHOLE_ROW else size} makes {num_groups(columns, size)}"
        )
    return even
