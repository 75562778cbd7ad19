"""What goes with the message: mentioned files and long pastes. A click on a chip takes it out of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.widgets import Static


@dataclass(frozen=True, slots=True)
class ChipInfo:
    token: str  # as it stands in the text
    label: str
    problem: str = ""


class Chip(Static):
    DEFAULT_CSS = """
    Chip { width: auto; height: 1; margin: 0 1 0 0; padding: 0 1; background: $primary-muted; color: $text-primary; }
    Chip.-problem { background: $error-muted; color: $text-error; }
    """

    class Removed(Message):
        def __init__(self, token: str) -> None:
            super().__init__()
            self.token = token

    def __init__(self, info: ChipInfo) -> None:
        label = f"{info.label}: {info.problem}" if info.problem else info.label
        super().__init__(Content(f"{label} ×"), classes="-problem" if info.problem else "", markup=False)
        self._token = info.token

    def on_click(self) -> None:
        self.post_message(self.Removed(self._token))


class Chips(Horizontal):
    DEFAULT_CSS = "Chips { height: 1; display: none; padding: 0 1; } Chips.-shown { display: block; }"

    def __init__(self) -> None:
        super().__init__()
        self._shown: list[ChipInfo] = []

    async def show(self, chips: Sequence[ChipInfo]) -> None:
        if list(chips) != self._shown:
            self._shown = list(chips)
            await self.remove_children()
            await self.mount_all([Chip(info) for info in chips])
            self.set_class(bool(chips), "-shown")
