"""The bytes of a StoredMatrix, a range of rows at a time; ``stored_matrix`` says how each layout is stored.

Nothing is computed: codes stay codes, zero points integers, scales are widened exactly. Layouts that keep the columns
of an output row apart (GPTQ, AWQ) are held as stored while their rows are read, the others are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmlocal.errors import CheckpointError
from glmlocal.formats.awq import ORDER
from glmlocal.formats.ggml_blocks import widen_dense
from glmlocal.formats.index import TensorIndex, TensorRef
from glmlocal.formats.quant import E4M3_VALUES, E8M0_HALVES, QuantizedMatrix
from glmlocal.formats.schemes import MXFP4
from glmlocal.formats.stored_matrix import StoredMatrix

Bytes = NDArray[np.uint8]
_ReadRows = Callable[[TensorRef], Bytes]  # the bytes of the rows that are wanted, [rows, bytes of a row]
_V1_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word


def unpack_bits(raw: Bytes, bits: int, columns: int) -> Bytes:
    """Rows that are streams of ``bits``-bit codes, lowest bit first, uint8 [rows, bytes] → uint8 [rows, columns]."""
    if bits == 8:
        return raw[:, :columns]
    rows, groups = raw.shape[0], -(-columns // 8)  # eight codes take ``bits`` bytes
    if raw.shape[1] < groups * bits:
        raw = np.pad(raw, ((0, 0), (0, groups * bits - raw.shape[1])))
    eights = raw[:, : groups * bits].reshape(rows, groups, bits)
    out = np.empty((rows, groups, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights[:, :, byte] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | eights[:, :, byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, np.uint8((1 << bits) - 1), out=out[:, :, i])
    return out.reshape(rows, -1)[:, :columns]


@dataclass(frozen=True, slots=True)
class _Groups:
    """What goes with the codes of some rows."""

    scales: NDArray[np.float32]  # [rows, groups]
    zeros: Bytes | None = None  # [rows, groups]
    biases: NDArray[np.float32] | None = None  # [rows, groups]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A matrix whose small tensors are read and checked, and whose codes are read when asked for."""

    tensors: TensorIndex
    matrix: StoredMatrix
    words: NDArray[np.uint32] | None  # all codes, of layouts that keep a row's apart
    groups: _Groups | None  # of all rows, where they are not read with them
    scale_of_byte: NDArray[np.float32] | None = None  # [256], of layouts whose scales are bytes

    @classmethod
    def open(cls, tensors: TensorIndex, matrix: StoredMatrix) -> StoredRows:
        """Raises CheckpointError for act-order, and for tensors that contradict each other."""
        _check_order(tensors, matrix)
        _check_shape(tensors, matrix)
        if matrix.layout in ("gptq", "gptq_v2", "awq"):
            words = _words(tensors.copy(matrix.codes.name), matrix.codes.shape)
            return cls(tensors, matrix, words, _checked(_groups_of_columns(tensors, matrix), matrix))
        if matrix.layout == "packed" and matrix.zeros is not None and matrix.zeros.dtype == "I32":
            scales = _scales(matrix, tensors.copy(matrix.scales.name), matrix.shape[0])
            zeros = _zeros_along_rows(tensors, matrix, matrix.zeros)
            return cls(tensors, matrix, None, _checked(_Groups(scales, zeros), matrix))
        return cls(tensors, matrix, None, None, _scale_of_byte(tensors, matrix) if matrix.is_fp4 else None)

    def rows(self, begin: int, end: int) -> QuantizedMatrix:
        """Rows begin … end - 1. Raises CheckpointError for scales that are not finite."""

        def read(ref: TensorRef) -> Bytes:
            row_bytes = ref.nbytes // ref.shape[0]
            return self.tensors.copy(ref.name, begin * row_bytes, end * row_bytes).reshape(end - begin, row_bytes)

        codes = self._codes(read) if self.words is None else self._codes_of_columns(begin, end)
        if self.groups is None:
            return self._quantized(codes, self._groups_of_rows(read, end - begin))
        rows = slice(begin, end)
        zeros, biases = self.groups.zeros, self.groups.biases
        part = _Groups(self.groups.scales[rows], None if zeros is None else zeros[rows], biases)
        return self._quantized(codes, part)

    def take(self, rows: NDArray[np.int64]) -> QuantizedMatrix:
        """Single rows, of matrices whose ``has_rows`` is true."""

        def read(ref: TensorRef) -> Bytes:
            return self.tensors.read(ref.name).reshape(ref.shape[0], -1)[rows]

        if self.groups is None:
            return self._quantized(self._codes(read), self._groups_of_rows(read, len(rows)))
        zeros = self.groups.zeros
        part = _Groups(self.groups.scales[rows], None if zeros is None else zeros[rows])
        return self._quantized(self._codes(read), part)

    def _quantized(self, codes: Bytes, groups: _Groups) -> QuantizedMatrix:
        return QuantizedMatrix(self.matrix.scheme, codes, groups.scales, super_min=groups.biases, sub_min=groups.zeros)

    def _codes(self, read: _ReadRows) -> Bytes:
        raw = read(self.matrix.codes)
        if self.matrix.layout == "int8":
            return raw ^ np.uint8(0x80)  # -128 … 127 → 0 … 255
        return unpack_bits(raw, self.matrix.scheme.bits, self.matrix.shape[1])

    def _codes_of_columns(self, begin: int, end: int) -> Bytes:
        assert self.words is not None
        if self.matrix.layout == "awq":
            first = begin // 8
            return _awq_codes(self.words[:, first : -(-end // 8)]).T[begin - 8 * first : end - 8 * first].copy()
        words = np.ascontiguousarray(self.words[:, begin:end].T)
        return unpack_bits(words.view(np.uint8), self.matrix.scheme.bits, self.matrix.shape[1])

    def _groups_of_rows(self, read: _ReadRows, rows: int) -> _Groups:
        matrix = self.matrix
        if self.scale_of_byte is not None:
            return _checked(_Groups(self.scale_of_byte[read(matrix.scales)]), matrix)
        if matrix.scales.shape[:1] != matrix.shape[:1]:  # one for all
            scales = _scales(matrix, self.tensors.copy(matrix.scales.name), rows)
        else:
            scales = _scales(matrix, read(matrix.scales), rows)
        zeros, biases = None, None
        if matrix.layout == "mlx":
            assert matrix.zeros is not None
            raw = read(matrix.zeros)
            biases = widen_dense(matrix.zeros.dtype, raw.reshape(-1), (len(raw), matrix.zeros.shape[1]))
        elif matrix.layout == "awq_gemv":
            assert matrix.zeros is not None
            zeros = unpack_bits(read(matrix.zeros), matrix.scheme.bits, scales.shape[1])
        elif matrix.zeros is not None:  # int8
            zeros = read(matrix.zeros) ^ np.uint8(0x80)
            if matrix.layout == "packed":
                zeros = zeros - np.uint8(128 - (1 << (matrix.scheme.bits - 1)))
        return _checked(_Groups(scales, zeros, biases), matrix)


def _scales(matrix: StoredMatrix, raw: Bytes, rows: int) -> NDArray[np.float32]:
    """Scales of rows, or one for all of them, as fp32 [rows, groups]."""
    groups = -(-matrix.shape[1] // matrix.scheme.group_size)
    values = widen_dense(matrix.scales.dtype, raw.reshape(-1), (raw.nbytes // _FLOAT_BYTES[matrix.scales.dtype],))
    if values.size == 1:
        return np.full((rows, 1), values[0])
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :groups])


_FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


def _scale_of_byte(tensors: TensorIndex, matrix: StoredMatrix) -> NDArray[np.float32]:
    """What scales of 4-bit floats mean, halved since the codebook is doubled, the matrix's own scale included."""
    if matrix.scheme == MXFP4:
        return np.where(np.arange(256) == 0xFF, np.float32(np.nan), E8M0_HALVES)
    scales, ref = E4M3_VALUES, matrix.global_scale
    if ref is not None:
        (factor,) = widen_dense(ref.dtype, tensors.copy(ref.name), (1,))
        if not (np.isfinite(factor) and factor > 0):
            raise CheckpointError(
                f"tensor {ref.name} is {factor}; a number above 0 was expected: the file is damaged, download it again"
            )
        scales = scales / factor if matrix.layout == "fp4_divided" else scales * factor
    return scales * np.float32(0.5)


def _words(raw: Bytes, shape: tuple[int, ...]) -> NDArray[np.uint32]:
    return raw.view("<u4").reshape(shape)


def _awq_codes(words: NDArray[np.uint32]) -> Bytes:
    """[n, words] → [n, 8 · words]."""
    out = np.empty((*words.shape, 8), np.uint8)
    for nibble, column in enumerate(ORDER):
        out[:, :, column] = words >> np.uint32(4 * nibble) & np.uint32(15)
    return out.reshape(len(words), -1)


def _groups_of_columns(tensors: TensorIndex, matrix: StoredMatrix) -> _Groups:
    """Of GPTQ and AWQ: stored [groups, ·]."""
    assert matrix.zeros is not None
    scales = widen_dense(matrix.scales.dtype, tensors.copy(matrix.scales.name), matrix.scales.shape).T
    words, bits = _words(tensors.copy(matrix.zeros.name), matrix.zeros.shape), matrix.scheme.bits
    if matrix.layout == "awq":
        return _Groups(np.ascontiguousarray(scales), np.ascontiguousarray(_awq_codes(words).T))
    ones = _V1_ONES.get(bits) if matrix.layout == "gptq" else None
    if ones is not None:
        words = words + np.uint32(ones)  # the words as wholes, as those who store them subtract
    zeros = unpack_bits(np.ascontiguousarray(words).view(np.uint8), bits, matrix.shape[0])
    if matrix.layout == "gptq" and ones is None:
        zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
    if matrix.scheme.offset_codec == "zero_point":
        return _Groups(np.ascontiguousarray(scales), np.ascontiguousarray(zeros.T))
    middle = matrix.scheme.zero_point
    if not (zeros == middle).all():
        raise CheckpointError(
            f"tensor {matrix.zeros.name} has the zero point {int(zeros[zeros != middle].flat[0])} where the config's "
            f"sym means {middle}; its checkpoint_format or sym is wrong, or the file is damaged"
        )
    return _Groups(np.ascontiguousarray(scales))


def _zeros_along_rows(tensors: TensorIndex, matrix: StoredMatrix, ref: TensorRef) -> Bytes:
    """Zero points of compressed-tensors, packed along the output: [rows, groups]."""
    words = np.ascontiguousarray(_words(tensors.copy(ref.name), ref.shape).T)
    return np.ascontiguousarray(unpack_bits(words.view(np.uint8), matrix.scheme.bits, matrix.shape[0]).T)


def _checked(groups: _Groups, matrix: StoredMatrix) -> _Groups:
    for name, values in (("scale", groups.scales), ("bias", groups.biases)):
        if values is not None and not np.isfinite(values).all():
            raise CheckpointError(
                f"tensor {matrix.scales.name} or what is beside it has a {name} that is not finite; the file is "
                "damaged, download it again"
            )
    return groups


def _check_order(tensors: TensorIndex, matrix: StoredMatrix) -> None:
    """Columns must be in the order of their groups: the kernels have one scale for neighbours."""
    ref = matrix.g_idx
    if ref is None:
        return
    found = tensors.copy(ref.name).view("<i4" if ref.dtype == "I32" else "<i8")
    if not np.array_equal(found, np.arange(len(found)) // matrix.scheme.group_size):
        raise CheckpointError(
            f"tensor {ref.name} gives neighbouring columns scales of different groups (act-order, desc_act), which the "
            "kernels cannot run without rounding again; take a release that was quantized without desc_act"
        )


def _check_shape(tensors: TensorIndex, matrix: StoredMatrix) -> None:
    ref = matrix.weight_shape
    if ref is None:
        return
    found = tuple(int(size) for size in tensors.copy(ref.name).view("<i4" if ref.dtype == "I32" else "<i8"))
    if found != matrix.shape:
        raise CheckpointError(
            f"tensor {ref.name} says {list(found)}, the others make {list(matrix.shape)}; the file is damaged, "
            "download it again"
        )
