"""A conversation as a Markdown or JSON file."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmlocal_tui.conversation import Conversation, Message


def write(conversation: Conversation, name: str, root: Path) -> Path:
    """Write the shown branch as ``.md``, or everything as ``.json``; a file that exists is never replaced.

    Raises ValueError, with a sentence, for another ending or a file that exists, and OSError.
    """
    path = root / os.path.expanduser(name)
    if path.suffix not in (".md", ".json"):
        raise ValueError(f"{name}: export writes .md or .json files")
    content = as_json(conversation) if path.suffix == ".json" else as_markdown(conversation)
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        draft.write_text(content, encoding="utf-8")
        os.link(draft, path)  # unlike a rename, never replaces
    except FileExistsError:
        raise ValueError(f"{path} exists; nothing was written") from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def as_markdown(conversation: Conversation) -> str:
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.system:
        parts.append(f"## System\n\n{conversation.system}")
    parts += [_section(message) for message in conversation.path()]
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation) -> str:
    """All branches; ``leaf`` says which one was shown."""
    data: dict[str, Any] = asdict(conversation)
    data["messages"] = [asdict(message) for message in conversation.messages.values()]
    return json.dumps({"glmlocal_chat": 1, **data}, indent=2, ensure_ascii=False) + "\n"


def _section(message: Message) -> str:
    lines = ["## You" if message.role == "user" else f"## Assistant{f' ({message.model})' if message.model else ''}"]
    if message.reasoning.strip():
        fence = _fence(message.reasoning)
        lines.append(
            f"<details><summary>Thinking</summary>\n\n{fence}text\n{message.reasoning.strip()}\n{fence}\n\n</details>"
        )
    lines.append(message.for_model() if message.role == "user" else message.content)
    for call in message.tool_calls:
        fence = _fence(call.arguments)
        lines.append(f"Tool call `{call.name}`:\n\n{fence}json\n{call.arguments}\n{fence}")
    if message.ending in ("stopped", "length", "error"):
        lines.append(
            {"stopped": "*(stopped)*", "length": "*(cut at the token limit)*", "error": "*(failed)*"}[message.ending]
        )
    return "\n\n".join(line for line in lines if line)


def _fence(text: str) -> str:
    """Backticks enough to hold a text that has fences itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
