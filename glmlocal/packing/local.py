"""A checkpoint on this disk → a pack beside it or elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from glmlocal.errors import ConfigError, DownloadError
from glmlocal.formats.expert_pack import PACK_FILE
from glmlocal.formats.index import Checkpoint, TensorIndex
from glmlocal.hub.select import TEXT_FILES
from glmlocal.models.weights import Quant
from glmlocal.packing.dense import DenseFile, gguf_file, safetensors_file
from glmlocal.packing.job import PackJob
from glmlocal.packing.make import Maker, OnBytes
from glmlocal.units import MIB, format_bytes

_SPARE_BYTES = 64 * MIB  # for text files, directories and the journal


def pack_model(
    checkpoint: Checkpoint, job: PackJob, quant: Quant, target: Path, *, threads: int, on_bytes: OnBytes
) -> None:
    """Make the pack at ``target``, going on from an earlier attempt of the same. Raises whatever ``Maker`` does,
    ConfigError where the target exists, and DownloadError where it cannot be stored."""
    check_target(target)
    dense = dense_file(job, checkpoint)
    identity = identity_of(job, dense, _files_identity(checkpoint.tensors))
    with storing(target), Maker(job, dense, target, identity, threads=threads, on_bytes=on_bytes) as maker:
        check_space(maker, target)
        maker.make(maker.missing(), checkpoint.tensors, quant)
        copy_text_files(checkpoint.directory, maker.directory, job)
        maker.finish()


def check_target(target: Path) -> None:
    if os.path.lexists(target):
        is_pack = (target / PACK_FILE).is_file()
        what = "is a packed model already" if is_pack else "exists and is no packed model"
        raise ConfigError(f"{target} {what}; remove it, or give another --out")


def dense_file(job: PackJob, checkpoint: Checkpoint) -> DenseFile:
    """Of the dense tensors; of a GGUF model with its metadata."""
    if checkpoint.gguf_metadata is None:
        return safetensors_file(job.dense)
    return gguf_file(job.dense, checkpoint.tensors.files[0], checkpoint.gguf_metadata.get("general.alignment"))


def identity_of(job: PackJob, dense: DenseFile, source: str) -> str:
    """Equal for attempts that can go on from one another: the same bytes of the same source come out the same way."""
    digest = xxhash.xxh3_128()
    for part in (job.header.to_json(), dense.header, source.encode("utf-8", "surrogateescape")):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def check_space(maker: Maker, target: Path) -> None:
    """Raise DownloadError unless what is still to be written has room."""
    needed = maker.missing_bytes() + _SPARE_BYTES
    system = os.statvfs(target.parent)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise DownloadError(
            f"the disk of {target.parent} is too small: {format_bytes(needed)} are to be written, {format_bytes(free)} "
            f"are free; free {format_bytes(needed - free)}, or give --out on another disk"
        )


def copy_text_files(source: Path, directory: Path, job: PackJob) -> None:
    """Configuration, tokenizer and template, as they are; a GGUF file has its own."""
    for name in sorted(TEXT_FILES) if job.kind == "safetensors" else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """OSError of the disk → one clear line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or target, error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk of {target.parent} is full; free some space and run the same command again: it goes on "
                "where it stopped"
            ) from error
        raise DownloadError(f"cannot write the pack ({reason}: {where}); give --out in a directory of yours") from error


def _files_identity(tensors: TensorIndex) -> str:
    """Of the source's files, by what changes when they do."""
    states = ((file.name, file.stat()) for file in tensors.files)
    return "\n".join(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in states)
