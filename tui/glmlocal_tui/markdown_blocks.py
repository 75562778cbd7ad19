"""Markdown that grows: text appended in pieces → top-level blocks, of which only the last is ever looked at again.

What comes before the last block cannot change by what follows it, so an answer costs what its last block costs, however
long it is. (Textual's own ``Markdown.append`` parses the same way but lays out every widget of the document each time.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt


@dataclass(frozen=True, slots=True)
class Block:
    """A top-level block: its source, and for a fenced or indented code block the code and its language."""

    source: str
    code: str | None = None
    language: str = ""


@dataclass(slots=True)
class Blocks:
    """``closed`` never changes but by growing; ``tail`` is what may still grow or become something else."""

    source: str = ""
    closed: list[Block] = field(default_factory=list)
    tail: list[Block] = field(default_factory=list)
    _tail_start: int = 0  # in ``source``

    def append(self, text: str) -> None:
        self.source += text
        rest = self.source[self._tail_start :]
        found = _split(rest)
        if len(found) > 1:
            self.closed += found[:-1]
            self._tail_start += sum(len(block.source) for block in found[:-1])
        self.tail = found[-1:]

    def all(self) -> list[Block]:
        return [*self.closed, *self.tail]


def _split(text: str) -> list[Block]:
    """The top-level blocks; their sources joined are the text."""
    if not text.strip():
        return [Block(text)] if text else []
    lines = text.split("\n")
    starts, blocks = [0], []
    tokens = [token for token in _parser().parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    starts += [token.map[0] for token in tokens[1:] if token.map]
    for position, start in enumerate(starts):
        last = position + 1 == len(starts)
        source = "\n".join(lines[start:] if last else lines[start : starts[position + 1]]) + ("" if last else "\n")
        token = tokens[position] if tokens else None
        if token is not None and token.type in ("fence", "code_block"):
            words = token.info.split()
            blocks.append(Block(source, token.content, words[0] if words else ""))
        else:
            blocks.append(Block(source))
    return blocks


@cache
def _parser() -> MarkdownIt:
    """Block structure alone: inline text is rendered, once, elsewhere."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
