"""Which files of a repository make one model: pure, and the place where hostile names are refused.

Taken are the weights of one format (safetensors with their index, or the GGUF files of one quantization) and, for
safetensors, configuration, tokenizer and template. Never pickles and never code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from glmlocal.errors import ConfigError, DownloadError
from glmlocal.formats.gguf_names import COMPANIONS, SPLIT_NAME
from glmlocal.formats.index import quoted
from glmlocal.formats.safetensors import INDEX_FILE, SINGLE_FILE
from glmlocal.hub.listing import HubFile
from glmlocal.units import format_bytes

# What loading and chatting read, of all that a release has beside its weights.
TEXT_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)
_QUANT = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP\d\w*|BF16|FP?16|FP?32)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_MAX_PATH_BYTES, _MAX_PART_BYTES = 1024, 240  # what filesystems take; nobody's model needs more


@dataclass(frozen=True, slots=True)
class Selection:
    """What to fetch, and what it is."""

    format: Literal["safetensors", "gguf"]
    quant: str | None  # of a GGUF model, as the repository writes it
    files: tuple[HubFile, ...]  # in order of path
    first: str  # what is opened: "" for a directory, else the path of the (first) GGUF file

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def select(files: Sequence[HubFile], repo_id: str, quant: str | None = None, shards: Iterable[str] = ()) -> Selection:
    """The files of one model. ``shards`` are those that the safetensors index names, once it has been read.

    Raises ConfigError when ``quant`` is not there or is needed, DownloadError for a repository without a model that can
    be run, or with names that are not safe.
    """
    for file in files:
        check_path(file.path, repo_id)
    if len({file.path for file in files}) != len(files):
        raise DownloadError(f"{repo_id} lists a file twice; nothing is fetched: try again later or another hub (--hub)")
    at_top = {file.path: file for file in files if "/" not in file.path}
    has_safetensors = INDEX_FILE in at_top or SINGLE_FILE in at_top
    models = gguf_models(files)
    if quant is None and has_safetensors:
        chosen, first, found = _safetensors(at_top, repo_id, shards), "", None
    elif models:
        found = _choose_quant(models, repo_id, quant)
        chosen = models[found]
        first = chosen[0].path
    elif quant is not None:
        raise ConfigError(f"{repo_id} has no GGUF files, so no {quant!r}; leave out :{quant}")
    else:
        raise DownloadError(_nothing(files, repo_id))
    _check_clashes(chosen, repo_id)
    label = None if found is None else quant_label(found)
    return Selection("gguf" if first else "safetensors", label, tuple(sorted(chosen, key=lambda f: f.path)), first)


def check_path(path: str, repo_id: str) -> None:
    """Raise DownloadError unless ``path`` stays inside a directory that it is joined to, and is fit for a terminal."""
    parts = path.split("/")
    bad = (
        _CONTROL.search(path)
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > _MAX_PART_BYTES for part in parts)
        or len(path.encode("utf-8", "replace")) > _MAX_PATH_BYTES
        or not path.isprintable()  # lone surrogates and direction marks, among others
    )
    if bad:
        raise DownloadError(f"{repo_id} has a file called {quoted(path)}, which is not a safe name; nothing is fetched")


def gguf_models(files: Iterable[HubFile]) -> dict[str, list[HubFile]]:
    """Every whole GGUF model, by its path without part number and suffix; the parts in order."""
    models: dict[str, list[HubFile]] = {}
    for file in sorted(files, key=lambda f: f.path):
        name = file.path.rpartition("/")[2]
        if name.lower().endswith(".gguf") and not name.lower().startswith(COMPANIONS):
            split = SPLIT_NAME.fullmatch(name)
            stem = split["stem"] if split else name[: -len(".gguf")]
            models.setdefault(file.path[: -len(name)] + stem, []).append(file)
    return {stem: parts for stem, parts in models.items() if _is_whole(parts)}


def quant_label(stem: str) -> str:
    """``UD-Q4_K_XL/GLM-4.5-Air-UD-Q4_K_XL`` → ``UD-Q4_K_XL``: what a person writes after the colon."""
    directory, _, name = stem.rpartition("/")
    for start in (0, *(match.end() for match in re.finditer(r"[-.]", name))):
        if _QUANT.fullmatch(name[start:]):
            return name[start:]
    return directory.rpartition("/")[2] or name


def _is_whole(parts: list[HubFile]) -> bool:
    split = SPLIT_NAME.fullmatch(parts[0].path.rpartition("/")[2])
    if split is None:
        return len(parts) == 1
    numbers = [int(match["no"]) for part in parts if (match := SPLIT_NAME.fullmatch(part.path.rpartition("/")[2]))]
    return numbers == list(range(1, int(split["count"]) + 1))


def _choose_quant(models: dict[str, list[HubFile]], repo_id: str, quant: str | None) -> str:
    if quant is None and len(models) == 1:
        return next(iter(models))
    by_label: dict[str, list[str]] = {}
    for stem in models:
        by_label.setdefault(quant_label(stem).lower(), []).append(stem)
    offered = ", ".join(
        f"{quant_label(stem)} ({format_bytes(sum(part.size_bytes for part in parts))})"
        for stem, parts in sorted(models.items(), key=lambda item: sum(part.size_bytes for part in item[1]))
    )
    if quant is None:
        raise ConfigError(f"{repo_id} has several models; write {repo_id}:QUANT with one of {offered}")
    wanted = quant.lower()
    stems = by_label.get(wanted) or by_label.get(f"ud-{wanted}") or []  # unsloth's dynamic quants are also called so
    if not stems:
        near = difflib.get_close_matches(wanted, list(by_label), n=1)
        question = f"did you mean {quant_label(by_label[near[0]][0])}? " if near else ""
        raise ConfigError(f"{repo_id} has no {quant!r}; {question}it has {offered}")
    if len(stems) > 1:
        raise ConfigError(f"{repo_id} has {len(stems)} models called {quant!r} ({', '.join(map(quoted, stems))})")
    return stems[0]


def _safetensors(at_top: dict[str, HubFile], repo_id: str, shards: Iterable[str]) -> list[HubFile]:
    if "config.json" not in at_top:
        raise DownloadError(f"{repo_id} has safetensors but no config.json; it is not a whole model")
    shards = set(shards)
    if SINGLE_FILE not in at_top and not shards:
        raise DownloadError(f"{repo_id} has an index of safetensors that names no file; tell its owners")
    names = {SINGLE_FILE} if SINGLE_FILE in at_top else {INDEX_FILE, *shards}
    absent = sorted(names - at_top.keys())
    if absent:
        raise DownloadError(f"{repo_id} lacks {quoted(absent[0])}, which its index names; it is not a whole model")
    return [file for name, file in at_top.items() if name in names or name in TEXT_FILES]


def _check_clashes(files: Iterable[HubFile], repo_id: str) -> None:
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(file.path.casefold(), file.path)
        if other != file.path:
            raise DownloadError(
                f"{repo_id} has both {quoted(other)} and {quoted(file.path)}, which not every disk can tell apart"
            )


def _nothing(files: Sequence[HubFile], repo_id: str) -> str:
    pickles = [file.path for file in files if file.path.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{repo_id} has only PyTorch files ({quoted(pickles[0])}), which can run code when loaded and are refused; "
            "use a release in safetensors or GGUF"
        )
    return f"{repo_id} has neither safetensors nor whole GGUF models among its {len(files)} files"
