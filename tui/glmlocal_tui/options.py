"""What the app is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from glmlocal_tui.client import Sampling


def data_dir() -> Path:
    return Path(platformdirs.user_data_dir("glmlocal")) / "chat"


def settings_path() -> Path:
    return Path(platformdirs.user_config_dir("glmlocal")) / "chat.json"


@dataclass(frozen=True, slots=True)
class Options:
    """``command`` starts a server of our own, which prints where it listens; without it ``url`` is somebody's."""

    target: str  # what the user asked for: a model's name or the URL, for the screen
    url: str = ""
    key: str = field(default="", repr=False)
    command: tuple[str, ...] = ()
    model: str = ""  # of the server's names; empty: its first
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)  # what the command line decides, over the settings
    data_dir: Path = field(default_factory=data_dir)
    settings_path: Path = field(default_factory=settings_path)
    root: Path = field(default_factory=Path.cwd)  # where @paths start
