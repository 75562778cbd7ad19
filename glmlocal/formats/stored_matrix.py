"""Quantized matrices that a release stores as several tensors: which these are and what they mean. Headers only.

``gptq``, ``awq``, ``compressed_tensors``, ``mlx`` and ``fp4`` make StoredMatrix values from a config and tensors'
names, dtypes and shapes; ``stored_rows`` reads their bytes. What differs between them is the layout:

    layout       codes                                            zero points, or MLX's biases     scales
    "gptq"       int32 [in · bits / 32, out], along the input     int32 [groups, out · bits / 32]  [groups, out]
    "gptq_v2"    the same; "gptq" stores zero points minus one
    "awq"        int32 [in, out / 8], see ``awq``                 int32 [groups, out / 8]          [groups, out]
    "awq_gemv"   int32 [out, in / 8]                              int32 [out, ≥ groups / 8]        [out, ≥ groups]
    "packed"     int32 [out, in · bits / 32]                      int32 [out · bits / 32, groups]  [out, groups]
    "int8"       int8 [out, in]                                   int8 [out, groups]               [out, groups]
    "mlx"        uint32 [out, in · bits / 32]                     floats [out, groups]             [out, groups]
    "fp4"        uint8 [out, in / 2] or uint32 [out, in / 8]      none                             bytes [out, groups]
    "fp4_multiplied", "fp4_divided": the same, and one float that multiplies or divides all scales; see ``fp4``

Where nothing else is said words hold one stream of bits, lowest first, so that codes of 3, 5 and 6 bits cross words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from glmlocal.errors import CheckpointError
from glmlocal.formats.schemes import WHOLE_ROW, QuantScheme, ScaleType

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from glmlocal.formats.index import TensorRef

Layout = Literal["gptq", "gptq_v2", "awq", "awq_gemv", "packed", "int8", "mlx", "fp4", "fp4_multiplied", "fp4_divided"]
Offset = Literal["symmetric", "zero_point", "min"]

BITS = (2, 3, 4, 5, 6, 8)  # that the kernels have
SMALLEST_GROUP = 16
_SCALE_TYPES: dict[str, ScaleType] = {"F16": "f16", "BF16": "bf16", "F32": "f32"}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix [out_features, in_features] and the tensors that it is made of."""

    layout: Layout
    scheme: QuantScheme
    shape: tuple[int, int]
    codes: TensorRef
    scales: TensorRef
    zeros: TensorRef | None = None  # zero points; of "mlx" the biases
    g_idx: TensorRef | None = None  # int32 [in]: the group of each column; only ever checked
    weight_shape: TensorRef | None = None  # the shape once more; only ever checked
    global_scale: TensorRef | None = None  # one number, of "fp4_multiplied" and "fp4_divided"

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        found = (self.codes, self.scales, self.zeros, self.g_idx, self.weight_shape, self.global_scale)
        return tuple(part for part in found if part is not None)

    def moved(self, files: Mapping[Path, Path]) -> StoredMatrix:
        """The same where its files are elsewhere."""

        def there(part: TensorRef | None) -> TensorRef | None:
            return None if part is None else part.moved(files)

        return replace(
            self,
            codes=self.codes.moved(files),
            scales=self.scales.moved(files),
            zeros=there(self.zeros),
            g_idx=there(self.g_idx),
            weight_shape=there(self.weight_shape),
            global_scale=there(self.global_scale),
        )

    @property
    def has_rows(self) -> bool:
        """Do the bytes of an output row lie together, so that single rows can be read?"""
        return self.layout in ("packed", "int8", "mlx") or self.is_fp4

    @property
    def is_fp4(self) -> bool:
        return self.layout in ("fp4", "fp4_multiplied", "fp4_divided")


@lru_cache(maxsize=256)
def scheme(method: str, bits: int, group_size: int, offset: Offset, scale_type: ScaleType) -> QuantScheme:
    """``method`` as in ``forms``: "gptq", "awq", "compressed", "mlx"; ``group_size`` WHOLE_ROW: a scale per row."""
    groups = "per row" if group_size == WHOLE_ROW else f"group {group_size}"
    width = f"{bits}-bit" if method == "mlx" else f"int{bits}"
    asymmetric = offset == "zero_point" and method != "awq"  # AWQ always is
    return QuantScheme(
        f"{method} {width} {groups}{' asymmetric' if asymmetric else ''}",
        bits,
        group_size,
        group_size,
        offset_codec=offset,
        zero_point=1 << (bits - 1) if offset == "symmetric" else 0,
        scale_type=scale_type,
    )


def part(tensors: Mapping[str, TensorRef], name: str, dtypes: tuple[str, ...], rank: int = 2) -> TensorRef:
    """A tensor that must be there. Raises CheckpointError."""
    ref = tensors.get(name)
    if ref is None:
        raise CheckpointError(f"there is no tensor {name}; download the checkpoint again")
    return checked(ref, dtypes, rank)


def checked(ref: TensorRef, dtypes: tuple[str, ...], rank: int) -> TensorRef:
    if ref.dtype not in dtypes or len(ref.shape) != rank:
        raise CheckpointError(
            f"tensor {ref.name} is {ref.dtype} {list(ref.shape)}; {' or '.join(dtypes)} of {rank} dimensions was wanted"
        )
    return ref


def must_have_shape(ref: TensorRef, *shapes: tuple[int, ...]) -> None:
    if ref.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"tensor {ref.name} has shape {list(ref.shape)}, wanted {wanted}")


def scale_type(*refs: TensorRef) -> ScaleType:
    """The type that holds all of their numbers exactly."""
    found = {_SCALE_TYPES[ref.dtype] for ref in refs}
    return found.pop() if len(found) == 1 else "f32"


FLOATS = tuple(_SCALE_TYPES)


def group_size(value: Any, where: str) -> int:
    """A group size as configs have it: -1 or null is a scale per row. Raises CheckpointError for what no kernel has."""
    if value is None or (type(value) is int and value == -1):
        return WHOLE_ROW
    if type(value) is not int or not SMALLEST_GROUP <= value < WHOLE_ROW or value & (value - 1):
        raise CheckpointError(
            f"{where} has group_size {str(value)[:40]!r}; powers of two from 16 on and -1 are supported"
        )
    return value


def num_groups(columns: int, size: int) -> int:
    return -(-columns // size)
