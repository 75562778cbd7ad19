"""The menu above the prompt: what a half-typed command or @path may mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from glmlocal_tui.widgets.bars import fit


@dataclass(frozen=True, slots=True)
class Choice:
    """``insert`` replaces the last ``replaces`` characters before the cursor."""

    insert: str
    replaces: int
    label: str
    note: str = ""


class Completions(OptionList, can_focus=False):
    DEFAULT_CSS = """
    Completions { display: none; height: auto; max-height: 8; border: none; padding: 0 1; background: $panel; }
    Completions.-shown { display: block; }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)
        self._choices: list[Choice] = []
        self.offered_for = ""

    @property
    def is_open(self) -> bool:
        return bool(self._choices)

    def offer(self, choices: Sequence[Choice], before: str = "") -> None:
        """Show what may complete ``before``, the text before the cursor; nothing closes the menu."""
        self._choices, self.offered_for = list(choices), before
        self.clear_options()
        label = min(max((len(choice.label) for choice in choices), default=0), 40)
        for choice in choices:
            self.add_option(
                Option(Content(fit(choice.label, label) + "  ") + Content.styled(choice.note, "$text-muted"))
            )
        self.highlighted = 0 if choices else None
        self.set_class(bool(choices), "-shown")

    def move(self, step: int) -> None:
        if self._choices:
            self.highlighted = ((self.highlighted or 0) + step) % len(self._choices)

    def chosen(self) -> Choice | None:
        return self._choices[self.highlighted] if self._choices and self.highlighted is not None else None
