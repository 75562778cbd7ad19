"""What is kept for the next time, as a form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Select, Static

from glmlocal_tui.settings import Settings, parse_number

_SWITCHES = (
    ("thinking", "think before answering"),
    ("keep_thinking_open", "keep the thinking open"),
    ("sidebar", "show conversations at start"),
    ("dashboard", "show dashboard at start"),
)
_NUMBERS = (("temperature", "temperature"), ("top_p", "top_p"), ("max_tokens", "max tokens"))


class OnOff(Static, can_focus=True):
    """Says in words which it is: colours may be missing."""

    DEFAULT_CSS = "OnOff { width: auto; height: 1; padding: 0 1; } OnOff:focus { text-style: reverse; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,space", "toggle", "Change", show=False)]

    def __init__(self, value: bool, *, id: str) -> None:
        super().__init__(markup=False, id=id)
        self.value = value

    def render(self) -> Content:
        return Content("● on " if self.value else "○ off")

    def on_click(self) -> None:
        self.action_toggle()

    def action_toggle(self) -> None:
        self.value = not self.value
        self.refresh()


class SettingsScreen(ModalScreen[Settings | None]):
    """Esc keeps what is valid; a field that is not says so in place."""

    DEFAULT_CSS = """
    SettingsScreen { align: center middle; }
    SettingsScreen > VerticalScroll { width: 66; max-width: 100%; height: auto; max-height: 95%; padding: 0 1; }
    SettingsScreen > VerticalScroll { border: round $primary; background: $surface; }
    SettingsScreen Horizontal { height: auto; }
    SettingsScreen Horizontal > .label { width: 28; height: 1; }
    SettingsScreen Input { width: 1fr; }
    SettingsScreen Select { width: 1fr; }
    SettingsScreen #problem { height: auto; color: $text-error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f5", "close", "Close", priority=True)]

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = "settings"
            box.border_subtitle = "Esc saves and closes"
            with Horizontal():
                yield Static("theme", markup=False, classes="label")
                names = sorted(self.app.available_themes)
                theme = self._settings.theme if self._settings.theme in names else self.app.theme
                yield Select([(name, name) for name in names], value=theme, allow_blank=False, id="theme", compact=True)
            for name, label in _SWITCHES:
                with Horizontal():
                    yield Static(label, markup=False, classes="label")
                    yield OnOff(getattr(self._settings, name), id=name)
            for name, label in _NUMBERS:
                with Horizontal():
                    value = getattr(self._settings, name)
                    yield Static(label, markup=False, classes="label")
                    shown = "" if value is None else str(value)
                    yield Input(shown, placeholder="the model's own", id=name, compact=True)
            with Horizontal():
                yield Static("system prompt", markup=False, classes="label")
                yield Input(self._settings.system, placeholder="none", id="system", compact=True)
            yield Static(id="problem", markup=False)

    def on_select_changed(self, event: Select.Changed) -> None:
        self.app.theme = str(event.value)

    def on_input_changed(self, event: Input.Changed) -> None:
        self.query_one("#problem", Static).update(Content(self._problem()))

    def action_close(self) -> None:
        if not self._problem():
            self.dismiss(replace(self._settings, **self._values()))

    def _problem(self) -> str:
        for name, _ in _NUMBERS:
            try:
                parse_number(name, self.query_one(f"#{name}", Input).value)
            except ValueError as error:
                return str(error)
        return ""

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: self.query_one(f"#{name}", OnOff).value for name, _ in _SWITCHES}
        values |= {name: parse_number(name, self.query_one(f"#{name}", Input).value) for name, _ in _NUMBERS}
        values["system"] = self.query_one("#system", Input).value
        values["theme"] = str(self.query_one("#theme", Select).value)
        return values
