"""GGUF's types whose blocks name patterns of a fixed list ("grid"): IQ1, IQ2 and IQ3, taken apart. Numpy only.

A pattern is the magnitudes of 4 or 8 neighbouring weights, of which there are 3 or 8, and beside it are their signs; of
IQ1 it is -1, 0 or 1 per weight, and a bit beside it moves them up or down by an eighth. Either way a weight is one of
at most 16 whole numbers times a scale: a code of four bits, its upper bit the sign or the move, and a codebook, which
is what ``schemes`` has. The lists come with the gguf package. Sources: ggml-common.h, gguf/quants.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from glmlocal.formats.ggml_parts import Bytes, Parts, half, spread

_UPPER = np.uint8(3)  # bits below the sign or the move in a code
_FOUR, _EIGHT = np.float32(4), np.float32(8)
# Seven signs are stored; the eighth makes the number of minuses even.
_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)


@cache
def _grid(name: str) -> NDArray[np.uint8]:
    """The patterns of a type, [patterns, weights]: places in its list of magnitudes, smallest first."""
    kind = getattr(quants, name)
    kind.init_grid()
    found: NDArray[np.intp] = np.searchsorted(np.array(kind.grid_map), kind.grid.reshape(kind.grid_shape))
    return found.astype(np.uint8)


def _signed(patterns: Bytes, signs: Bytes) -> Bytes:
    """Patterns [blocks, …, weights], and a byte of signs per eight weights → codes [blocks, weights of a block]."""
    return patterns.reshape(len(patterns), -1) | np.unpackbits(signs, axis=1, bitorder="little") << _UPPER


def _words(field: Bytes, dtype: str) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(field).view(dtype)


def _odd(scales: NDArray[np.unsignedinteger]) -> NDArray[np.int8]:
    """What is stored halved, rounded down."""
    return (2 * scales + 1).astype(np.int8)


def _signs_and_scales(words: NDArray[np.unsignedinteger]) -> tuple[Bytes, NDArray[np.int8]]:
    """Words of four times seven signs and a scale, [blocks, 8] → signs [blocks, 32], scales [blocks, 8]."""
    signs = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    return _SIGNS[signs].reshape(len(words), -1), _odd(words >> np.uint32(28))


def _iq2_xxs(b: Bytes) -> Parts:
    fields = b[:, 2:].reshape(-1, 8, 8)  # of 32 weights: four patterns, four bytes of signs and scale
    signs, scales = _signs_and_scales(_words(fields[:, :, 4:], "<u4").reshape(-1, 8))
    return Parts(_signed(_grid("IQ2_XXS")[fields[:, :, :4]], signs), half(b[:, :2]) / _EIGHT, scales)


def _iq2_xs(b: Bytes) -> Parts:
    words = _words(b[:, 2:66], "<u2")
    codes = _signed(_grid("IQ2_XS")[words & np.uint16(511)], _SIGNS[words >> np.uint16(9)])
    return Parts(codes, half(b[:, :2]) / _EIGHT, _odd(spread(b[:, 66:], 1, 4)))


def _iq2_s(b: Bytes) -> Parts:
    patterns = b[:, 2:34] | spread(b[:, 66:74], 1, 2).astype(np.uint16) << np.uint16(8)
    codes = _signed(_grid("IQ2_S")[patterns], b[:, 34:66])
    return Parts(codes, half(b[:, :2]) / _EIGHT, _odd(spread(b[:, 74:], 1, 4)))


def _iq3_xxs(b: Bytes) -> Parts:
    signs, scales = _signs_and_scales(_words(b[:, 66:], "<u4"))
    return Parts(_signed(_grid("IQ3_XXS")[b[:, 2:66]], signs), half(b[:, :2]) / _FOUR, scales)


def _iq3_s(b: Bytes) -> Parts:
    patterns = b[:, 2:66] | spread(b[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    codes = _signed(_grid("IQ3_S")[patterns], b[:, 74:106])
    return Parts(codes, half(b[:, :2]), _odd(spread(b[:, 106:], 1, 4)))


def _moved(patterns: NDArray[np.uint16], down: NDArray[np.unsignedinteger]) -> Bytes:
    """Numbers of patterns [blocks, 32], and whether each is moved down → codes [blocks, 256]."""
    codes = _grid("IQ1_S")[patterns] | down.astype(np.uint8)[:, :, None] << _UPPER
    return codes.reshape(len(codes), -1)


def _iq1_s(b: Bytes) -> Parts:
    words = _words(b[:, 34:], "<u2")  # of 32 weights: four times three bits of patterns, a scale, whether moved down
    high = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(len(b), -1)
    codes = _moved(b[:, 2:34] | high << np.uint16(8), np.repeat(words >> np.uint16(15), 4, axis=1))
    return Parts(codes, half(b[:, :2]) / _EIGHT, _odd(words >> np.uint16(12) & np.uint16(7)))


def _iq1_m(b: Bytes) -> Parts:
    nibbles, words = spread(b[:, 32:48], 1, 4), _words(b[:, 48:], "<u2")
    codes = _moved(b[:, :32] | (nibbles & np.uint8(7)).astype(np.uint16) << np.uint16(8), nibbles >> np.uint8(3))
    top = words >> np.uint16(12)  # a quarter of the fp16 scale each
    scale = top[:, 0] | top[:, 1] << np.uint16(4) | top[:, 2] << np.uint16(8) | top[:, 3] << np.uint16(12)
    scales = words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
    return Parts(codes, half(scale.view(np.uint8).reshape(-1, 2)) / _EIGHT, _odd(scales.reshape(len(b), -1)))


TAKE_APART = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
