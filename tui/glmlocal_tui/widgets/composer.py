"""The prompt with what belongs to it: the menu of completions above, and the chips of what will be sent along."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import OptionList

from glmlocal_tui import mentions
from glmlocal_tui.cleaning import one_line
from glmlocal_tui.messages import PromptChanged, Submitted
from glmlocal_tui.stats import size
from glmlocal_tui.widgets.chips import Chip, ChipInfo, Chips
from glmlocal_tui.widgets.completions import Choice, Completions
from glmlocal_tui.widgets.prompt import Prompt


class Composer(Vertical):
    """``choices(before)`` says what may complete the text before the cursor; ``root`` is where @paths start."""

    DEFAULT_CSS = "Composer { height: auto; width: 1fr; }"

    def __init__(self, root: Path, choices: Callable[[str], Awaitable[list[Choice]]]) -> None:
        super().__init__()
        self._root, self._choices = root, choices

    def compose(self) -> ComposeResult:
        yield Completions()
        yield Chips()
        yield Prompt()

    @work(exclusive=True, group="completion")
    async def on_prompt_changed(self, event: PromptChanged) -> None:
        completions, prompt = self.query_one(Completions), self.query_one(Prompt)
        completions.offer(await self._choices(event.before), event.before)
        prompt.menu_is_open = completions.is_open
        found = await asyncio.to_thread(mentions.find, event.text, self._root) if "@" in event.text else []
        chips = [
            ChipInfo(item.token, f"{one_line(item.path, 40)} · {size(item.nbytes)}", item.problem) for item in found
        ]
        chips += [ChipInfo(token, token.strip("[]")) for token in prompt.pastes()]
        await self.query_one(Chips).show(chips)

    def on_prompt_menu_key(self, event: Prompt.MenuKey) -> None:
        event.stop()
        self._menu_key(event.key)

    def _menu_key(self, key: str) -> None:
        completions, prompt = self.query_one(Completions), self.query_one(Prompt)
        if key in ("up", "down"):
            completions.move(-1 if key == "up" else 1)
            return
        choice, before = completions.chosen(), prompt.before_cursor()
        fresh = choice is not None and before == completions.offered_for  # else typed on since
        if choice is not None and fresh and key != "escape" and before != choice.insert.rstrip():
            prompt.complete(choice.insert, choice.replaces)
        elif key == "enter":  # nothing left to complete
            self.post_message(Submitted(prompt.text))
        completions.offer([])
        prompt.menu_is_open = False

    @on(OptionList.OptionSelected, "Completions")
    def _completion_clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._menu_key("tab")
        self.query_one(Prompt).focus()

    def on_chip_removed(self, event: Chip.Removed) -> None:
        event.stop()
        prompt = self.query_one(Prompt)
        prompt.set_text(prompt.text.replace(event.token, "", 1).strip(" "))
