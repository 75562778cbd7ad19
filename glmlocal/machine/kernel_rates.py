"""KernelRates: how fast this machine's kernels are, as ``glmlocal doctor`` measured them. Torch-free values and JSON.

A product is a matrix and some rows of activations. What is kept of one is how many of a matrix's weights are done with
per second when so many rows meet them: at one row that is memory bandwidth, at hundreds it is arithmetic, and between
the two it is what the kernels make of both. A forecast asks for the rows it needs and gets the rate between two that
were measured.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_MOST_ROWS = 1 << 20
_MOST_ENTRIES = 64


@dataclass(frozen=True, slots=True)
class ProductRate:
    """Weights per second by rows of activations. Raises ValueError unless rows rise from 1 and all rates are positive.

    More rows never get done with more weights per second, nor fewer multiply-adds: where a measurement says otherwise
    it was disturbed, and is moved to the nearest that does not.
    """

    rows: tuple[int, ...]
    weights_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) != len(self.weights_per_s) or not self.rows or self.rows[0] != 1 or not rises:
            raise ValueError(f"rows {self.rows} do not rise from 1, or have not one rate each")
        if not all(math.isfinite(rate) and rate > 0 for rate in self.weights_per_s):
            raise ValueError("a rate is not positive")
        smooth = [self.weights_per_s[0]]
        for before, now, rate in zip(self.rows, self.rows[1:], self.weights_per_s[1:], strict=False):
            smooth.append(min(max(rate, smooth[-1] * before / now), smooth[-1]))
        object.__setattr__(self, "weights_per_s", tuple(smooth))

    def at(self, rows: float) -> float:
        """Weights per second at so many rows: between two measurements on the straight line of the logarithms."""
        if rows <= 1:
            return self.weights_per_s[0]
        if rows >= self.rows[-1]:
            return self.weights_per_s[-1] * self.rows[-1] / rows
        right = bisect_left(self.rows, rows)
        x0, x1 = math.log(self.rows[right - 1]), math.log(self.rows[right])
        y0, y1 = math.log(self.weights_per_s[right - 1]), math.log(self.weights_per_s[right])
        return math.exp(y0 + (y1 - y0) * (math.log(rows) - x0) / (x1 - x0))

    def is_memory_bound(self, rows: float) -> bool:
        """Do so many rows take nearly as long as one, so that reading the weights is what takes the time?"""
        return self.at(rows) > self.weights_per_s[0] / 1.5


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """What a query takes for each position: ``number_s`` for every number of its keys and values (2 · kv heads ·
    head_dim of them, read once for all query heads that share them) and ``operation_s`` for every operation with them
    (4 · heads · head_dim). How many query heads share a key decides which of the two counts.

    Raises ValueError unless both are finite and not negative, and one is positive.
    """

    number_s: float
    operation_s: float

    def __post_init__(self) -> None:
        both = (self.number_s, self.operation_s)
        if not all(math.isfinite(each) and each >= 0 for each in both) or not any(both):
            raise ValueError(f"{both} are no seconds of attention")

    @classmethod
    def of_two(cls, one: tuple[float, float, float], two: tuple[float, float, float]) -> AttentionCost:
        """From two shapes' (numbers, operations, seconds) per position: through both where that makes neither cost
        negative, else the larger of the two that one cost alone would have to be."""
        (n1, o1, s1), (n2, o2, s2) = one, two
        determinant = n1 * o2 - n2 * o1
        number_s, operation_s = (s1 * o2 - s2 * o1) / determinant, (n1 * s2 - n2 * s1) / determinant
        if number_s < 0:
            return cls(0.0, max(s1 / o1, s2 / o2))
        if operation_s < 0:
            return cls(max(s1 / n1, s2 / n2), 0.0)
        return cls(number_s, operation_s)

    def seconds(self, numbers: float, operations: float) -> float:
        return numbers * self.number_s + operations * self.operation_s


@dataclass(frozen=True, slots=True)
class KernelRates:
    """Of one instruction set and number of threads; ``kernels_id`` tells which build of the kernels it was."""

    kernels_id: str
    products: Mapping[str, ProductRate]  # by "SCHEME ACTIVATIONS": "Q4_0 int8", "Q4_0 fp32", "bf16 fp32"
    attention_decode: Mapping[str, AttentionCost]  # by KV dtype: of one query over a long context
    attention_prefill: Mapping[str, AttentionCost]  # of a query in a chunk of a prompt
    layer_s: Mapping[str, float]  # by activations: a decoder layer, beside what products take as above, and attention
    token_s: float  # of a step, outside the layers and the head
    # By activations: of a layer, for each number of each hidden state of a chunk, beside products and attention.
    row_s: Mapping[str, float] = field(default_factory=lambda: {"int8": 0.0, "fp32": 0.0})

    spread: float = 0.0  # how far passes lay apart: of every figure, the median from the pass that came nearest to it

    def product(self, scheme: str, activations: str) -> ProductRate | None:
        """None where nothing like it was measured; floats meet fp32 whatever is asked."""
        wanted = f"{scheme} {activations}"
        return self.products.get(wanted) or self.products.get(f"{scheme} fp32")


def build_id() -> str:
    """Which kernels are installed: 16 hex digits of the extension's bytes, or "none". Imports nothing."""
    for file in sorted((Path(__file__).parents[1] / "kernels" / "cpu").glob("_cpu.*")):
        if file.suffix in (".so", ".pyd"):
            return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return "none"


