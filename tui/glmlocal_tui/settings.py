"""What a person sets once: a small JSON file in the platform's config directory, read and written here."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults live here; the settings screen and the slash commands change single fields."""

    theme: str = "textual-dark"
    thinking: bool = True  # let the model think before it answers
    keep_thinking_open: bool = False  # do not fold the thinking when the answer begins
    sidebar: bool = False
    dashboard: bool = False
    temperature: float | None = None  # None: the model's own
    top_p: float | None = None
    max_tokens: int | None = None
    system: str = ""  # of new conversations


@dataclass(frozen=True, slots=True)
class Loaded:
    settings: Settings
    problem: str  # empty: none


def load(path: Path) -> Loaded:
    """What the file says; fields that are missing or odd are the defaults, and the reason is told."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Loaded(Settings(), "")
    except (OSError, ValueError) as error:
        return Loaded(Settings(), f"{path} cannot be read ({error}): the defaults are used")
    if not isinstance(data, dict):
        return Loaded(Settings(), f"{path} is not a JSON object: the defaults are used")
    good = {field.name: data[field.name] for field in fields(Settings) if _fits(field.name, data.get(field.name, ...))}
    odd = sorted(set(data) & {field.name for field in fields(Settings)} - set(good))
    return Loaded(Settings(**good), f"{path}: {', '.join(odd)} cannot be used: the defaults are" if odd else "")


def save(path: Path, settings: Settings) -> None:
    """Replace the file in one step. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(asdict(settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _fits(name: str, value: Any) -> bool:
    default = getattr(Settings(), name)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str)
    if value is None:
        return True
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return valid_number(name, float(value)) and (name != "max_tokens" or isinstance(value, int))


def valid_number(name: str, value: float) -> bool:
    low, high = LIMITS[name]
    return low <= value <= high


LIMITS = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "max_tokens": (1, 1 << 24)}


def parse_number(name: str, text: str) -> float | int | None:
    """``""`` and ``default`` → None. Raises ValueError with a sentence for the screen."""
    text = text.strip()
    if text in ("", "default"):
        return None
    low, high = LIMITS[name]
    try:
        value: float | int = int(text) if name == "max_tokens" else float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ValueError(f"{name.replace('_', ' ')} is a number from {low:g} to {high:g}, or default; found {text!r}")
    return value
