"""Small text and JSON files that come with a checkpoint: size first, one clear error for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from pathlib import Path

from glmlocal.errors import CheckpointError
from glmlocal.units import MIB, format_bytes

CONFIG_MAX_BYTES = 16 * MIB  # tokenizer_config.json with thousands of added tokens stays below 1 MiB


def quoted(value: object) -> str:
    """A value from a file as an error message shows it: on one line, short however long it is."""
    return reprlib.repr(value)


def one_line(message: object) -> str:
    """Somebody else's message (a library's, a template's) as part of ours: printable characters only, 300 at most."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(message))
    return re.sub(r"\s+", " ", shown).strip()[:300]


def read_text_file(path: Path, *, max_bytes: int = CONFIG_MAX_BYTES) -> str | None:
    """The file's text (UTF-8), or None if there is no such file. Raises CheckpointError."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is a pipe or a device; a file was expected: fetch it again")
            data = file.read(max_bytes + 1)  # one byte beyond the limit tells "too big", whatever stat() says
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {format_bytes(max_bytes)}; this is not a file of that kind")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); fetch the file again") from error


def _without_waiting(path: str, flags: int) -> int:
    """A pipe that nobody writes to would be waited for while it is opened."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json_object(text: str, where: str) -> dict[str, object]:
    """``text`` as a JSON object. ``where`` names the file in the CheckpointError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{where} nests too deeply to be read; fetch the file again") from None
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise CheckpointError(f"{where} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, not an object; fetch the file again")
    return value


def read_json_object(path: Path, *, max_bytes: int = CONFIG_MAX_BYTES) -> dict[str, object] | None:
    """The file as a JSON object, or None if there is no such file. Raises CheckpointError."""
    text = read_text_file(path, max_bytes=max_bytes)
    return None if text is None else parse_json_object(text, str(path))