def as_json(rates: KernelRates) -> dict[str, Any]:
    return {
        "kernels_id": rates.kernels_id,
        "products": {
            name: {str(rows): rate for rows, rate in zip(product.rows, product.weights_per_s, strict=True)}
            for name, product in rates.products.items()
        },
        "attention_decode": {dtype: asdict(cost) for dtype, cost in rates.attention_decode.items()},
        "attention_prefill": {dtype: asdict(cost) for dtype, cost in rates.attention_prefill.items()},
        "layer_s": dict(rates.layer_s),
        "token_s": rates.token_s,
        "row_s": dict(rates.row_s),
        "spread": rates.spread,
    }


def from_json(values: Mapping[str, Any]) -> KernelRates:
    """The inverse of ``as_json``. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    if not isinstance(values["kernels_id"], str):
        raise TypeError("kernels_id is no text")
    return KernelRates(
        values["kernels_id"],
        {_name(name): _product(rates) for name, rates in _few(values["products"]).items()},
        {_name(name): _attention(cost) for name, cost in _few(values["attention_decode"]).items()},
        {_name(name): _attention(cost) for name, cost in _few(values["attention_prefill"]).items()},
        {name: _positive(values["layer_s"][name]) for name in ("int8", "fp32")},
        _positive(values["token_s"]),
        {name: _not_negative(values["row_s"][name]) for name in ("int8", "fp32")},
        _not_negative(values.get("spread", 0.0)),
    )


def _product(values: Mapping[str, Any]) -> ProductRate:
    found = sorted((int(rows), _positive(rate)) for rows, rate in _few(values).items())
    if any(rows > _MOST_ROWS for rows, _ in found):
        raise ValueError("too many rows")
    return ProductRate(tuple(rows for rows, _ in found), tuple(rate for _, rate in found))


def _attention(values: Mapping[str, Any]) -> AttentionCost:
    return AttentionCost(_number(values["number_s"]), _number(values["operation_s"]))


def _few(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict) or not 0 < len(values) <= _MOST_ENTRIES:
        raise TypeError("not a few named rates")
    return values


def _name(value: str) -> str:
    if len(value) > 80:
        raise ValueError("a name is too long")
    return value


def _not_negative(value: object) -> float:
    if _number(value) < 0:
        raise ValueError(f"{value!r} is negative")
    return _number(value)


def _positive(value: object) -> float:
    if not _number(value) > 0:
        raise ValueError(f"{value!r} is no positive number")
    return _number(value)


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]
