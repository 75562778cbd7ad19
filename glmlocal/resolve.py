"""MODEL, as a person writes it, → the path of a checkpoint. The one place that knows which names mean what."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path

from glmlocal.errors import ConfigError
from glmlocal.paths import packs_dir

PACK_FILE = "experts.pack"  # formats.expert_pack.PACK_FILE, which would import numpy
DEMO = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?(@[\w./-]+)?")
_FAMILY_NAME = re.compile(r"(z-?ai-?)?(chat)?glm-?\d[\w.-]*(:[\w.-]+)?(@[\w./-]+)?", re.IGNORECASE)
_MAX_SIBLINGS = 10_000  # looked at for a near miss


def resolve(model: str | Path, *, progress: bool = True) -> Path:
    """A directory, a ``.gguf`` file, ``demo``, a packed model of ``ls``, or a name of a hub that was pulled → its path.

    ``demo`` is the built-in demonstration model, fetched on first use (DownloadError when that fails), even where a
    directory of that name exists: write ``./demo``, or pass a Path, for the directory. Whether what lies at the path is
    a model is for ``formats`` to say. Nothing of a hub is fetched here: what has not been pulled is NotPulled, a
    ConfigError. Raises ConfigError for anything else.
    """
    if isinstance(model, str):
        if model == DEMO:
            from glmlocal.demo.cache import ensure_demo  # brings numpy and gguf in

            return ensure_demo(progress=progress)
        if not model.strip():
            raise ConfigError("the model's name is empty; give a directory, a .gguf file or `demo`")
    path = Path(model)
    if path.parts[:1] == ("~",):  # the shell expands it, Python callers and quotes do not
        path = Path(os.path.expanduser(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(model, str) and (packed := _packed(path)):
            return packed
        if isinstance(model, str) and _is_hub_name(model, path):
            return _pulled(model, path)
        raise _not_found(str(model), path) from None
    except (OSError, ValueError) as error:  # no permission, name too long, NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot look at {str(model)!r}: {reason}; give a directory, a .gguf file or `demo`"
        ) from error
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    what = "a file, but not a .gguf" if path.is_file() else "neither a directory nor a file"
    hint = f"; did you mean its directory, {str(path.parent)!r}?" if path.suffix in (".safetensors", ".json") else ""
    raise ConfigError(f"{str(model)!r} is {what}; give a directory, a .gguf file or `demo`{hint}")


def _packed(path: Path) -> Path | None:
    """Where the packed model of that plain name is, as ``ls`` shows it."""
    directory = packs_dir() / path.name
    return directory if len(path.parts) == 1 and (directory / PACK_FILE).is_file() else None


def _is_hub_name(name: str, path: Path) -> bool:
    beside = path.parent != Path() and path.parent.exists()  # then `models/Air` is a path and no hub id
    is_path = beside or name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf"
    return not is_path and bool(_FAMILY_NAME.fullmatch(name) or _HUB_ID.fullmatch(name))


def _pulled(name: str, path: Path) -> Path:
    """Where a model of a hub is on this disk. Raises NotPulled, which says how to fetch it."""
    from glmlocal.hub import local

    try:
        return local.find_by_name(name).path
    except local.FamilyNotPulled as error:
        if packs := _packs_of(name):
            here = " and ".join(packs)
            raise ConfigError(f"{name} is a family; of its releases {here} is here, packed: name it") from error
        raise
    except local.NotPulled as error:
        near = _near_misses(path, offer_demo=False)
        raise (local.NotPulled(error.source, f"is not here (did you mean {near[0]}?)") if near else error) from None


def _packs_of(family: str) -> list[str]:
    """By their names, which begin with that of what was packed."""
    with suppress(OSError):
        known = sorted(path.name for path in packs_dir().iterdir() if (path / PACK_FILE).is_file())
        return [name for name in known if name.lower().startswith(f"{family.lower()}-")]
    return []


def _not_found(name: str, path: Path) -> ConfigError:
    near = _near_misses(path, offer_demo=len(path.parts) == 1)
    question = f"did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"there is no {name!r}; {question or 'give a directory, a .gguf file or `demo`'}")


def _near_misses(path: Path, *, offer_demo: bool) -> list[str]:
    """Models beside ``path`` whose names are close to its own, as the user could have written them."""
    names: dict[str, str] = {}  # as compared → as written
    try:
        with os.scandir(path.parent) as entries:
            for _, entry in zip(range(_MAX_SIBLINGS), entries, strict=False):
                if entry.name.lower().endswith(".gguf") or entry.is_dir():
                    names.setdefault(_comparable(entry.name), str(path.parent / entry.name))
    except OSError:
        pass  # no such directory: nothing is near
    if offer_demo:
        names[DEMO] = DEMO
    return [names[name] for name in difflib.get_close_matches(_comparable(path.name), list(names), n=3, cutoff=0.6)]


def _comparable(name: str) -> str:
    return name.lower().removesuffix(".gguf")
