"""Expert packs: the routed experts of a model in one file, one page-aligned record each, ready for the kernels.

    bytes 0 … 63        magic, version, length of the JSON, entries of the table, where records start, and a checksum
                        of all this
    JSON                model, quantization, source, number of experts, the layouts of records, layers
    a table             xxh3-64 of every record, padding included, then of every tensor of the file beside it in the
                        order of that file, 8 bytes little-endian each
    zeros               to a multiple of 4096
    records             layer after layer, expert after expert; every one starts and ends at a multiple of 4096

Records hold gate, up and down in the layout of the native kernels (``expert_pack_layout``), so that one O_DIRECT read
brings an expert and nothing is left to do. All sizes follow from the header; the file must have exactly the bytes
that it implies. The header is written last: a file without its magic is one that was never finished. Torch-free.

A packed model is a directory: ``experts.pack``, the tensors that are no routed experts in ``dense.safetensors`` or
``dense.gguf``, and the text files of the release. ``index.open_checkpoint`` opens it like any other; its experts' refs
have the dtype ``pack.KIND`` and stand for packed bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack_layout import (
    MATRICES,
    PACK_DTYPE,
    PAGE,
    ExpertLayout,
    layout_from_json,
    layout_to_json,
)
from glmlocal.formats.index import TensorRef, quoted

PACK_FILE, DENSE_SAFETENSORS, DENSE_GGUF = "experts.pack", "dense.safetensors", "dense.gguf"
VERSION = 1
KERNEL_LAYOUT = "panels of 4 tiles of 16 rows, blocks of 32 columns, 1"  # changes with packed_matrix.h

_MAGIC = b"GLMPACK\n"
_PREAMBLE = struct.Struct("<8sIIQQQ16xQ")  # magic, version, 0, JSON bytes, records, data offset, checksum
_MAX_JSON_BYTES, _MAX_CHECKSUMS, _MAX_EXPERTS, _MAX_LAYER = 16 << 20, 1 << 20, 4096, 9999
_SMALL_BYTES = 1 << 16  # norms, biases: every layer has some, and no two models the same
_REMAKE = "pack the model again"


def checksum(data: NDArray[np.uint8] | bytes) -> int:
    """Of a record: xxh3-64, which keeps up with any disk. Arrays must be contiguous."""
    return xxhash.xxh3_64_intdigest(data if isinstance(data, bytes) else data.data)


@dataclass(frozen=True, slots=True)
class Record:
    """Where the record of one expert is: bytes offset … offset + nbytes - 1, both multiples of PAGE."""

    layer: int
    expert: int
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class PackHeader:
    """All that is known of a pack before its records are made."""

    model: str  # for people
    quant: str  # the word of --quant it was made with
    source: str  # the MODEL it was made of
    num_experts: int
    num_dense: int  # tensors that are no routed experts
    layouts: dict[int, ExpertLayout]  # by layer, ascending

    @property
    def num_records(self) -> int:
        return len(self.layouts) * self.num_experts

    @property
    def num_checksums(self) -> int:
        return self.num_records + self.num_dense

    def to_json(self) -> bytes:
        distinct = list(dict.fromkeys(self.layouts.values()))
        value = {
            "kernel_layout": KERNEL_LAYOUT,
            "model": self.model,
            "quant": self.quant,
            "source": self.source,
            "num_experts": self.num_experts,
            "num_dense": self.num_dense,
            "layouts": [layout_to_json(layout) for layout in distinct],
            "layers": [[layer, distinct.index(layout)] for layer, layout in self.layouts.items()],
        }
        return json.dumps(value, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class ExpertPack:
    """An opened pack. ``checksums`` are those of the records, then of the dense tensors, in the order of the files."""

    path: Path
    version: int
    header: PackHeader
    checksums: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return self.header.num_experts

    @cached_property
    def _starts(self) -> dict[int, tuple[int, int]]:
        """Layer → its place among the layers, and the offset of its first record."""
        offset, starts = data_offset(self.header), {}
        for place, (layer, layout) in enumerate(self.header.layouts.items()):
            starts[layer] = (place, offset)
            offset += self.num_experts * layout.record_bytes
        return starts

    def layers(self) -> tuple[int, ...]:
        """The indices of the layers that have records, ascending; MTP layers come after the model's own."""
        return tuple(self.header.layouts)

    def layout(self, layer: int) -> ExpertLayout:
        """Of every record of the layer. KeyError for a layer without."""
        return self.header.layouts[layer]

    def record(self, layer: int, expert: int) -> Record:
        """KeyError for what is not there."""
        place, start = self._starts[layer]
        if not 0 <= expert < self.num_experts:
            raise KeyError((layer, expert))
        nbytes = self.header.layouts[layer].record_bytes
        number = place * self.num_experts + expert
        return Record(layer, expert, start + expert * nbytes, nbytes, self.checksums[number])

    def records(self) -> Iterator[Record]:
        """All of them, in the order of the file."""
        return (self.record(layer, expert) for layer in self.layers() for expert in range(self.num_experts))

    @property
    def dense_checksums(self) -> tuple[int, ...]:
        """Of the tensors in the file beside the pack, in the order of their bytes."""
        return self.checksums[self.header.num_records :]

    def refs(self) -> dict[str, TensorRef]:
        """The experts' matrices under their Hugging Face names, as ``TensorIndex`` has them."""
        refs = {}
        for record in self.records():
            for name, matrix in zip(MATRICES, self.layout(record.layer).matrices, strict=True):
                ref_name = expert_name(record.layer, record.expert, name)
                offset, dtype = record.offset + matrix.offset, PACK_DTYPE + matrix.kind
                refs[ref_name] = TensorRef(ref_name, self.path, offset, matrix.nbytes, matrix.shape, dtype)
        return refs

    def check(self, record: Record, data: NDArray[np.uint8]) -> None:
        """Raise CheckpointError unless these are the record's bytes."""
        if checksum(data) != record.checksum:
            raise CheckpointError(
                f"{self.path}: the record of layer {record.layer}, expert {record.expert} is damaged; `glmlocal pack "
                f"--verify` lists all that are, and {_REMAKE}"
            )

    def read_records(self, layer: int, first: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the records from ``first`` on, and check them. Raises CheckpointError."""
        records = [self.record(layer, first + i) for i in range(out.nbytes // self.layout(layer).record_bytes)]
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                read_exactly(file, out, records[0].offset, self.path)
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        for i, record in enumerate(records):
            self.check(record, out[i * record.nbytes : (i + 1) * record.nbytes])


def check_beside(pack: ExpertPack, dense: Sequence[TensorRef]) -> None:
    """Are these the tensors that the pack was made with? Compares their number, and the small ones by their checksums.

    For a pack that does not lie beside them. Raises CheckpointError.
    """
    stored = sorted(dense, key=lambda ref: ref.offset)
    is_same = len(stored) == len(pack.dense_checksums)
    for ref, wanted in zip(stored, pack.dense_checksums, strict=False):
        if is_same and ref.nbytes <= _SMALL_BYTES:
            data = np.empty(ref.nbytes, np.uint8)
            with open(ref.file, "rb") as file:
                read_exactly(file.fileno(), data, ref.offset, ref.file)
            is_same = checksum(data) == wanted
    if not is_same:
        raise CheckpointError(f"{pack.path} was made with other tensors than {stored[0].file} has; {_REMAKE}")


def expert_name(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"


def read_exactly(file: int, out: NDArray[np.uint8], offset: int, path: Path) -> None:
    """OSError is the caller's; CheckpointError for a file that ends before."""
    rest = out.data
    while rest:
        num_bytes = os.preadv(file, [rest], offset)
        if num_bytes == 0:
            raise CheckpointError(f"{path} has become shorter since it was opened; {_REMAKE}")
        offset, rest = offset + num_bytes, rest[num_bytes:]


def data_offset(header: PackHeader) -> int:
    return -(-(_PREAMBLE.size + len(header.to_json()) + 8 * header.num_checksums) // PAGE) * PAGE


def file_bytes(header: PackHeader) -> int:
    records = sum(layout.record_bytes for layout in header.layouts.values()) * header.num_experts
    return data_offset(header) + records


def header_bytes(header: PackHeader, checksums: Sequence[int]) -> bytes:
    """The beginning of the file, to its first record."""
    body = header.to_json()
    table = np.asarray(checksums, "<u8").tobytes()
    start = data_offset(header)
    fields = (_MAGIC, VERSION, 0, len(body), header.num_checksums, start)
    digest = checksum(_PREAMBLE.pack(*fields, 0) + body + table)
    return (_PREAMBLE.pack(*fields, digest) + body + table).ljust(start, b"\0")


def read_pack(path: Path) -> ExpertPack:
    """Read and check the header of a pack. Raises CheckpointError (OSError is the caller's to translate)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        preamble = file.read(_PREAMBLE.size)
        if preamble[: len(_MAGIC)].strip(b"\0") == b"":
            raise CheckpointError(f"{path} was never finished: it has no header; {_REMAKE}, which goes on from there")
        if not preamble.startswith(_MAGIC):
            raise CheckpointError(f"{path} is not an expert pack (it starts with {preamble[:8]!r}); {_REMAKE}")
        if len(preamble) < _PREAMBLE.size:
            raise CheckpointError(f"{path} ends inside its header; {_REMAKE}")
        magic, version, zero, json_bytes, num_checksums, start, digest = _PREAMBLE.unpack(preamble)
        if version != VERSION:
            raise CheckpointError(f"{path} is an expert pack of version {version}, this is {VERSION}; {_REMAKE}")
        if json_bytes > _MAX_JSON_BYTES or num_checksums > _MAX_CHECKSUMS or start > size or start % PAGE:
            raise CheckpointError(
                f"{path} claims a header of {json_bytes:,} bytes, {num_checksums:,} checksums and data from byte "
                f"{start:,} on, which its {size:,} bytes cannot be; {_REMAKE}"
            )
        rest = file.read(json_bytes + 8 * num_checksums)
    if len(rest) < json_bytes + 8 * num_checksums:
        raise CheckpointError(f"{path} ends inside its header; {_REMAKE}")
    fields = (magic, version, zero, json_bytes, num_checksums, start)
    if checksum(_PREAMBLE.pack(*fields, 0) + rest) != digest:
        raise CheckpointError(f"the header of {path} is damaged (its checksum is wrong); {_REMAKE}")
    header = _parse_header(path, rest[:json_bytes])
    if (header.num_checksums, data_offset(header)) != (num_checksums, start) or header.to_json() != rest[:json_bytes]:
        raise CheckpointError(f"the header of {path} contradicts itself; {_REMAKE}")
    if file_bytes(header) != size:
        raise CheckpointError(f"{path} has {size:,} bytes, its header wants {file_bytes(header):,}; {_REMAKE}")
    checksums = np.frombuffer(rest, "<u8", num_checksums, json_bytes)
    return ExpertPack(path, version, header, tuple(checksums.tolist()))


def _parse_header(path: Path, raw: bytes) -> PackHeader:
    where = f"the header of {path}"
    try:
        value = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({str(error)[:200]}); {_REMAKE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, not an object; {_REMAKE}")
    if value.get("kernel_layout") != KERNEL_LAYOUT:
        raise CheckpointError(f"{path} is laid out for the kernels of another version; {_REMAKE}")
    model, quant, source = (value.get(name) for name in ("model", "quant", "source"))
    names = ("num_experts", "num_dense", "layouts", "layers")
    num_experts, num_dense, layouts, layers = (value.get(name) for name in names)
    if not (isinstance(model, str) and isinstance(quant, str) and isinstance(source, str)):
        raise CheckpointError(f"{where} has no model, quant and source; {_REMAKE}")
    if type(num_experts) is not int or not 0 < num_experts <= _MAX_EXPERTS:
        raise CheckpointError(f"{where} claims {quoted(num_experts)} experts per layer; {_REMAKE}")
    if type(num_dense) is not int or not 0 <= num_dense <= _MAX_CHECKSUMS:
        raise CheckpointError(f"{where} claims {quoted(num_dense)} other tensors; {_REMAKE}")
    if not isinstance(layouts, list) or not isinstance(layers, list) or not layers or len(layouts) > len(layers):
        raise CheckpointError(f"{where} lists no layers; {_REMAKE}")
    known = [layout_from_json(layout, where) for layout in layouts]
    _check_layers(where, layers, len(known))
    return PackHeader(model, quant, source, num_experts, num_dense, {layer: known[i] for layer, i in layers})


def _check_layers(where: str, layers: list[Any], num_layouts: int) -> None:
    for pair in layers:
        if (
            not isinstance(pair, list)
            or [type(n) for n in pair] != [int, int]
            or not 0 <= pair[0] <= _MAX_LAYER
            or not 0 <= pair[1] < num_layouts
        ):
            raise CheckpointError(f"{where} has the layer {quoted(pair)}; {_REMAKE}")
    if any(one[0] >= other[0] for one, other in pairwise(layers)):
        raise CheckpointError(f"{where} lists its layers out of order; {_REMAKE}")
