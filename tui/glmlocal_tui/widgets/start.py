"""What is on the screen before the first message: the model, its plan as memory bars, and how the loading goes."""

from __future__ import annotations

from rich.cells import cell_len
from textual.content import Content
from textual.widgets import Static

from glmlocal_tui.connection import FAILED, LOADS, LOST, NO_KEY, STARTING, ServerState
from glmlocal_tui.stats import Device, Loading, size
from glmlocal_tui.widgets.bars import bar, counted, fit

_HINTS = (
    "Enter sends · Ctrl+J new line · Esc stops · @file attaches",
    "/ commands · Ctrl+P palette · F1 help · F2 chats · F3 search · F4 dashboard",
)


class StartView(Static):
    DEFAULT_CSS = "StartView { height: 1fr; width: 1fr; padding: 1 2; }"

    def __init__(self, target: str) -> None:
        super().__init__(markup=False)
        self._target = target  # what was asked for: a model's name or a URL
        self._state = ServerState()

    def show(self, state: ServerState) -> None:
        self._state = state
        self.refresh()

    def render(self) -> Content:
        return Content("\n").join(lines(self._state, self._target, self.size.width, self.size.height))


def lines(state: ServerState, target: str, width: int, height: int) -> list[Content]:
    """The whole screen for a state, at most ``height`` lines."""
    model = state.stats.model if state.stats else None
    name = (model.name if model else "") or (state.models[0] if state.models else target)
    facts = []
    if model is not None:
        facts += [f"context {model.context:,}"] if model.context else []
        facts += [word for word in (model.quant, f"KV {model.kv_dtype}" if model.kv_dtype else "") if word]
        facts += [counted(model.mtp_drafts, "MTP draft")] if model.mtp_drafts else []
    shown = [
        Content.styled(fit(name, width).rstrip(), "bold $primary"),
        Content.styled(" · ".join(facts), "$text-muted"),
    ]
    shown += [Content(""), *_phase(state, width)]
    devices = state.stats.devices if state.stats else ()
    if devices:
        ledger_lines = height - len(shown) - len(_HINTS) - 3 - len(devices)
        shown += [Content(""), *_plan(devices, width, max(ledger_lines, 0))]
    shown += [Content(""), *(Content.styled(hint, "$text-muted") for hint in _HINTS)]
    return shown[: max(height, 1)]


def _phase(state: ServerState, width: int) -> list[Content]:
    if state.phase == STARTING:
        return [Content("starting the server …")]
    if state.phase == LOADS:
        loading = state.stats.loading if state.stats else None
        return _loading(loading, width) if loading else [Content(state.problem or "loading the model …")]
    if state.phase == FAILED:
        title = "The model could not be loaded."
    elif state.phase == LOST:
        title = "The server does not answer."
    elif state.phase == NO_KEY:
        title = "The server wants another key."
    else:
        return [Content.styled("ready: ask something", "$text-success")]
    return [Content.styled(title, "bold $text-error"), *(Content(line) for line in _wrapped(state.problem, width))]


def _loading(loading: Loading, width: int) -> list[Content]:
    if not loading.total_bytes:
        return [Content("loading the model …")]
    fraction = loading.done_bytes / loading.total_bytes
    where = {"ram": "RAM", "gpu": "GPU memory", "nvme": "NVMe"}.get(loading.tier, loading.tier)
    text = f"loading into {where or 'memory'}: {size(loading.done_bytes)} of {size(loading.total_bytes)}"
    if loading.eta_s is not None:
        text += f" · {duration(loading.eta_s)} left"
    percent = f" {fraction:4.0%}"
    return [
        Content(text),
        Content.styled(bar(fraction, max(min(width, 72) - len(percent), 1)), "$primary") + Content(percent),
    ]


def _plan(devices: tuple[Device, ...], width: int, ledger_lines: int) -> list[Content]:
    """A bar per memory, and what fills it as far as there is room."""
    label = min(max(cell_len(device.name) for device in devices), 24)
    shown = [Content.styled("memory plan", "$text-muted")]
    for device in devices:
        amount = f"  {size(device.used_bytes)} of {size(device.capacity_bytes)}"
        fraction = device.used_bytes / device.capacity_bytes if device.capacity_bytes else 0.0
        room = max(min(width, 96) - label - 1 - cell_len(amount), 4)
        shown.append(
            Content(fit(device.name, label) + " ") + Content.styled(bar(fraction, room), "$accent") + Content(amount)
        )
        largest = sorted((line for line in device.lines if line[1]), key=lambda line: -line[1])
        for what, nbytes in largest[: ledger_lines // len(devices)]:
            shown.append(Content.styled(f"{' ' * (label + 1)}{fit(size(nbytes), 10)} {what}", "$text-muted"))
    return shown


def _wrapped(text: str, width: int) -> list[str]:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=max(width, 10))
    return [line.plain.rstrip() for line in Text(text).wrap(console, max(width, 10))]


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
