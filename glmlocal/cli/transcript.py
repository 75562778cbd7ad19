"""Conversations as files: Markdown to read, JSON to load again. Never overwrites unless told to, never half-written."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmlocal.errors import ConfigError
from glmlocal.units import MIB, format_bytes

FORMAT, VERSION = "glmlocal-chat", 1
MARKDOWN_SUFFIXES = (".md", ".markdown", ".txt")
MAX_FILE_BYTES = 64 * MIB
Message = dict[str, str]  # role, content, and for an answer reasoning_content
_ROLES = ("system", "user", "assistant")


class FileTaken(ConfigError):
    """The file exists and was not to be replaced."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation at rest; the system message, if any, comes first."""

    model: str
    messages: Sequence[Message]


def save(transcript: Transcript, path: Path, *, overwrite: bool = False) -> None:
    """Write by suffix. Raises ConfigError (suffix, FileTaken) or OSError; the old file then stays as it was."""
    if path.suffix.lower() == ".json":
        text = to_json(transcript)
    elif path.suffix.lower() in MARKDOWN_SUFFIXES:
        text = to_markdown(transcript)
    else:
        raise ConfigError(f"{path.name!r} has to end in .md (to read) or .json (to load again)")
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a directory; name a file in it")
    write_atomically(path, text.encode("utf-8", "replace"), overwrite=overwrite)


def load(path: Path) -> Transcript:
    """Read what ``save`` wrote as JSON. Raises ConfigError or OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{str(path)!r} is larger than {format_bytes(MAX_FILE_BYTES)}; that is no saved conversation")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is not JSON ({error}); load a file that /save FILE.json wrote") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise ConfigError(f"{str(path)!r} is not a {FORMAT} file of version {VERSION}; load what /save FILE.json wrote")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ConfigError(f"{str(path)!r} has a message without a known role or with content that is not text")
    if any(message["role"] == "system" for message in messages[1:]):
        raise ConfigError(f"{str(path)!r} has a system message after the first; one, at the start, is supported")
    return Transcript(str(fields.get("model", "")), messages)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and set(message) <= {"role", "content", "reasoning_content"}
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), str)
        and isinstance(message.get("reasoning_content", ""), str)
    )


def to_json(transcript: Transcript) -> str:
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "model": transcript.model,
        "messages": list(transcript.messages),
    }
    return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"


def to_markdown(transcript: Transcript) -> str:
    """A heading per turn; reasoning folded away."""
    parts = [f"# Conversation with {transcript.model}\n"]
    titles = {"system": "System", "user": "You", "assistant": "Assistant"}
    for message in transcript.messages:
        parts.append(f"## {titles[message['role']]}\n")
        if reasoning := message.get("reasoning_content"):
            parts.append(f"<details><summary>Thinking</summary>\n\n{reasoning.strip()}\n\n</details>\n")
        parts.append(message["content"].strip() + "\n")
    return "\n".join(parts)


def write_atomically(path: Path, data: bytes, *, overwrite: bool) -> None:
    """All of it or nothing. Raises FileTaken or OSError."""
    taken = FileTaken(f"{str(path)!r} exists; nothing was written")
    if not overwrite and os.path.lexists(path):
        raise taken
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(part, path)
            return
        try:
            os.link(part, path)  # unlike replace, fails when somebody else was faster
        except FileExistsError:
            raise taken from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            os.replace(part, path)  # a filesystem without hard links
    finally:
        part.unlink(missing_ok=True)
