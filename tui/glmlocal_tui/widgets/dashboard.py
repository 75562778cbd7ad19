"""The panel that shows what the machine is doing: speed, context, speculation, tiers, memory, disk."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from glmlocal_tui.stats import Stats, size
from glmlocal_tui.widgets.bars import bar, fit, sparkline


@dataclass(frozen=True, slots=True)
class Measured:
    """What the app sees itself, whatever the server: of the last answer, or of the one that is being written."""

    tokens_per_s: float = 0.0
    first_token_s: float | None = None
    context_used: int = 0


class Dashboard(VerticalScroll, can_focus=False):
    DEFAULT_CSS = """
    Dashboard { width: 36; display: none; border-left: solid $primary; padding: 0 1; background: $surface; }
    Dashboard { scrollbar-gutter: stable; scrollbar-size-vertical: 1; }
    Dashboard.-shown { display: block; }
    Dashboard > Static { height: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._body = Static(markup=False)
        self._rates: deque[float] = deque(maxlen=120)  # tokens per second, one a second

    def compose(self) -> ComposeResult:
        yield self._body

    def tick(self, tokens_per_s: float) -> None:
        """Once a second: one more point of the curve."""
        self._rates.append(tokens_per_s)

    def show(self, stats: Stats | None, measured: Measured) -> None:
        if self.has_class("-shown"):
            width = max(self.scrollable_content_region.width, 20)
            self._body.update(Content("\n").join(panel(stats, measured, list(self._rates), width)))


def panel(stats: Stats | None, measured: Measured, rates: list[float], width: int) -> list[Content]:
    """All lines of the panel; a section without figures is left out."""
    shown = [_head("speed", width), Content.styled(sparkline(rates, width), "$success")]
    rate = stats.decode_tokens_per_s if stats and stats.decode_tokens_per_s else measured.tokens_per_s
    shown.append(_pair("decode", f"{rate:.1f} tok/s", width))
    if stats is not None and stats.prefill_tokens_per_s:
        shown.append(_pair("prefill", f"{stats.prefill_tokens_per_s:.0f} tok/s", width))
    if measured.first_token_s is not None:
        shown.append(_pair("first token", f"{measured.first_token_s:.2f} s", width))
    if stats is None:
        if measured.context_used:
            shown.append(_pair("context", f"{measured.context_used:,}", width))
        return [
            *shown,
            Content(""),
            *_note("This server has no /v1/stats: only what the app measures is shown.", width),
        ]
    if stats.running or stats.waiting:
        shown.append(_pair("requests", f"{stats.running} running, {stats.waiting} waiting", width))
    if stats.model.context:
        shown += [_head("context", width), *_gauge("this chat", measured.context_used, stats.model.context, width)]
    if stats.kv_capacity_tokens:
        shown += _gauge("KV cache", stats.kv_used_tokens, stats.kv_capacity_tokens, width)
    if stats.prefix_queried_tokens:
        share = stats.prefix_hit_tokens / stats.prefix_queried_tokens
        shown.append(_pair("prefix cache", f"{share:.0%} of prompts", width))
    if stats.mtp is not None:
        shown += [_head("speculation", width), _share("MTP accepted", stats.mtp.acceptance, width)]
        shown.append(_pair("drafted", f"{stats.mtp.drafted:,}", width))
    if stats.tiers:
        shown += [_head("experts found in", width)]
        shown += [_share(_tier(tier.name), tier.hit_rate, width) for tier in stats.tiers]
    if stats.devices:
        shown.append(_head("memory", width))
        for device in stats.devices:
            shown += _memory(device.name, device.used_bytes, device.capacity_bytes, width)
    if stats.rss_bytes:
        shown.append(_pair("process", size(stats.rss_bytes), width))
    if stats.nvme is not None:
        shown += [_head("disk", width), _pair("reading", f"{stats.nvme.read_bytes_per_s / 1e6:,.0f} MB/s", width)]
        shown.append(_pair("per token", size(stats.nvme.read_bytes_per_token), width))
        shown.append(_pair("waited", f"{stats.nvme.stall_s:.1f} s", width))
    return shown


def _tier(name: str) -> str:
    return {"gpu": "VRAM", "ram": "RAM", "nvme": "NVMe"}.get(name, name)


def _head(text: str, width: int) -> Content:
    return Content.styled(f"{text} ".ljust(width, "─"), "$text-muted")


def _pair(name: str, value: str, width: int) -> Content:
    return Content(fit(name, max(width - len(value) - 1, 1)) + " ") + Content.styled(value, "bold")


def _share(name: str, share: float, width: int) -> Content:
    percent, label = f" {share:4.0%}", fit(name, min(13, width // 2))
    return (
        Content(label + " ")
        + Content.styled(bar(share, max(width - len(percent) - len(label) - 1, 1)), "$accent")
        + Content(percent)
    )


def _gauge(name: str, used: int, limit: int, width: int) -> list[Content]:
    return [_pair(name, f"{used:,} / {limit:,}", width), Content.styled(bar(used / limit, width), "$primary")]


def _memory(name: str, used: int, capacity: int, width: int) -> list[Content]:
    share = used / capacity if capacity else 0.0
    return [_pair(name, f"{size(used)} / {size(capacity)}", width), Content.styled(bar(share, width), "$secondary")]


def _note(text: str, width: int) -> list[Content]:
    import textwrap

    return [Content.styled(line, "$text-muted") for line in textwrap.wrap(text, width)]
