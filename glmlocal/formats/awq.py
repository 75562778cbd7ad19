"""AWQ releases (AutoAWQ): which tensors make a matrix. Headers only; ``stored_rows`` reads the bytes.

    version "gemm"  X.qweight int32 [in, out / 8], X.qzeros int32 [groups, out / 8], X.scales [groups, out]: nibble i
                    of a word, from the lowest, is of the column ORDER[i] of its eight
    version "gemv"  X.qweight int32 [out, in / 8], X.qzeros int32 [out, ·], X.scales [out, ·]: in order, the last two
                    padded to a multiple of eight groups and more

weight = scale · (code − zero point), 4 bits. What ``modules_to_not_convert`` names is stored as plain X.weight, and is
known by that. Sources: AutoAWQ, modules/linear/gemm.py, gemv.py, utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.schemes import WHOLE_ROW
from glmlocal.formats.stored_matrix import FLOATS, StoredMatrix, group_size, num_groups, part, scale_type, scheme

SUFFIX = ".qweight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_PER_WORD = 32 // _BITS


def reader(settings: Mapping[str, Any]) -> Callable[[str, Mapping[str, TensorRef]], StoredMatrix]:
    """Module name, tensors → the matrix. Raises CheckpointError now for settings that cannot be read, and then."""
    version = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    size = group_size(settings.get("group_size", settings.get("q_group_size", 128)), "the AWQ config")
    by_version = {"gemm": _gemm, "gemv": _gemv}
    read = by_version.get(version.lower()) if isinstance(version, str) else None
    if read is None:
        raise CheckpointError(f"it is AWQ of version {quoted(version)}; gemm and gemv are supported")
    if bits != _BITS:
        raise CheckpointError(f"it is AWQ of {quoted(bits)} bits; {_BITS} are supported")
    return lambda module, tensors: read(module, tensors, size)


def _gemm(module: str, tensors: Mapping[str, TensorRef], size: int) -> StoredMatrix:
    codes, zeros, scales = _parts(module, tensors)
    columns, rows = codes.shape[0], codes.shape[1] * _PER_WORD
    size, groups = _clipped(size, columns)
    if scales.shape != (groups, rows) or zeros.shape != (groups, codes.shape[1]):
        raise _mismatch(codes, zeros, scales, size)
    made = scheme("awq", _BITS, size, "zero_point", scale_type(scales))
    return StoredMatrix("awq", made, (rows, columns), codes, scales, zeros)


def _gemv(module: str, tensors: Mapping[str, TensorRef], size: int) -> StoredMatrix:
    codes, zeros, scales = _parts(module, tensors)
    rows, columns = codes.shape[0], codes.shape[1] * _PER_WORD
    size, groups = _clipped(size, columns)
    padded = zeros.shape[1] * _PER_WORD
    if zeros.shape[0] != rows or scales.shape != (rows, padded) or padded < groups:
        raise _mismatch(codes, zeros, scales, size)
    made = scheme("awq", _BITS, size, "zero_point", scale_type(scales))
    return StoredMatrix("awq_gemv", made, (rows, columns), codes, scales, zeros)


def _parts(module: str, tensors: Mapping[str, TensorRef]) -> tuple[TensorRef, TensorRef, TensorRef]:
    codes, zeros = (part(tensors, f"{module}.{name}", ("I32",)) for name in ("qweight", "qzeros"))
    return codes, zeros, part(tensors, f"{module}.scales", FLOATS)


def _clipped(size: int, columns: int) -> tuple[int, int]:
    """Group size and groups; one group is one whatever its size."""
    return (WHOLE_ROW, 1) if size >= columns else (size, num_groups(columns, size))


def _mismatch(codes: TensorRef, zeros: TensorRef, scales: TensorRef, size: int) -> CheckpointError:
    return CheckpointError(
        f"tensors {codes.name} {list(codes.shape)}, {zeros.name} {list(zeros.shape)} and {scales.name} "
        f"{list(scales.shape)} do not belong together with groups of {'whole rows' if size == WHOLE_ROW else size}"
    )
