"""safetensors: headers read and checked by hand, so that a tensor is an offset into a file and nothing is copied.

A file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes, back to back. The rules are
those of the reference implementation (huggingface/safetensors ``tensor.rs``): header of at most 100 MB, no duplicate
names, every byte of the data owned by exactly one tensor. Zero-sized tensors are refused too; no model has any.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorRef, not_the_file_itself, quoted, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_MAX_TENSOR_BYTES = 1 << 62
MAX_EXPERTS = 4096
_DTYPES_OF_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
_BITS = {dtype: bits for bits, dtypes in _DTYPES_OF_BITS.items() for dtype in dtypes}
_STACKED = re.compile(r"(.*\.mlp\.)(?:experts|switch_mlp)\.(gate_up|gate|up|down)_proj(?:\.(weight|scales|biases))?")
_SEPARATORS = frozenset("/\\\0")


def read_directory(directory: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    """All tensors of a release, and its files. Raises CheckpointError (OSError is the caller's to translate)."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    for file in (single, index):
        if os.path.lexists(file) and not file.is_file():
            raise CheckpointError(f"{file} is a broken link or not a file; download it again")
    if single.is_file():  # preferred over an index, as in transformers
        return per_expert(read_file(single)), (single,)
    if not index.is_file():
        found = next(name for name in sorted(os.listdir(directory)) if name.endswith(".safetensors"))
        raise CheckpointError(
            f"{directory} has {quoted(found)} but neither {SINGLE_FILE} nor {INDEX_FILE}; download the missing file"
        )
    weight_map = read_weight_map(index)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    absent = [shard for shard in sorted(shards) if not (directory / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{directory} lacks {len(absent)} of the {len(shards)} files of its index, {quoted(absent[0])} first; "
            "download them again"
        )
    refs: dict[str, TensorRef] = {}
    for shard in sorted(shards):
        in_file = read_file(directory / shard)
        wanted = shards[shard]
        lost = sorted(wanted - in_file.keys())
        if lost:
            raise CheckpointError(
                f"{directory / shard} has no tensor {quoted(lost[0])} although {INDEX_FILE} places it there; "
                "the index and the files are of different releases"
            )
        refs.update((name, ref) for name, ref in in_file.items() if name in wanted)
    return per_expert(refs), tuple(directory / shard for shard in sorted(shards))


def read_file(path: Path) -> dict[str, TensorRef]:
    """The tensors of one file, by name, in the order of their bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length == 0:
            raise CheckpointError(f"{path} is not a safetensors file: it has no header; download it again")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} claims a header of {length:,} bytes, {MAX_HEADER_BYTES:,} is the limit"
                f"{not_the_file_itself(prefix)}"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path} ends inside its header ({8 + length - size:,} bytes missing); download again"
            )
        header = _parse_header(path, file.read(length))
    return _check_layout(path, header, 8 + length, size)


def per_expert(refs: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Give stacked routed experts the names and shapes of the per-expert form that is released.

    ``mlp.experts.gate_up_proj`` [E, 2I, H] (gate rows first) and ``mlp.experts.down_proj`` [E, H, I], as transformers
    keeps them in memory, and mlx-lm's ``mlp.switch_mlp.{gate,up,down}_proj.{weight,scales,biases}`` [E, out, ·] become
    slices ``mlp.experts.{e}.{gate,up,down}_proj.weight`` (scales, biases).
    """
    out: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None or len(ref.shape) != 3:
            _add(out, ref)
            continue
        experts, rows, columns = ref.shape
        parts = stacked[2].split("_")
        if experts > MAX_EXPERTS or rows % len(parts):
            raise CheckpointError(
                f"tensor {quoted(name)} of {ref.file} has shape {list(ref.shape)}; at most {MAX_EXPERTS} experts of "
                f"{' and '.join(parts)}, of the same size, were expected"
            )
        kind = stacked[3] or "weight"
        names = [f"{stacked[1]}experts.{e}.{part}_proj.{kind}" for e in range(experts) for part in parts]
        for slice_ref in split_tensor(ref, [(expert, (rows // len(parts), columns)) for expert in names]):
            _add(out, slice_ref)
    return out


def split_tensor(ref: TensorRef, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Iterable[TensorRef]:
    """Equal consecutive pieces of a tensor's bytes, under the names and shapes given."""
    parts = list(parts)
    nbytes = ref.nbytes // len(parts)
    for i, (name, shape) in enumerate(parts):
        yield TensorRef(name, ref.file, ref.offset + i * nbytes, nbytes, shape, ref.dtype)


def _add(refs: dict[str, TensorRef], ref: TensorRef) -> None:
    if ref.name in refs:
        raise CheckpointError(f"{ref.file} stores {quoted(ref.name)} twice, once in a stack")
    refs[ref.name] = ref


def read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name, shard in weight_map.items():
        # A plain name only: the file may be a symbolic link (the hub's cache is made of them), but which file that is
        # must be for the directory's owner to say, never for the index.
        if not isinstance(shard, str) or not shard or shard.startswith(".") or _SEPARATORS & set(shard):
            raise CheckpointError(
                f"{index} places {quoted(name)} in {quoted(shard)}; only the plain name of a file beside it is accepted"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} places {quoted(name)} in {quoted(shard)}, which is not a safetensors file")
    return weight_map


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"the header of {path} has {quoted(key)} twice; download it again")
            result[key] = value
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(
            f"the header of {path} is not valid JSON ({str(error)[:200]}); download it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"the __metadata__ in the header of {path} is not an object")
    return header


def _check_layout(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorRef]:
    refs = sorted((_parse_entry(path, name, entry, data_start) for name, entry in header.items()), key=_position)
    position = data_start
    for ref in refs:
        if ref.offset != position:
            what = "overlaps the one before it" if ref.offset < position else "leaves a hole before it"
            raise CheckpointError(f"tensor {quoted(ref.name)} of {path} {what}: the file is damaged")
        position += ref.nbytes
    if position > size:
        raise CheckpointError(f"{path} is truncated: {position - size:,} of {position:,} bytes missing; download again")
    if position < size:
        raise CheckpointError(f"{path} has {size - position:,} bytes that no tensor owns; download it again")
    return {ref.name: ref for ref in refs}


def _position(ref: TensorRef) -> int:
    return ref.offset


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    where = f"tensor {quoted(name)} of {path}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by a JSON {type(entry).__name__}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has dtype {quoted(dtype)}, which safetensors does not define")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) and n > 0 for n in shape):
        raise CheckpointError(f"{where} has shape {quoted(shape)}; a list of positive integers was expected")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where} has data_offsets {quoted(offsets)}; two byte positions were expected")
    begin, end = offsets
    bits = _BITS[dtype]
    for n in shape:
        bits *= n
        if bits > _MAX_TENSOR_BYTES:
            raise CheckpointError(f"{where} has shape {quoted(shape)}: more bytes than any file can hold")
    if end - begin != -(-bits // 8) or bits % 8:
        raise CheckpointError(f"{where} is {dtype} {shape}, which is {bits // 8:,} bytes; data_offsets are {offsets}")
    return TensorRef(name, path, data_start + begin, end - begin, tuple(shape), dtype)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_TENSOR_BYTES
