"""How random weights become bytes: one codec per storage type, each working on whole rows.

A codec makes random rows directly as bytes (random codes and scales of the right size), which is far faster than
quantizing floats, and encodes given floats where the values matter (norms, routers). Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
BLOCK = 32  # weights that share a scale in Q4_0 and Q8_0
SCALE_SPREAD = (0.6, 1.4)  # scales differ, so that one read from the wrong place shows
E4M3_CODE_STD = 96.0  # of the FP8 codes as numbers: 448 (their largest) is then 4.7 standard deviations


class Codec(Protocol):
    """One way of storing a matrix. ``rows`` are uint8 [rows, row_bytes] throughout."""

    @property
    def name(self) -> str:
        """The safetensors dtype or the GGUF type."""

    def row_bytes(self, columns: int) -> int: ...

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        """Rows of mean 0 and the given standard deviations [rows]."""


class FloatCodec(Codec, Protocol):
    """A codec for weights whose values matter."""

    def encode(self, values: Floats) -> Bytes: ...


class TableCodec(Codec, Protocol):
    """A codec for embeddings, whose rows are read back."""

    def decode(self, rows: Bytes) -> Floats: ...

    def halve(self, rows: Bytes, times: int) -> Bytes:
        """The rows times 2**-times, exactly."""

    def mark(self, rows: Bytes, marked: NDArray[np.bool_]) -> None:
        """Set column 0 in place: about one to two standard deviations in marked rows, exactly zero in the others."""


@dataclass(frozen=True, slots=True)
class F32:
    name: str = "F32"

    def row_bytes(self, columns: int) -> int:
        return 4 * columns

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        return self.encode(rng.standard_normal((len(std), columns), np.float32) * std[:, None])

    def encode(self, values: Floats) -> Bytes:
        return np.ascontiguousarray(values, np.dtype("<f4")).view(np.uint8)


@dataclass(frozen=True, slots=True)
class BF16:
    name: str = "BF16"

    def row_bytes(self, columns: int) -> int:
        return 2 * columns

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        codes = _random_codes(rng, len(std) * columns, np.dtype("<u2"))
        # Rows of one size, nearly always, need one table look-up per weight and no arithmetic.
        out = np.empty((len(std), columns), np.dtype("<u2"))
        for size in np.unique(std):
            table = _to_bf16(_normal_quantiles(1 << 16) * size)
            out[std == size] = table[codes.reshape(out.shape)[std == size]]
        return out.view(np.uint8)

    def encode(self, values: Floats) -> Bytes:
        return _to_bf16(np.ascontiguousarray(values, np.float32)).view(np.uint8)

    def decode(self, rows: Bytes) -> Floats:
        return (rows.view(np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)

    def halve(self, rows: Bytes, times: int) -> Bytes:
        return self.encode(self.decode(rows) * np.float32(2.0**-times))

    def mark(self, rows: Bytes, marked: NDArray[np.bool_]) -> None:
        rows.view(np.dtype("<u2"))[:, 0] = np.where(marked, 0x3FC0, 0)  # 0x3FC0 is 1.5


@dataclass(frozen=True, slots=True)
class Q4_0:
    """Blocks of an fp16 scale and 32 nibbles: weight j is (nibble - 8) · scale; 0 … 15 low nibbles, then high ones."""

    name: str = "Q4_0"

    def row_bytes(self, columns: int) -> int:
        return columns // BLOCK * 18

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        blocks = np.empty((len(std), columns // BLOCK, 18), np.uint8)
        blocks[..., 2:] = _random_codes(rng, blocks.shape[0] * blocks.shape[1] * 16, np.dtype("u1")).reshape(
            *blocks.shape[:2], 16
        )
        # Nibbles 0 … 15 minus 8 have mean -0.5 and rms 4.64. As in real files the scale has either sign, so that the
        # mean of the weights is zero.
        scales = _random_scales(rng, blocks.shape[:2], signed=True) * (std / np.float32(4.64))[:, None]
        blocks[..., :2] = scales.astype(np.dtype("<f2"))[..., None].view(np.uint8)
        return blocks.reshape(len(std), -1)

    def decode(self, rows: Bytes) -> Floats:
        return np.asarray(dequantize(rows, GGMLQuantizationType.Q4_0), np.float32)

    def halve(self, rows: Bytes, times: int) -> Bytes:
        return _halve_scales(rows, 18, times)

    def mark(self, rows: Bytes, marked: NDArray[np.bool_]) -> None:
        negative = rows[:, 1] >= 0x80  # the sign bit of the first block's scale
        rows[:, 2] = (rows[:, 2] & 0xF0) | np.where(marked, np.where(negative, 0, 15), 8)


@dataclass(frozen=True, slots=True)
class Q8_0:
    """Blocks of an fp16 scale and 32 signed bytes."""

    name: str = "Q8_0"

    def row_bytes(self, columns: int) -> int:
        return columns // BLOCK * 34

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        blocks = np.empty((len(std), columns // BLOCK, 34), np.uint8)
        codes = _random_codes(rng, blocks.shape[0] * blocks.shape[1] * BLOCK, np.dtype("i1"))
        # Quantizers never write -128, and kernels may rely on it.
        blocks[..., 2:] = np.maximum(codes, -127).view(np.uint8).reshape(*blocks.shape[:2], BLOCK)
        scales = _random_scales(rng, blocks.shape[:2], signed=False) * (std / np.float32(73.6))[:, None]
        blocks[..., :2] = scales.astype(np.dtype("<f2"))[..., None].view(np.uint8)
        return blocks.reshape(len(std), -1)

    def encode(self, values: Floats) -> Bytes:
        return np.asarray(quantize(values, GGMLQuantizationType.Q8_0), np.uint8)

    def decode(self, rows: Bytes) -> Floats:
        return np.asarray(dequantize(rows, GGMLQuantizationType.Q8_0), np.float32)

    def halve(self, rows: Bytes, times: int) -> Bytes:
        return _halve_scales(rows, 34, times)

    def mark(self, rows: Bytes, marked: NDArray[np.bool_]) -> None:
        rows[:, 2] = np.where(marked, 127, 0)


@dataclass(frozen=True, slots=True)
class FP8:
    """The codes of compressed-tensors' FP8 (e4m3): weight = code · ``weight_scale`` of its row, see ``fp8_scales``."""

    name: str = "F8_E4M3"

    def row_bytes(self, columns: int) -> int:
        return columns

    def random(self, rng: np.random.Generator, std: Floats, columns: int) -> Bytes:
        codes = _random_codes(rng, len(std) * columns, np.dtype("<u2"))
        data: Bytes = _e4m3_table()[codes].reshape(len(std), columns)
        return data


