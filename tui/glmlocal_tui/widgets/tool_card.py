"""A call that the model wants made, as a card: the name, and its arguments laid out."""

from __future__ import annotations

import json

from textual.content import Content

from glmlocal_tui.cleaning import clean, one_line
from glmlocal_tui.conversation import ToolCall
from glmlocal_tui.widgets.laid_out import Words

_MAX_CHARS = 4000


class ToolCard(Words):
    """This app runs no tools: the card says what was asked for."""

    DEFAULT_CSS = """
    ToolCard {
        width: 1fr; height: auto; margin: 0 0 1 0; padding: 0 1;
        border: round $warning; border-title-color: $warning; color: $text;
    }
    """

    def __init__(self, call: ToolCall) -> None:
        super().__init__(markup=False)
        self.show(call)

    def show(self, call: ToolCall) -> None:
        self.border_title = Content(f"tool call · {one_line(call.name, 60) or '…'}")
        self.border_subtitle = Content("not run by this app")
        self.update(Content(pretty(call.arguments)))


def pretty(arguments: str) -> str:
    """JSON arguments one to a line; anything else, such as a half of them, as it is."""
    try:
        data = json.loads(arguments)
    except ValueError:
        text = arguments
    else:
        if not data:
            return "(no arguments)"
        text = (
            "\n".join(
                f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
                for name, value in data.items()
            )
            if isinstance(data, dict)
            else json.dumps(data, ensure_ascii=False, indent=2)
        )

    text = clean(text)  # JSON escapes may have hidden control characters
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + f"… ({len(text) - _MAX_CHARS:,} more characters)"
