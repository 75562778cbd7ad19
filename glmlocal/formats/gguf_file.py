"""The GGUF container: metadata and tensor table of one file, every count and length checked before it is believed.

Written by hand because ``gguf.GGUFReader`` trusts what it reads (a length of 2⁶³ is an allocation) and keeps a numpy
array per string: opening a file with GLM's vocabulary (151,552 tokens, 318,088 merges) took it 8.9 s, against 0.2 s
here. The package still says how large a block of each type is. What the names mean is ``formats.gguf``'s business.

Layout (little-endian): magic, version, number of tensors, number of keys; keys (name, type, value); tensor infos (name,
dims, type, offset); padding to ``general.alignment``; data. Source: ggml's docs/gguf.md and gguf.cpp.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorRef, not_the_file_itself, quoted

# GLM's real metadata is about 11 MB. The limits keep a hostile file from costing minutes or gigabytes.
_MAX_HEADER_BYTES = 128 << 20
_MAX_ARRAY_ELEMENTS = 1 << 24  # of all arrays of a file together
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_SMALLEST_FILE = 4 + 4 + 8 + 8
_SMALLEST_KEY, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes in the file
# Types that the gguf package does not know: retired ones, and those of ik_llama.cpp.
# fmt: off
_FOREIGN_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S",
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K",
    144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT",
    156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """One file's metadata and its tensors under their GGUF names, shapes already in torch order."""

    path: Path
    metadata: dict[str, Any]  # int, float, bool, str, or a list of one of them
    tensors: tuple[TensorRef, ...]


def read_gguf(path: Path) -> GGUFFile:
    """Parse and check one file. Raises CheckpointError (OSError is the caller's to translate)."""
    size = path.stat().st_size
    if size < _SMALLEST_FILE:
        raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF file; download it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_gguf(path, data, size)


def parse_gguf(path: Path, data: bytes | mmap.mmap, size: int) -> GGUFFile:
    """Parse and check a file of ``size`` bytes from its first ones. Raises CheckpointError, and HeaderIncomplete where
    ``data`` ends before the header does although the file goes on."""
    if len(data) < min(size, _SMALLEST_FILE):
        raise HeaderIncomplete
    try:
        return _parse(path, data, size)
    except _Bad as error:
        raise CheckpointError(f"{path}: {error}") from None


def raw_metadata(path: Path) -> list[tuple[str, bytes]]:
    """Every key with the bytes of its entry (name, type and value) as they are in the file: to be written again.

    Raises CheckpointError as ``read_gguf`` does.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, len(data))
        entries = []
        try:
            _, key_count = _check_preamble(cursor)
            for i in range(key_count):
                start = cursor.position
                key = cursor.string(f"the name of key {i} of {key_count}")
                cursor.value(cursor.number("I", key), key)
                entries.append((key, data[start : cursor.position]))
        except _Bad as error:
            raise CheckpointError(f"{path}: {error}") from None
        return entries


class HeaderIncomplete(Exception):
    """More of the file's beginning is needed."""


class _Bad(Exception):
    """What is wrong with the file, without its name."""


