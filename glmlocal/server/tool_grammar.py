"""Grammars for what an answer must be: a format for its content, calls that have to be made, or both."""

from __future__ import annotations

from glmlocal.engine.request import Grammar
from glmlocal.server.generation import ToolUse


def answer_grammar(content: Grammar | None, use: ToolUse) -> Grammar | None:
    """The grammar of a whole answer after its reasoning; None: anything goes."""
    return content
