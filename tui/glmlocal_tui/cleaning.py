"""Text from a model, a server or a file, made harmless before it is kept or shown.

Everything that comes over HTTP or out of a file name passes through here once, at the border: a model can be talked
into writing escape sequences (title, clipboard, cursor), directional overrides that make a command read as another,
or line separators that Markdown parsers count differently. Each character stands alone, so the way a text was cut into
chunks cannot matter.
"""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1, marks that reorder text, line separators, invisible tags, lone surrogates
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(text: str) -> str:
    """The same text with control characters as pictures (␛) or U+FFFD; CR goes, other line ends become newlines."""
    return _UNSAFE.sub(_replacement, text)


def one_line(text: str, limit: int = 300) -> str:
    """Text for a title or a message: clean, without newlines, at most ``limit`` characters."""
    line = clean(" ".join(text[: 8 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _replacement(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code == 0x0D:
        return ""
    if code < 0x20:
        return chr(0x2400 + code)
    if code in (0x85, 0x2028, 0x2029):
        return "\n"
    return "␡" if code == 0x7F else "\ufffd"
