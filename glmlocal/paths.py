"""Where glmlocal keeps what it fetches and builds. The one place that reads ``GLMLOCAL_HOME``.

Nothing here creates a directory: the writer does, so that asking for a path has no side effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from glmlocal.errors import ConfigError

HOME_VARIABLE = "GLMLOCAL_HOME"


def cache_home(environ: Mapping[str, str] = os.environ) -> Path:
    """``GLMLOCAL_HOME``, else the platform's cache directory for glmlocal; absolute, existing or not.

    Unset and empty mean the same, as for the XDG variables. Raises ConfigError for a value that cannot be a directory.
    """
    return _home(environ, platformdirs.user_cache_dir)


def _home(environ: Mapping[str, str], platform_dir: Callable[[str], str]) -> Path:
    value = environ.get(HOME_VARIABLE, "")
    if not value:
        home = Path(platform_dir("glmlocal"))
        if not home.is_absolute():  # no HOME and no passwd entry, as in a bare container
            raise ConfigError(f"this account has no home directory to cache in; set {HOME_VARIABLE} to a directory")
        return home
    home = Path(os.path.expanduser(value))
    if not home.is_absolute():
        raise ConfigError(f"{HOME_VARIABLE} is {value!r}, a relative path; give an absolute path to a directory")
    nearest = next(path for path in (home, *home.parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise ConfigError(f"{HOME_VARIABLE} is {value!r}, but {str(nearest)!r} is not a directory; give another one")
    return home


def demo_dir() -> Path:
    """Where the demo model lives."""
    return cache_home() / "demo"


def packs_dir() -> Path:
    """Where ``pack`` puts packed models that were given no other place."""
    return cache_home() / "packs"


def measurements_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where ``glmlocal doctor`` keeps what it measured: with ``GLMLOCAL_HOME``, else the platform's state directory,
    because emptying a cache must not lose it. Raises ConfigError as ``cache_home`` does."""
    return _home(environ, platformdirs.user_state_dir) / "measurements.json"


def traces_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """What was learned of models' routing, beside what doctor measured. Raises ConfigError as ``cache_home`` does."""
    return _home(environ, platformdirs.user_state_dir) / "traces"