class _Cursor:
    """Reads forward through the header and never past it."""

    def __init__(self, data: bytes | mmap.mmap, size: int) -> None:
        self.data = data
        self.size = size  # of the file, of which ``data`` may be the beginning only
        self.position = 0
        self.end = min(len(data), _MAX_HEADER_BYTES)
        self.elements_left = _MAX_ARRAY_ELEMENTS

    def take(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` and return where they start."""
        start = self.position
        if nbytes > self.end - start:
            if start + nbytes > len(self.data) and start + nbytes <= min(self.size, _MAX_HEADER_BYTES):
                raise HeaderIncomplete
            if start + nbytes > self.size:
                raise _Bad(f"the file ends inside {what} ({nbytes:,} bytes from byte {start:,}); download it again")
            raise _Bad(f"metadata and tensor table are larger than {_MAX_HEADER_BYTES:,} bytes at {what}")
        self.position = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _Bad(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind == _BOOL:
            return self.number("B", what) != 0
        if kind not in _SCALARS:
            raise _Bad(f"{what} has value type {kind}, which GGUF does not define")
        return self.number(_SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind != _STRING and kind not in _SCALARS:
            raise _Bad(f"{what} is an array of value type {kind}, which is not supported")
        self.elements_left -= count
        if self.elements_left < 0:
            raise _Bad(f"{what} claims {count:,} elements; {_MAX_ARRAY_ELEMENTS:,} in all arrays is the limit")
        if kind == _STRING:
            return self._strings(count, what)
        codes = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack_from(codes, self.data, self.take(struct.calcsize(codes), what)))

    def _strings(self, count: int, what: str) -> list[str]:
        # Half a million iterations for a GLM: everything but the length check is kept out of the loop.
        data, position, end, unpack = self.data, self.position, self.end, struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                if position > end - 8:
                    break
                start = position + 8
                stop = start + unpack(data, position)[0]
                if stop > end:
                    break
                strings.append(data[start:stop].decode("utf-8"))
                position = stop
        except UnicodeDecodeError:
            raise _Bad(f"{what}, element {len(strings)}, is not UTF-8") from None
        self.position = position
        if len(strings) < count:
            self.string(f"{what}, element {len(strings)} of {count}")  # raises, and says which limit was passed
        return strings


def _parse(path: Path, data: bytes | mmap.mmap, size: int) -> GGUFFile:
    cursor = _Cursor(data, size)
    tensor_count, key_count = _check_preamble(cursor)
    metadata: dict[str, Any] = {}
    for i in range(key_count):
        key = cursor.string(f"the name of key {i} of {key_count}")
        if key in metadata:
            raise _Bad(f"key {quoted(key)} appears twice")
        kind = cursor.number("I", f"key {quoted(key)}")
        metadata[key] = cursor.value(kind, f"key {quoted(key)}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _Bad(f"general.alignment is {quoted(alignment)}; a power of two was expected")
    infos = [_read_tensor_info(cursor, i, tensor_count) for i in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    return GGUFFile(path, metadata, _place_tensors(path, infos, data_start, alignment, size))


def _check_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != b"GGUF":
        start = bytes(cursor.data[:4])
        raise _Bad(f"not a GGUF file (it starts with {start!r}, not b'GGUF'){not_the_file_itself(start)}")
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise _Bad("a GGUF file in big-endian byte order; convert it to little-endian (gguf-convert-endian)")
    if version not in (2, 3):
        raise _Bad(f"GGUF version {version}; versions 2 and 3 are supported: convert the model again")
    tensor_count, key_count = cursor.number("Q", "the counts"), cursor.number("Q", "the counts")
    room = cursor.size - cursor.position
    if tensor_count * _SMALLEST_TENSOR + key_count * _SMALLEST_KEY > room:
        raise _Bad(
            f"claims {tensor_count:,} tensors and {key_count:,} keys, more than its {room:,} bytes can hold; "
            "download it again"
        )
    return tensor_count, key_count


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]  # torch order
    type_id: int
    offset: int  # from the start of the data


def _read_tensor_info(cursor: _Cursor, i: int, count: int) -> _TensorInfo:
    name = cursor.string(f"the name of tensor {i} of {count}")
    what = f"tensor {quoted(name)}"
    num_dims = cursor.number("I", what)
    if num_dims > _MAX_DIMS:
        raise _Bad(f"{what} has {num_dims} dimensions; {_MAX_DIMS} is the limit")
    dims = [cursor.number("Q", what) for _ in range(num_dims)]
    elements = 1
    for dim in dims:
        elements *= dim
    if elements == 0 or elements >= 1 << 62:
        raise _Bad(f"{what} has dimensions {dims}: " + ("none may be zero" if elements == 0 else "too many elements"))
    return _TensorInfo(name, tuple(reversed(dims)), cursor.number("I", what), cursor.number("Q", what))


def _place_tensors(
    path: Path, infos: list[_TensorInfo], data_start: int, alignment: int, size: int
) -> tuple[TensorRef, ...]:
    """Turn offsets into places in the file, having checked that they are aligned, inside it and apart."""
    by_offset = sorted(infos, key=lambda info: info.offset)
    next_starts = [*(data_start + info.offset for info in by_offset), size][1:]
    refs: dict[str, TensorRef] = {}
    position = data_start
    for info, next_start in zip(by_offset, next_starts, strict=False):
        what = f"tensor {quoted(info.name)}"
        offset = data_start + info.offset
        if info.name in refs:
            raise _Bad(f"{what} appears twice")
        if info.offset % alignment:
            raise _Bad(f"{what} starts at offset {info.offset:,}, which is not a multiple of {alignment}")
        if offset < position:
            raise _Bad(f"{what} overlaps the one before it")
        dtype, nbytes = _type_and_bytes(info, what)
        if nbytes is None:  # an unknown type: all that is known is where the next tensor starts
            nbytes = max(next_start - offset, 0)
        if offset + nbytes > size or nbytes == 0:
            missing = offset + max(nbytes, 1) - size
            raise _Bad(f"truncated: {what} ends {missing:,} bytes after the file does; download it again")
        position = offset + nbytes
        refs[info.name] = TensorRef(info.name, path, offset, nbytes, info.shape, dtype)
    return tuple(refs.values())


def _type_and_bytes(info: _TensorInfo, what: str) -> tuple[str, int | None]:
    """The type's name, and the tensor's bytes (None if the type is unknown)."""
    try:
        kind = GGMLQuantizationType(info.type_id)
    except ValueError:
        foreign = _FOREIGN_TYPES.get(info.type_id)
        return f"{foreign} (ggml type {info.type_id})" if foreign else f"ggml type {info.type_id}", None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row = info.shape[-1] if info.shape else 1
    if row % block:
        raise _Bad(f"{what} is {kind.name} with rows of {row}, which is not a multiple of {block}")
    elements = 1
    for dim in info.shape:
        elements *= dim
    return kind.name, elements // block * block_bytes
