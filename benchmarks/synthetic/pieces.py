"""What both file formats share: what to write, one tensor as it lies in a file, and the streaming of its bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, cast

import numpy as np

from synthetic.model import Shape, Tensor
from synthetic.storage import Bytes, Codec, TableCodec
from synthetic.text import Vocabulary

CHUNK_BYTES = 32 << 20
ROPE_THETA, PARTIAL_ROTARY_FACTOR, RMS_NORM_EPS = 1e6, 0.5, 1e-5

Tables = dict[str, tuple[TableCodec, Bytes]]  # tensors already written that later ones are made from


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor as it lies in a file."""

    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]
    tensor: Tensor
    codec: Codec

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.codec.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Spec:
    """What to write."""

    shape: Shape  # cut to the wanted layers and vocabulary
    vocabulary: Vocabulary
    format: str
    seed: int
    skew: float
    acceptance: float | None

    @property
    def title(self) -> str:
        return f"{self.shape.name.lower()}-{self.shape.num_hidden_layers}l-{self.format.split('-')[1]}"

    @property
    def description(self) -> str:
        mtp = "no MTP layer" if self.acceptance is None else f"MTP acceptance {self.acceptance:g} by construction"
        return f"random weights, seed {self.seed}, expert popularity rank**-{self.skew:g}, {mtp}"

    @property
    def num_nextn_predict_layers(self) -> int:
        return 0 if self.acceptance is None else 1


def write_pieces(
    file: IO[bytes],
    path: Path,
    pieces: Sequence[Piece],
    seed: int,
    on_bytes: Callable[[int], None],
    *,
    alignment: int = 1,
    tables: Tables | None = None,
) -> None:
    """Append the pieces, each a chunk of rows at a time; ``tables`` collects the embedding for those that need it."""
    tables = {} if tables is None else tables
    for piece in pieces:
        file.write(bytes(-file.tell() % alignment))
        offset = file.tell()
        chunk = max(1, CHUNK_BYTES // piece.row_bytes)
        for start in range(0, piece.num_rows, chunk):
            rows = slice(start, min(start + chunk, piece.num_rows))
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(piece.name.encode()), start]))
            data = piece.tensor.fill.rows(piece.codec, rng, rows, piece.shape[-1], tables.__getitem__)
            assert data.nbytes == (rows.stop - rows.start) * piece.row_bytes, piece.name
            file.write(data.data)
            on_bytes(data.nbytes)
        if piece.tensor.name == "model.embed_tokens.weight":
            file.flush()
            table = np.memmap(path, np.uint8, "r", offset, (piece.num_rows, piece.row_bytes))
            tables[piece.tensor.name] = cast(TableCodec, piece.codec), table
    file.write(bytes(-file.tell() % alignment))
