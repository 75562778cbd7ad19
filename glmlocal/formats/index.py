"""One index over a checkpoint's tensors, whatever files they are in, and the function that opens a checkpoint.

Nothing but headers is read when a checkpoint is opened: a tensor's bytes come from a read-only memory map of its file
when they are asked for. Names are those of the Hugging Face release (``model.layers.3.mlp.experts.7.up_proj.weight``)
for safetensors and GGUF alike; the routed experts are one tensor per expert in both.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from glmlocal.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glmlocal.formats.expert_pack import ExpertPack
    from glmlocal.formats.stored_matrix import StoredMatrix

MAX_JSON_BYTES = 100_000_000  # config and index files; the limit safetensors itself puts on a header
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PICKLE_REFUSAL = "a pickle can run any code when it is loaded, so it is refused; use a release in safetensors or GGUF"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor's bytes are and what they mean."""

    name: str  # Hugging Face name
    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int
    shape: tuple[int, ...]  # torch order: [out_features, in_features]
    dtype: str  # safetensors' name ("BF16", "F8_E4M3"), GGUF's type name ("Q4_K"), of a pack ("pack.int4"), of a scheme
    matrix: StoredMatrix | None = None  # what several stored tensors make: file and offset are then those of its codes

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors in the files: those of a matrix that several make, else this one."""
        return (self,) if self.matrix is None else self.matrix.parts

    def moved(self, files: Mapping[Path, Path]) -> TensorRef:
        """The same where its files are elsewhere."""
        matrix = None if self.matrix is None else self.matrix.moved(files)
        return replace(self, file=files[self.file], matrix=matrix)

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorIndex(Mapping[str, TensorRef]):
    """Tensor name → TensorRef, and the bytes behind them. Opens a file when one of its tensors is first read."""

    def __init__(
        self,
        kind: Literal["safetensors", "gguf"],
        source: Path,
        refs: Mapping[str, TensorRef],
        files: tuple[Path, ...],
        experts: ExpertPack | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> None:
        self.kind: Literal["safetensors", "gguf"] = kind
        self.source = source  # the directory, or the (first) GGUF file
        self.files = files  # every file that belongs to the checkpoint, in order
        self.experts = experts  # of a packed model, whose routed experts are in records instead of tensors
        self.unreadable: Mapping[str, str] = unreadable or {}  # quantized matrices that no reader takes: why
        self._refs = refs
        self._stored = {part.name: part for ref in refs.values() if ref.matrix is not None for part in ref.stored}
        self._maps: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}  # descriptors
        self._lock = threading.Lock()
        weakref.finalize(self, _close_files, self._files)
        self._closed = False

    def __getitem__(self, name: str) -> TensorRef:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __enter__(self) -> TensorIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without headers and padding."""
        return sum(ref.nbytes for ref in self._refs.values())

    def read(self, name: str) -> NDArray[np.uint8]:
        """A stored tensor's bytes as a read-only uint8 view [nbytes] of the file: no copy, paged in as it is touched.

        The view may start at any byte: copy before viewing it as a wider dtype where alignment matters (torch).
        """
        import numpy as np  # here and below: planning opens checkpoints and reads no bytes, so it need not wait for it

        ref = self._stored.get(name) or self._refs.get(name)
        if ref is None:
            raise CheckpointError(f"{self.source} has no tensor {quoted(name)}")
        return np.frombuffer(self._map(ref), np.uint8, ref.nbytes, ref.offset)

    def read_ahead(self, name: str) -> None:
        """Ask the system to have the tensor's bytes in its cache soon: rows of it will be read one by one."""
        if hasattr(os, "posix_fadvise"):
            for ref in self._refs[name].stored:
                with contextlib.suppress(OSError):  # advice only
                    os.posix_fadvise(self._open(ref), ref.offset, ref.nbytes, os.POSIX_FADV_WILLNEED)

    def copy(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """A stored tensor's bytes begin … end - 1 (None: to the last) as an array of their own, not mapped.

        For what is used once: mapped pages would count as memory of this process. Safe to use from several threads.
        """
        import numpy as np

        ref = self._stored.get(name) or self._refs[name]
        out = np.empty((ref.nbytes if end is None else end) - begin, np.uint8)
        position, rest = ref.offset + begin, out.data
        file = self._open(ref)
        while rest:
            try:
                num_bytes = os.preadv(file, [rest], position)
            except OSError as error:
                raise CheckpointError(f"cannot read {ref.file}: {error}") from error
            if num_bytes == 0:
                raise CheckpointError(f"{ref.file} has become shorter since it was opened; download it again")
            position, rest = position + num_bytes, rest[num_bytes:]
        return out

    def close(self) -> None:
        """Forget the files and their maps. Views that are still held keep theirs alive until they die."""
        self._closed = True
        self._maps.clear()
        with self._lock:
            _close_files(self._files)

    def _open(self, ref: TensorRef) -> int:
        with self._lock:
            if self._closed:
                raise ValueError(f"the tensor index of {self.source} is closed")
            file = self._files.get(ref.file)
            if file is None:
                try:
                    file = self._files[ref.file] = os.open(ref.file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"cannot read {ref.file}: {error}") from error
            return file

    def _map(self, ref: TensorRef) -> mmap.mmap:
        if self._closed:
            raise ValueError(f"the tensor index of {self.source} is closed")
        mapped = self._maps.get(ref.file)
        if mapped is None:
            try:
                with open(ref.file, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is empty now
                raise CheckpointError(f"cannot read {ref.file}: {error}") from error
            self._maps[ref.file] = mapped
        if ref.offset + ref.nbytes > len(mapped):
            raise CheckpointError(f"{ref.file} has become shorter since it was opened; download it again")
        return mapped


def _close_files(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its configuration, its tensors, and where the text files are."""

    path: Path  # what was opened: the directory, or the (first) GGUF file
    directory: Path  # where tokenizer.json, chat_template.jinja and generation_config.json are looked for
    config: dict[str, Any]  # in the form of Hugging Face's config.json; not checked yet: ModelConfig.from_hf does that
    tensors: TensorIndex
    gguf_metadata: Mapping[str, Any] | None  # as stored; None for safetensors


def open_checkpoint(path: Path, pack_dir: Path | None = None) -> Checkpoint:
    """Open a directory (safetensors, or one GGUF model), a ``.gguf`` file, or any part of a split one.

    ``pack_dir`` is where the ``experts.pack`` of a packed model is instead, or a directory of the model's name with it.
    Raises CheckpointError for everything else, and for files that are damaged, incomplete or hostile.
    """
    path = Path(path)
    try:
        return _open(path, pack_dir)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def quoted(text: object, limit: int = 100) -> str:
    """A name from a file, for a message: control characters escaped, never longer than a line."""
    cut = isinstance(text, str) and len(text) > limit
    shown = repr(text[:limit] if isinstance(text, str) else text)
    return shown[: 2 * limit] + "…" if cut or len(shown) > 2 * limit else shown


def not_the_file_itself(start: bytes) -> str:
    """A hint, for a message, when a file's first bytes are those of what is often saved in place of a model."""
    if start.startswith(b"vers"):  # "version https://git-lfs.github.com/spec/v1"
        return ": it is a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return ": it looks like a web page; download it again"
    return ""


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold one object. Raises CheckpointError; OSError is the caller's."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; a file of its kind never has more than {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:200]}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value


def _open(path: Path, pack_dir: Path | None) -> Checkpoint:
    if pack_dir is not None:
        return _open_with_pack(path, pack_dir)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist{_near_miss(path)}")
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a directory")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":  # by content, not by name: files in ollama's store have no suffix
        return _open_gguf(path)
    if path.suffix == ".safetensors" or path.name.endswith((".index.json", "config.json")):
        raise CheckpointError(f"{path} is one file of a model; give the directory that holds it: {path.parent}")
    if path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} is a PyTorch file: {_PICKLE_REFUSAL}")
    raise CheckpointError(
        f"{path} is not a GGUF file (it starts with {magic!r}, not b'GGUF'){not_the_file_itself(magic)}"
    )


def _open_directory(path: Path) -> Checkpoint:
    names = sorted(entry.name for entry in os.scandir(path))
    if "experts.pack" in names:
        return _open_packed(path, path / "experts.pack", names)
    if any(name.endswith(".safetensors") or name == "model.safetensors.index.json" for name in names):
        from glmlocal.formats import safetensors  # here, as both formats build on this module
        from glmlocal.formats.joined import joined

        config_file = path / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{path} has safetensors but no config.json; copy the release's config.json there")
        config = read_json_object(config_file)
        stored, files = safetensors.read_directory(path)
        refs, unreadable = joined(config, stored)
        return Checkpoint(path, path, config, TensorIndex("safetensors", path, refs, files, None, unreadable), None)
    if any(name.lower().endswith(".gguf") for name in names):
        from glmlocal.formats import gguf

        return _open_gguf(path / gguf.choose_file(path, names))
    pickles = [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(f"{path} has only PyTorch files ({quoted(pickles[0])}): {_PICKLE_REFUSAL}")
    found = f"only {', '.join(map(quoted, names[:5]))}{' …' if len(names) > 5 else ''}" if names else "nothing"
    raise CheckpointError(f"no model in {path}: wanted model.safetensors, its index, or a .gguf file; found {found}")


def _open_with_pack(path: Path, pack_dir: Path) -> Checkpoint:
    from glmlocal.formats import expert_pack

    names = sorted(entry.name for entry in os.scandir(path)) if path.is_dir() else []
    if not {expert_pack.DENSE_GGUF, expert_pack.DENSE_SAFETENSORS} & set(names):
        raise CheckpointError(f"{path} is no packed model, so it has no pack that could be elsewhere; pack it first")
    places = (pack_dir / expert_pack.PACK_FILE, pack_dir / path.resolve().name / expert_pack.PACK_FILE)
    pack_file = next((place for place in places if place.is_file()), None)
    if pack_file is None:
        raise CheckpointError(f"there is no pack at {places[0]} nor at {places[1]}; name the directory that has it")
    checkpoint = _open_packed(path, pack_file, names)
    pack = checkpoint.tensors.experts
    assert pack is not None
    beside = (part for ref in checkpoint.tensors.values() for part in ref.stored if part.file != pack_file)
    expert_pack.check_beside(pack, list(beside))
    return checkpoint


def _open_packed(path: Path, pack_file: Path, names: list[str]) -> Checkpoint:
    from glmlocal.formats import expert_pack, gguf, safetensors
    from glmlocal.formats.joined import joined

    dense = path / expert_pack.DENSE_GGUF
    if dense.name in names:
        pack = expert_pack.read_pack(pack_file)
        model = gguf.read_model(dense)
        refs = _with_experts(pack_file, pack.refs(), model.refs)
        return Checkpoint(
            path, path, model.config, TensorIndex("gguf", path, refs, (pack_file, dense), pack), model.metadata
        )
    dense, config_file = path / expert_pack.DENSE_SAFETENSORS, path / "config.json"
    for needed in (dense, config_file):
        if needed.name not in names:
            raise CheckpointError(f"{path} has {pack_file.name} but no {needed.name}; pack the model again")
    pack = expert_pack.read_pack(pack_file)
    config = read_json_object(config_file)
    others, unreadable = joined(config, safetensors.read_file(dense))
    refs = _with_experts(pack_file, pack.refs(), others)
    index = TensorIndex("safetensors", path, refs, (pack_file, dense), pack, unreadable)
    return Checkpoint(path, path, config, index, None)


def _with_experts(
    pack_file: Path, experts: Mapping[str, TensorRef], others: Mapping[str, TensorRef]
) -> dict[str, TensorRef]:
    twice = next((name for name in experts if name in others), None)
    if twice is not None:
        raise CheckpointError(f"{pack_file} has {quoted(twice)}, and so has the file beside it; pack the model again")
    return {**experts, **others}


def _open_gguf(path: Path) -> Checkpoint:
    from glmlocal.formats import gguf

    model = gguf.read_model(path)
    index = TensorIndex("gguf", model.files[0], model.refs, model.files)
    return Checkpoint(model.files[0], path.parent, model.config, index, model.metadata)


def _near_miss(path: Path) -> str:
    try:
        siblings = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return f": there is no directory {path.parent} either"
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
