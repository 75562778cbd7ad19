"""Prompts from a pipe or file on stdin, and text arguments: what is read, for how long, and what is not text.

Without ``-p``, stdin is the prompt and is read to its end. With ``-p``, what stdin holds is appended to it, but ``-p``
never waits for a stdin that stays silent: scripts, CI and editors start programs with an open pipe that nobody writes
to. Whoever sends anything at all is read to the end. ``-p -`` is stdin alone, waited for as long as it takes.
"""

from __future__ import annotations

import os
import select
import stat

from glmlocal.errors import ConfigError
from glmlocal.units import MIB, format_bytes

MAX_STDIN_BYTES = 64 * MIB  # tens of millions of tokens: more than any context
SILENCE_S = 1.0  # with -p: a pipe that has sent nothing this long after the start is taken as silent


def stdin_is_screen(fd: int = 0) -> bool:
    """Is a person typing there?"""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def read_stdin(fd: int = 0) -> str:
    """Everything up to the end of stdin, as text without its last newline; "" when it is closed. Raises ConfigError."""
    try:
        os.fstat(fd)
    except OSError:  # closed by the caller (<&-)
        return ""
    chunks, size = [], 0
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_STDIN_BYTES:
            raise ConfigError(f"stdin holds more than {format_bytes(MAX_STDIN_BYTES)}, which fits no model; send less")
    return decode_text(b"".join(chunks), "stdin").removesuffix("\n").removesuffix("\r")


def read_ready_stdin(wait_s: float, fd: int = 0) -> str | None:
    """What stdin holds when anything, its end included, arrives within ``wait_s``; None when it stays silent.

    A file that another program has begun to read is left alone: it is the list of a ``while read`` loop around us.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return ""
    if stat.S_ISREG(mode) and os.lseek(fd, 0, os.SEEK_CUR) > 0:
        return ""
    ready, _, _ = select.select([fd], [], [], max(wait_s, 0.0))
    return read_stdin(fd) if ready else None


def decode_text(data: bytes, source: str) -> str:
    """UTF-8 with or without a byte order mark → text. Raises ConfigError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,}; convert it first"
        ) from error


def clean_argument(text: str, name: str) -> str:
    """A command-line argument as text; bytes that were not in the locale's encoding arrive as lone surrogates."""
    return decode_text(text.encode("utf-8", "surrogateescape"), name) if not text.isascii() else text