def _random_codes(rng: np.random.Generator, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)


def _random_scales(rng: np.random.Generator, shape: tuple[int, ...], *, signed: bool) -> Floats:
    """Factors of SCALE_SPREAD around 1 with mean square 1, half of them negative when ``signed``."""
    sizes = np.linspace(*SCALE_SPREAD, 128, dtype=np.float32)
    sizes /= np.sqrt(np.square(sizes).mean())
    table = np.concatenate([sizes, -sizes if signed else sizes])
    codes: NDArray[np.uint8] = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8)
    return table[codes].reshape(shape)


def fp8_scales(rng: np.random.Generator, std: float, rows: int) -> Floats:
    """The scale of each row, fp32 [rows], that gives FP8's random codes the wanted standard deviation."""
    return _random_scales(rng, (rows,), signed=False) * np.float32(std / E4M3_CODE_STD)


def _halve_scales(rows: Bytes, block_bytes: int, times: int) -> Bytes:
    blocks = rows.copy().reshape(len(rows), rows.shape[1] // block_bytes, block_bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.dtype("<f2"))
    blocks[..., :2] = (scales * np.float16(2.0**-times)).view(np.uint8)
    return blocks.reshape(rows.shape)


@cache
def _normal_quantiles(count: int) -> Floats:
    """``count`` equally likely values of a standard normal distribution."""
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / count) for i in range(count // 2)]
    return np.array([-x for x in reversed(upper)] + upper, np.float32)


def _to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.dtype("<u2"))


@cache
def _e4m3_values() -> Floats:
    """The numbers of codes 0 … 127; the last, NaN, is replaced by 448 so that the table is sorted."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = 448.0
    return values.astype(np.float32)


def _nearest_e4m3(values: Floats) -> Bytes:
    table = _e4m3_values()[:127]
    index = np.searchsorted((table[1:] + table[:-1]) / 2, np.minimum(np.abs(values), 448.0))
    return (index | np.where(values < 0, 0x80, 0)).astype(np.uint8)


@cache
def _e4m3_table() -> Bytes:
    return _nearest_e4m3(_normal_quantiles(1 << 16) * np.float32(E4M3_CODE_STD))
