"""What ``GET /v1/stats`` of glmlocal's server says, as values. A field that is missing or odd is its zero: an older or
newer server must not break the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glmlocal_tui.cleaning import one_line
from glmlocal_tui.sse import number


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    context: int  # tokens; 0: unknown
    quant: str = ""
    kv_dtype: str = ""
    mtp_drafts: int = 0
    supports_thinking: bool = False


@dataclass(frozen=True, slots=True)
class Loading:
    done_bytes: int
    total_bytes: int
    eta_s: float | None
    tier: str


@dataclass(frozen=True, slots=True)
class Device:
    """One memory of the plan: a GPU, the host's RAM, an NVMe drive."""

    name: str
    kind: str
    capacity_bytes: int
    used_bytes: int
    lines: tuple[tuple[str, int], ...]  # what, bytes


@dataclass(frozen=True, slots=True)
class Tier:
    name: str
    lookups: int
    hit_rate: float  # 0 … 1


@dataclass(frozen=True, slots=True)
class Nvme:
    read_bytes_per_s: float
    read_bytes_per_token: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class Mtp:
    drafted: int
    acceptance: float  # 0 … 1


@dataclass(frozen=True, slots=True)
class Stats:
    state: str  # loading, ready, error
    error: str
    model: ModelInfo
    loading: Loading | None
    devices: tuple[Device, ...]
    running: int
    waiting: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    kv_used_tokens: int
    kv_capacity_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    tiers: tuple[Tier, ...]
    nvme: Nvme | None
    mtp: Mtp | None
    rss_bytes: int
    uptime_s: float


def parse(data: Any) -> Stats | None:
    """None: this is not what our server answers."""
    if not isinstance(data, dict) or data.get("state") not in ("loading", "ready", "error"):
        return None
    model, queue, speed, kv = (_dict(data, name) for name in ("model", "queue", "speed", "kv"))
    prefix, loading, nvme, mtp = (_dict(data, name) for name in ("prefix_cache", "loading", "nvme", "mtp"))
    eta = loading.get("eta_s")
    return Stats(
        state=data["state"],
        error=_word(data, "error", 2000),
        model=ModelInfo(
            _word(model, "name"),
            number(model.get("context")),
            _word(model, "quant"),
            _word(model, "kv_dtype"),
            number(model.get("mtp_drafts")),
            model.get("supports_thinking") is True,
        ),
        loading=Loading(
            number(loading.get("done_bytes")),
            number(loading.get("total_bytes")),
            float(eta) if isinstance(eta, (int, float)) else None,
            _word(loading, "tier"),
        )
        if loading
        else None,
        devices=tuple(_device(item) for item in _list(_dict(data, "plan"), "devices")),
        running=number(queue.get("running")),
        waiting=number(queue.get("waiting")),
        decode_tokens_per_s=_real(speed, "decode_tokens_per_s"),
        prefill_tokens_per_s=_real(speed, "prefill_tokens_per_s"),
        kv_used_tokens=number(kv.get("used_tokens")),
        kv_capacity_tokens=number(kv.get("capacity_tokens")),
        prefix_queried_tokens=number(prefix.get("queried_tokens")),
        prefix_hit_tokens=number(prefix.get("hit_tokens")),
        tiers=tuple(
            Tier(_word(item, "tier"), number(item.get("lookups")), _real(item, "hit_rate"))
            for item in _list(data, "tiers")
        ),
        nvme=Nvme(_real(nvme, "read_bytes_per_s"), _real(nvme, "read_bytes_per_token"), _real(nvme, "stall_s"))
        if nvme
        else None,
        mtp=Mtp(number(mtp.get("drafted")), _real(mtp, "acceptance")) if mtp else None,
        rss_bytes=number(_dict(data, "memory").get("rss_bytes")),
        uptime_s=_real(data, "uptime_s"),
    )


def size(nbytes: float) -> str:
    """``1.5 GiB``: three digits at most."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(nbytes) >= 1000 and power + 1 < len(units):
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.0f} {units[power]}" if not power or nbytes >= 100 else f"{nbytes:.1f} {units[power]}"


def _device(item: dict[str, Any]) -> Device:
    return Device(
        _word(item, "name"),
        _word(item, "kind"),
        number(item.get("capacity_bytes")),
        number(item.get("used_bytes")),
        tuple((_word(line, "what"), number(line.get("bytes"))) for line in _list(item, "lines")),
    )


def _dict(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _list(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = data.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _word(data: dict[str, Any], name: str, limit: int = 120) -> str:
    value = data.get(name)
    return one_line(value, limit) if isinstance(value, str) else ""


def _real(data: dict[str, Any], name: str) -> float:
    value = data.get(name)
    return float(value) if isinstance(value, (int, float)) and value == value and abs(value) < 1e18 else 0.0
