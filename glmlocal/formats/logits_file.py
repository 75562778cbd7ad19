"""Log-probabilities of a text on disk, to compare a model with one that is no longer in memory. Torch-free, no pickles.

    bytes  0 …  7   magic "GLMLOGP1"
    bytes  8 … 15   length of the header, little-endian u64
    then            header: JSON, UTF-8 (the fields of LogitsHeader), padded with spaces to a multiple of 64
    then            token ids of the whole text, i32 [num_tokens]
    then            natural-log probabilities, f16 [num_tokens - 1, vocab_size]: row i predicts token i + 1

Precision: fp16 keeps 11 bits, so a log-probability is off by at most 2^-11 of itself. A reader must renormalise the
rows; KL between a row and its rounded self is then about 4e-7 nats (measured on the demo), far below that of any
quantization. Values below -65504 are clipped.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.units import MIB, format_bytes

MAGIC = b"GLMLOGP1"
MAX_HEADER_BYTES = MIB
MAX_VOCAB, MAX_TOKENS = 1 << 24, 1 << 31
_LEAST = np.finfo(np.float16).min


@dataclass(frozen=True, slots=True)
class LogitsHeader:
    """What the rows are of."""

    model: str
    num_tokens: int
    vocab_size: int
    context: int
    stride: int
    vocabulary: str  # digest of the tokenizer's vocabulary

    @property
    def num_rows(self) -> int:
        return self.num_tokens - 1

    @property
    def data_bytes(self) -> int:
        return 4 * self.num_tokens + 2 * self.num_rows * self.vocab_size


class LogitsWriter:
    """Writes rows in order to a temporary file beside the target, which appears whole at the end or not at all.

    Raises ConfigError when the target exists or the disk has no room for it.
    """

    def __init__(self, path: Path, header: LogitsHeader, token_ids: NDArray[np.int32]) -> None:
        if os.path.lexists(path):
            raise ConfigError(f"{str(path)!r} exists; choose another name for --save-logits or remove it")
        free = shutil.disk_usage(path.parent).free
        if free < header.data_bytes + MIB:
            raise ConfigError(
                f"the log-probabilities take {format_bytes(header.data_bytes)} but the disk of {str(path)!r} has "
                f"{format_bytes(free)} free; use a shorter text or another disk"
            )
        self._path, self._header, self._rows = path, header, 0
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        text = json.dumps(asdict(header)).encode()
        text += b" " * (-(len(MAGIC) + 8 + len(text)) % 64)
        self._file = self._part.open("xb")
        try:
            self._file.write(MAGIC + struct.pack("<Q", len(text)) + text)
            self._file.write(token_ids.astype("<i4").tobytes())
        except OSError:
            self._discard()
            raise

    def write(self, log_probs: NDArray[np.float64]) -> None:
        """Append rows [rows, vocab_size]."""
        rows, vocab_size = log_probs.shape
        assert vocab_size == self._header.vocab_size
        self._rows += rows
        self._file.write(np.maximum(log_probs, _LEAST).astype("<f2").tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is not None:
            self._discard()
            return
        assert self._rows == self._header.num_rows
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self._path)
        except OSError:
            self._discard()
            raise

    def _discard(self) -> None:
        with suppress(OSError):  # the flush inside close, on a full disk
            self._file.close()
        self._part.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class SavedLogits:
    """An opened file; rows are read from disk when they are asked for."""

    header: LogitsHeader
    token_ids: NDArray[np.int32]  # [num_tokens]
    log_probs: NDArray[np.float16]  # [num_tokens - 1, vocab_size], memory-mapped

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Renormalised log-probabilities of rows start … stop - 1, float64. Raises CheckpointError for damaged ones."""
        x = self.log_probs[start:stop].astype(np.float64)
        with np.errstate(all="ignore"):
            x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
        if not np.isfinite(x).all():
            raise CheckpointError(f"rows {start} to {stop - 1} of the saved logits are not numbers; save them again")
        return x


def open_logits(path: Path) -> SavedLogits:
    """Check a file against its own header and map it. Raises CheckpointError or OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, path, size)
        wanted = start + header.data_bytes
        if size != wanted:
            raise CheckpointError(f"{str(path)!r} has {size:,} bytes, its header describes {wanted:,}; save it again")
        token_ids = np.fromfile(file, "<i4", header.num_tokens)
    if token_ids.min() < 0 or token_ids.max() >= header.vocab_size:
        raise CheckpointError(f"{str(path)!r} has token ids outside 0 … {header.vocab_size - 1}; save it again")
    shape = (header.num_rows, header.vocab_size)
    log_probs = np.memmap(path, "<f2", "r", offset=start + 4 * header.num_tokens, shape=shape)
    return SavedLogits(header, token_ids, log_probs)


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[LogitsHeader, int]:
    """The header and where the data begins."""
    start = file.read(16)
    if len(start) < 16 or start[:8] != MAGIC:
        raise CheckpointError(f"{str(path)!r} was not written by --save-logits: it does not begin with GLMLOGP1")
    (length,) = struct.unpack("<Q", start[8:])
    if length > min(MAX_HEADER_BYTES, size - 16):
        raise CheckpointError(f"{str(path)!r} announces a header of {length:,} bytes but has {size:,}; save it again")
    try:
        header = _header(json.loads(file.read(length)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} has a damaged header ({error}); save it again") from error
    return header, 16 + length


def _header(values: Any) -> LogitsHeader:
    """Checked JSON → LogitsHeader. Raises ValueError."""
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(LogitsHeader)}:
        raise ValueError("its fields are not those of this version")
    texts, numbers = ("model", "vocabulary"), {"num_tokens": MAX_TOKENS, "vocab_size": MAX_VOCAB}
    numbers |= {"context": MAX_TOKENS, "stride": MAX_TOKENS}
    for name in texts:
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is not a text")
    for name, most in numbers.items():
        value = values[name]
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} is {str(value)[:40]}, wanted 1 … {most}")
    if values["num_tokens"] < 2:
        raise ValueError("num_tokens is 1, wanted at least 2")
    return LogitsHeader(**values)
