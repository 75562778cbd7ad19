"""Tensors of a quantized release → one tensor per matrix, under the names that plain releases have.

``joined`` looks at headers alone and never fails: a matrix that cannot be read is left out, and why is told to whoever
needs it (``TensorIndex.unreadable``), so that a checkpoint can be shown that cannot be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats import awq, compressed_tensors, fp4, gptq, mlx
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.stored_matrix import StoredMatrix

Refs = dict[str, TensorRef]
_Reader = Callable[[str, Mapping[str, TensorRef]], StoredMatrix]
_READERS: dict[str, Callable[[Mapping[str, Any]], _Reader]] = {
    "gptq": gptq.reader,
    "awq": awq.reader,
    "compressed-tensors": compressed_tensors.reader,
    "mlx": mlx.reader,
    "modelopt": fp4.reader,
    "quark": fp4.reader,
}
_MARKS = ("U32", "I32", "I8", "U8")  # dtypes of codes


def joined(config: Mapping[str, Any], refs: Refs) -> tuple[Refs, dict[str, str]]:
    """The tensors with those of quantized matrices joined, and why others are not: X.weight → one sentence."""
    modules = dict(_modules(refs))
    if not modules:
        return refs, {}
    method, settings = _quantization(config)
    try:
        read = _READERS[method](settings) if method in _READERS else _unknown(method)
    except CheckpointError as error:
        return refs, {
            f"{module}.weight": f"{quoted(ref.name)} is {ref.dtype}: {error}" for module, ref in modules.items()
        }
    made: dict[str, TensorRef] = {}  # by the names of their codes
    used: set[str] = set()
    unreadable: dict[str, str] = {}
    for module in modules:
        try:
            matrix = read(module, refs)
        except CheckpointError as error:
            unreadable[f"{module}.weight"] = str(error)
            continue
        used.update(part.name for part in matrix.parts)
        name = f"{module}.weight"
        if name in refs and name != matrix.codes.name:
            used.add(name)
            unreadable[name] = f"{quoted(name)} is stored twice, plain and quantized; download the checkpoint again"
            continue
        made[matrix.codes.name] = _ref(name, matrix)
    result: Refs = {}
    for name, ref in refs.items():
        if name in made:
            result[made[name].name] = made[name]
        elif name not in used:
            result[name] = ref
    return result, unreadable


def _modules(refs: Refs) -> Iterator[tuple[str, TensorRef]]:
    """Modules whose codes are in a tensor that no plain or FP8 release has, and that tensor."""
    for name, ref in refs.items():
        module, _, kind = name.rpartition(".")
        if (ref.dtype in _MARKS and kind in ("qweight", "weight_packed", "weight")) or kind == "weight_packed":
            yield module, ref


def _quantization(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Method and settings; mlx-lm writes no method, and the same settings twice."""
    settings = config.get("quantization_config", config.get("compression_config"))
    if isinstance(settings, Mapping) and isinstance(settings.get("quant_method"), str):
        return settings["quant_method"], settings
    settings = config.get("quantization")
    return ("mlx", settings) if isinstance(settings, Mapping) else ("", {})


def _unknown(method: str) -> _Reader:
    if not method:
        raise CheckpointError("it is quantized, but its config.json has no quantization_config that says how")
    raise CheckpointError(f"it is quantized with {quoted(method)}; {', '.join(_READERS)}, FP8 and GGUF are supported")


def _ref(name: str, matrix: StoredMatrix) -> TensorRef:
    codes, num_bytes = matrix.codes, sum(part.nbytes for part in matrix.parts)
    return TensorRef(name, codes.file, codes.offset, num_bytes, matrix.shape, matrix.scheme.name, matrix)
