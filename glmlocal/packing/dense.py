"""The file beside the records: every tensor that is no routed expert, its bytes as they were.

Its header and the place of every tensor in it follow from the source's headers, so that tensors can be copied in any
order, by several threads, and again after a kill.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from glmlocal.formats.gguf import gguf_name
from glmlocal.formats.gguf_file import raw_metadata
from glmlocal.formats.index import TensorRef

_GGUF_VERSION = 3
_SPLIT_KEYS = "split."  # of the parts of a split model, which the new file is not
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class DenseFile:
    """Its beginning, where each tensor goes, and its length. What nothing is written to is zeros."""

    header: bytes
    offsets: tuple[int, ...]  # in bytes from the start of the file, one per tensor
    nbytes: int


def safetensors_file(refs: Sequence[TensorRef]) -> DenseFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, []
    for ref in refs:
        offsets = [position, position + ref.nbytes]
        entries[ref.name] = {"dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": offsets}
        starts.append(position)
        position += ref.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8, as the library has it
    header = struct.pack("<Q", len(text)) + text
    return DenseFile(header, tuple(len(header) + start for start in starts), len(header) + position)


def gguf_file(refs: Sequence[TensorRef], first: Path, alignment: int | None = None) -> DenseFile:
    """With all the metadata of ``first``, the (first) file of the source, entry by entry as it is there."""
    entries = [raw for key, raw in raw_metadata(first) if not key.startswith(_SPLIT_KEYS)]
    alignment = alignment or _DEFAULT_ALIGNMENT
    position, starts, infos = 0, [], bytearray()
    for ref in refs:
        name = gguf_name(ref.name).encode("utf-8")
        type_id = GGMLQuantizationType[ref.dtype].value
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(ref.shape))
        infos += struct.pack(f"<{len(ref.shape)}Q", *reversed(ref.shape)) + struct.pack("<IQ", type_id, position)
        starts.append(position)
        position += -(-ref.nbytes // alignment) * alignment
    header = struct.pack("<4sIQQ", b"GGUF", _GGUF_VERSION, len(refs), len(entries)) + b"".join(entries) + infos
    header = header.ljust(-(-len(header) // alignment) * alignment, b"\0")
    return DenseFile(header, tuple(len(header) + start for start in starts), len(header) + position)
