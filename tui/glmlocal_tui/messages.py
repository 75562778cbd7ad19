"""What widgets tell the app. Each is a small value; the app decides what it means."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from glmlocal_tui.connection import ServerState


@dataclass
class Submitted(Message):
    """Enter in the prompt: ``text`` as typed, with the tokens of pastes."""

    text: str


@dataclass
class CopyRequested(Message):
    """A text is wanted on the clipboard; ``what`` names it in the confirmation."""

    text: str
    what: str


@dataclass
class BranchStep(Message):
    """The next (+1) or previous (-1) alternative of a message."""

    message_id: str
    step: int


@dataclass
class EditRequested(Message):
    """A message of the user is to be changed and sent again."""

    message_id: str


@dataclass
class RegenerateRequested(Message):
    """Another answer is wanted in the place of this one."""

    message_id: str


@dataclass
class SessionChosen(Message):
    """A conversation to open, and the message of it to show (empty: the end)."""

    session_id: str
    message_id: str = ""


@dataclass
class ServerChanged(Message):
    state: ServerState


@dataclass
class EarlierRequested(Message):
    """The reader is at the top and wants what came before."""


@dataclass
class PromptChanged(Message):
    """The text before the cursor, and all of it."""

    before: str
    text: str


@dataclass
class TypedOutside(Message):
    """A letter that was typed where it is no command: the prompt's."""

    character: str
