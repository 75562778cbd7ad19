"""The slash commands: their names, what they take, and how a line that starts with / is understood."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """``name`` is also the method that runs it; ``takes`` is shown in the help, empty for a command without words."""

    name: str
    takes: str
    help: str
    keys: str = ""


COMMANDS = (
    Command("new", "", "start a new conversation", "ctrl+n"),
    Command("search", "[TEXT]", "search all conversations", "f3"),
    Command("load", "[TITLE]", "open another conversation", "f2"),
    Command("rename", "TITLE", "give this conversation another title"),
    Command("delete", "", "delete this conversation; /undo brings it back"),
    Command("undo", "", "bring back the conversation deleted last"),
    Command("regenerate", "", "answer the last message again, as another branch", "ctrl+r"),
    Command("edit", "", "edit your last message and send it again, as another branch", "f6"),
    Command("copy", "[code]", "copy the last answer, or its last code block", "f7"),
    Command("export", "FILE", "write the conversation to FILE.md or FILE.json"),
    Command("model", "[NAME]", "show the models of the server, or change to one"),
    Command("think", "", "let the model think before it answers"),
    Command("nothink", "", "answer at once"),
    Command("system", "[TEXT]", "set the system prompt of this conversation; without a text: show it"),
    Command("temp", "NUMBER", "sampling temperature, 0 to 2, or default"),
    Command("top_p", "NUMBER", "sample among the likeliest tokens that hold this probability together, or default"),
    Command("max_tokens", "NUMBER", "end answers after this many tokens, or default"),
    Command("stats", "", "show or hide the dashboard", "f4"),
    Command("theme", "[NAME]", "change the colours"),
    Command("settings", "", "what is kept for the next time", "f5"),
    Command("restart", "", "start the server again after it has ended"),
    Command("web", "", "how to open this app in a browser"),
    Command("help", "", "keys and commands", "f1"),
    Command("quit", "", "leave", "ctrl+q"),
)
BY_NAME = {command.name: command for command in COMMANDS}


@dataclass(frozen=True, slots=True)
class Call:
    command: Command
    words: str


def parse(text: str) -> Call | str | None:
    """A command, a sentence about what is wrong with one, or None for a message. ``//x`` is the message ``/x``, and
    a path such as ``/etc/hosts`` is no command."""
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, words = text[1:].partition(" ")
    if "/" in name or "\n" in name:
        return None
    words = words.strip()
    command = BY_NAME.get(name.strip().replace("-", "_"))
    if command is None:
        near = difflib.get_close_matches(name, BY_NAME, n=1)
        return f"there is no command /{name}" + (f": did you mean /{near[0]}?" if near else "; /help lists them")
    if words and not command.takes:
        return f"/{name} takes no words; // at the start sends a message that begins with /"
    if not words and command.takes and not command.takes.startswith("["):
        return f"/{name} wants {command.takes}: {command.help}"
    return Call(command, words)


def complete(text: str) -> list[Command]:
    """The commands that a half-typed one may be; nothing once it has a space."""
    if not text.startswith("/") or any(char.isspace() for char in text):
        return []
    return [command for command in COMMANDS if command.name.startswith(text[1:])]
