"""A conversation: a tree of messages and the leaf that is being read. Pure values and one small mutable tree.

Editing a message or asking for another answer adds a sibling; nothing that was said is ever lost.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from glmlocal_tui.sse import Usage


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file or a long paste that goes to the model in full and is shown as a chip."""

    kind: str  # file, paste
    name: str  # a path, or the paste's token in the text
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``ending``: empty while it is being written, else the server's finish reason, ``stopped`` or
    ``error``."""

    id: str
    parent_id: str | None
    role: str  # user, assistant
    content: str
    reasoning: str = ""
    attachments: tuple[Attachment, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    ending: str = ""
    error: str = ""
    usage: Usage | None = None
    model: str = ""
    created_s: float = 0.0

    def for_model(self) -> str:
        """The text with pastes in their places and files after it."""
        text = self.content
        for attachment in self.attachments:
            if attachment.kind == "paste":
                text = text.replace(attachment.name, attachment.text, 1)
        files = [f'<file path="{item.name}">\n{item.text}\n</file>' for item in self.attachments if item.kind == "file"]
        return "\n\n".join([text, *files])


def new_id() -> str:
    return uuid.uuid4().hex


def user_message(parent_id: str | None, content: str, attachments: Iterable[Attachment] = ()) -> Message:
    return Message(
        new_id(), parent_id, "user", content, attachments=tuple(attachments), ending="stop", created_s=time.time()
    )


@dataclass(slots=True)
class Conversation:
    """Messages by id, in the order they were written, and the leaf of the branch that is shown."""

    id: str = field(default_factory=new_id)
    title: str = ""
    system: str = ""
    created_s: float = field(default_factory=time.time)
    messages: dict[str, Message] = field(default_factory=dict)
    leaf: str | None = None

    def path(self, leaf: str | None = None) -> list[Message]:
        """The branch that ends in ``leaf`` (the shown one if None), oldest first."""
        found: list[Message] = []
        at = self.leaf if leaf is None else leaf
        while at is not None and len(found) <= len(self.messages):
            message = self.messages.get(at)
            if message is None:
                break
            found.append(message)
            at = message.parent_id
        return found[::-1]

    def add(self, message: Message) -> None:
        """Put in a message, or a newer state of one, and show its branch."""
        self.messages[message.id] = message
        self.leaf = message.id
        if not self.title and message.role == "user":
            self.title = title_of(message.content)

    def update(self, message: Message) -> None:
        """A newer state of a message that is here already."""
        self.messages[message.id] = message

    def siblings(self, message_id: str) -> list[str]:
        """The message and its alternatives, oldest first."""
        parent = self.messages[message_id].parent_id
        return [other.id for other in self.messages.values() if other.parent_id == parent]

    def switch(self, message_id: str, step: int) -> bool:
        """Show the next (or previous) alternative of a message, with the newest that follows it."""
        siblings = self.siblings(message_id)
        position = siblings.index(message_id) + step
        if not 0 <= position < len(siblings):
            return False
        self.leaf = self._newest_below(siblings[position])
        return True

    def show(self, message_id: str) -> None:
        """Show the branch that a message is on."""
        if message_id not in {message.id for message in self.path()}:
            self.leaf = self._newest_below(message_id)

    def _newest_below(self, message_id: str) -> str:
        while below := [other.id for other in self.messages.values() if other.parent_id == message_id]:
            message_id = below[-1]
        return message_id

    def request(self, leaf: str | None) -> list[dict[str, Any]]:
        """The messages of a chat completion request that continues after ``leaf``. Earlier thinking is not repeated,
        as the models' own templates drop it; an answer that never began is left out."""
        sent: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for message in self.path(leaf) if leaf is not None else []:
            if message.role == "user":
                sent.append({"role": "user", "content": message.for_model()})
            elif message.content or message.tool_calls:
                sent.append({"role": "assistant", "content": message.content or None} | _calls(message))
        return sent


def title_of(content: str) -> str:
    line = " ".join(content.split())
    return line if len(line) <= 60 else line[:59] + "…"


def with_piece(
    calls: tuple[ToolCall, ...], index: int | None, id_: str, name: str, arguments: str
) -> tuple[ToolCall, ...]:
    """Tool calls with one more piece of the ``index``-th; without an index of the last, unless the id is another."""
    if index is None:
        begins = not calls or (id_ and id_ != calls[-1].id)
        index = len(calls) if begins else len(calls) - 1
    if not 0 <= index <= len(calls):
        index = len(calls)
    if index == len(calls):
        return (*calls, ToolCall(id_ or f"call_{index}", name, arguments))
    old = calls[index]
    new = replace(old, id=id_ or old.id, name=old.name + name, arguments=old.arguments + arguments)
    return (*calls[:index], new, *calls[index + 1 :])


def _calls(message: Message) -> dict[str, Any]:
    if not message.tool_calls:
        return {}
    return {
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    }
