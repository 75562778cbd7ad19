"""What a record of an expert pack looks like inside: three packed matrices one after another, padded to a disk page.

The layout of a matrix is the native kernels' (``kernels/cpu/src/packed_matrix.h``); where its sections are follows from
shape and scheme alone (``packed_size``), so a header states only those and nothing in it can point astray. Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import quoted
from glmlocal.formats.packed_size import PackedSections, packed_sections
from glmlocal.formats.schemes import WHOLE_ROW, QuantScheme

PAGE = 4096  # O_DIRECT reads start and end at multiples of it on every disk and filesystem we know of
MAX_FEATURES = 1 << 24  # of a matrix, as in the kernels
DENSE_KINDS = ("f32", "bf16", "f16")
MATRICES = ("gate", "up", "down")
PACK_DTYPE = "pack."  # before the kind, in the dtype of a TensorRef

_BITS = (2, 3, 4, 5, 6, 8)
_CODECS = {
    "scale_codec": ("plain", "two_level"),
    "offset_codec": ("symmetric", "min", "two_level_min", "zero_point"),
    "code_type": ("integer", "e4m3"),
    "scale_type": ("f16", "bf16", "f32"),
}


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """One matrix [out_features, in_features] of a record."""

    shape: tuple[int, int]
    kind: str  # "f32", "bf16", "f16", or the scheme's name
    scheme: QuantScheme | None  # None: plain floats
    offset: int  # from the start of the record, a multiple of 64
    sections: PackedSections  # from ``offset``

    @property
    def nbytes(self) -> int:
        return self.sections.nbytes


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The record of one expert: gate and up [moe_intermediate_size, hidden_size], down transposed to that."""

    gate: MatrixLayout
    up: MatrixLayout
    down: MatrixLayout

    @property
    def record_bytes(self) -> int:
        """A multiple of PAGE; what the matrices leave of it is zeros."""
        return -(-(self.down.offset + self.down.nbytes) // PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        """Of the matrices alone."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    @property
    def matrices(self) -> tuple[MatrixLayout, MatrixLayout, MatrixLayout]:
        return self.gate, self.up, self.down


def expert_layout(hidden: int, width: int, kinds: tuple[str | QuantScheme, ...]) -> ExpertLayout:
    """Of experts of ``width`` neurons whose gate, up and down are stored as ``kinds``."""
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    matrices: list[MatrixLayout] = []
    offset = 0
    for shape, kind in zip(shapes, kinds, strict=True):
        sections = packed_sections(*shape, kind)
        name, scheme = (kind, None) if isinstance(kind, str) else (kind.name, kind)
        matrices.append(MatrixLayout(shape, name, scheme, offset, sections))
        offset += sections.nbytes
    return ExpertLayout(*matrices)


def layout_to_json(layout: ExpertLayout) -> dict[str, Any]:
    return {
        name: {
            "shape": list(matrix.shape),
            "kind": matrix.kind if matrix.scheme is None else _scheme_to_json(matrix.scheme),
        }
        for name, matrix in zip(MATRICES, layout.matrices, strict=True)
    }


def _scheme_to_json(scheme: QuantScheme) -> dict[str, Any]:
    """All fields, and the type of scales where it is not the usual one, so that packs from before others stay valid."""
    fields = asdict(scheme)
    if scheme.scale_type == _usual_scale_type(scheme.code_type):
        del fields["scale_type"]
    return fields


def _usual_scale_type(code_type: object) -> str:
    return "f32" if code_type == "e4m3" else "f16"


def layout_from_json(value: Any, where: str) -> ExpertLayout:
    """The inverse, of JSON that anybody may have written. Raises CheckpointError."""
    if not isinstance(value, dict) or value.keys() != set(MATRICES):
        raise CheckpointError(f"{where}: a layout is {quoted(value)}; gate, up and down were expected")
    shapes, kinds = [], []
    for name in MATRICES:
        matrix = value[name]
        if not isinstance(matrix, dict) or matrix.keys() != {"shape", "kind"}:
            raise CheckpointError(f"{where}: {name} is {quoted(matrix)}; a shape and a kind were expected")
        shapes.append(matrix["shape"])
        kinds.append(_kind(matrix["kind"], f"{where}: {name}"))
    width_hidden = shapes[0]
    if (
        not isinstance(width_hidden, list)
        or len(width_hidden) != 2
        or not all(type(n) is int and 0 < n <= MAX_FEATURES for n in width_hidden)
        or shapes[1] != width_hidden
        or shapes[2] != width_hidden[::-1]
    ):
        raise CheckpointError(f"{where}: gate, up and down have shapes {quoted(shapes)}, which no expert has")
    width, hidden = width_hidden
    return expert_layout(hidden, width, tuple(kinds))


def _kind(value: Any, where: str) -> str | QuantScheme:
    if isinstance(value, str) and value in DENSE_KINDS:
        return value
    fields = QuantScheme.__dataclass_fields__
    if isinstance(value, dict) and fields.keys() - value.keys() == {"scale_type"}:
        value = {**value, "scale_type": _usual_scale_type(value["code_type"])}
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise CheckpointError(f"{where} is stored as {quoted(value)}, which this version does not know")
    codebook = value["codebook"]
    sizes = (value["group_size"], value["super_size"])
    wrong = (
        not isinstance(value["name"], str)
        or not 0 < len(value["name"]) <= 64
        or type(value["bits"]) is not int
        or value["bits"] not in _BITS
        or any(value[codec] not in known for codec, known in _CODECS.items())
        or not all(type(size) is int and 16 <= size <= WHOLE_ROW and size & (size - 1) == 0 for size in sizes)
        or sizes[0] > sizes[1]
        or (value["scale_codec"] == "plain" and sizes[0] != sizes[1])
        or type(value["zero_point"]) is not int
        or not 0 <= value["zero_point"] <= 255
        or not (codebook is None or _is_codebook(codebook, value["bits"]))
        or (
            value["code_type"] == "e4m3"
            and (value["bits"], value["offset_codec"], value["scale_type"]) != (8, "symmetric", "f32")
        )
    )
    if wrong:
        raise CheckpointError(f"{where} has the scheme {quoted(value)}, which no kernel can have")
    return QuantScheme(**{**value, "codebook": None if codebook is None else tuple(codebook)})


def _is_codebook(value: Any, bits: int) -> bool:
    return (
        isinstance(value, list)
        and bits <= 4
        and len(value) == 1 << bits
        and all(type(entry) is int and -128 <= entry <= 127 for entry in value)
    )
