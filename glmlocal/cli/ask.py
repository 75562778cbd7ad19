"""Questions that a command asks before it does something costly. Never without a person at a terminal."""

from __future__ import annotations

import sys

from glmlocal.cli.terminal import one_line
from glmlocal.errors import ConfigError


def somebody_is_there() -> bool:
    """Whether a question would be seen and could be answered."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, *, default: bool) -> bool:
    """Ask on stderr; Enter means ``default``. Raises ConfigError where nobody could answer."""
    if not somebody_is_there():
        raise ConfigError(f"{question} Nobody is at a terminal to ask; give --yes to go ahead")
    choices = "[Y/n]" if default else "[y/N]"
    while True:
        print(f"{one_line(question)} {choices} ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:  # end of input
            print(file=sys.stderr)
            return False
        word = answer.strip().lower()
        if word in ("", "y", "yes", "n", "no"):
            return word[:1] == "y" if word else default
