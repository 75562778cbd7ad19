"""``@path`` in a message: which files it means, whether they can be sent, and what completes a half-typed one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from glmlocal_tui.cleaning import clean
from glmlocal_tui.conversation import Attachment

MAX_FILE_BYTES = 256 << 10
MAX_SCANNED, MAX_OFFERED = 4000, 50
_MENTION = re.compile(r'(?<![^\s(])@(?:"([^"\n]+)"|([^\s"@]+))')
_SKIPPED = {"node_modules", "__pycache__", "target", "build", "dist"}


@dataclass(frozen=True, slots=True)
class Mention:
    """One ``@path`` of a text. ``problem`` says why it cannot be sent; empty: it can."""

    token: str  # as typed, with the @
    path: str
    nbytes: int
    problem: str


def find(text: str, root: Path) -> list[Mention]:
    """The mentions that name an existing file, and those in quotes; other words with an @ are just words."""
    found: dict[str, Mention] = {}
    for match in _MENTION.finditer(text):
        quoted = match.group(1)
        name = quoted or match.group(2).rstrip(".,;:!?)")
        token = match.group() if quoted else "@" + name
        if name in found or not name:
            continue
        mention = _inspect(token, name, root)
        if mention is not None and (mention.problem != "not found" or quoted):
            found[name] = mention
    return list(found.values())


def read(mention: Mention, root: Path) -> Attachment:
    """The file's text. Raises ValueError, with a sentence, for one that is not a text, too long, or gone."""
    try:
        with open(root / os.path.expanduser(mention.path), "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"@{mention.path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"@{mention.path} is larger than {MAX_FILE_BYTES >> 10} KiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"@{mention.path} is not a UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"@{mention.path} is not a text")
    return Attachment("file", clean(mention.path), text)


def token_before(text: str) -> str | None:
    """The half-typed mention that ends the text before the cursor, without its @; None where there is none."""
    match = re.search(r'(?<![^\s(])@("?)([^"\n]*)$', text)
    if match is None or (not match.group(1) and any(char.isspace() for char in match.group(2))):
        return None
    return match.group(2)


def quoted(path: str) -> str:
    """A path as a mention that reads back."""
    return f'@"{path}"' if any(char.isspace() for char in path) else f"@{path}"


def complete(prefix: str, root: Path) -> list[str]:
    """Paths that a half-typed one may mean, directories with a slash: what starts with it first, then what contains
    it. Looks at no more than MAX_SCANNED entries, so that a huge tree costs no more than a small one."""
    folder, _, word = prefix.rpartition("/")
    start = root / os.path.expanduser(folder + "/" if folder or prefix.startswith("/") else "")
    lead = f"{folder}/" if folder or prefix.startswith("/") else ""
    direct = [lead + name for name in _entries(start) if name.casefold().startswith(word.casefold())]
    direct = [name for name in direct if word.startswith(".") or not _last(name).startswith(".")]
    if word and len(direct) < MAX_OFFERED and not prefix.startswith(("/", "~", "..")):
        direct += [name for name in _walk(start, lead) if word.casefold() in name.casefold() and name not in direct]
    return [name for name in direct if clean(name) == name and "\n" not in name and '"' not in name][:MAX_OFFERED]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name + "/" if entry.is_dir() else entry.name for entry in islice(entries, MAX_SCANNED)]
    except OSError:
        return []
    return sorted(found)


def _walk(start: Path, lead: str) -> Iterator[str]:
    seen = 0
    for folder, folders, files in os.walk(start):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        inside = os.path.relpath(folder, start)
        for name in sorted(files):
            seen += 1
            if seen > MAX_SCANNED:
                return
            if not name.startswith("."):
                yield lead + (name if inside == "." else f"{inside}/{name}")


def _inspect(token: str, name: str, root: Path) -> Mention | None:
    path = root / os.path.expanduser(name)
    try:
        if not path.exists():
            return Mention(token, name, 0, "not found")
        if not path.is_file():
            return None  # a directory, a device: a word like any other
        nbytes = path.stat().st_size
    except (OSError, ValueError):
        return None
    problem = f"larger than {MAX_FILE_BYTES >> 10} KiB" if nbytes > MAX_FILE_BYTES else ""
    return Mention(token, name, nbytes, problem)
