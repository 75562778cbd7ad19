"""The Triton kernels in its interpreter, beside their torch twin; a process of its own: the variable is read once.

    TRITON_INTERPRET=1 python tests/interpreted.py

Prints one JSON line per case: what it is, and the largest difference over the largest magnitude.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))

from glmlocal.formats.expert_pack_layout import expert_layout
from glmlocal.formats.quant import E4M3_VALUES
from glmlocal.formats.schemes import FP8_BLOCK128, FP8_CHANNEL, INT4, INT8, QuantScheme
from glmlocal.kernels import triton_experts
from glmlocal.kernels.torch_records import RecordExperts
from glmlocal.kernels.triton_experts import TritonExperts, takes

CASES: tuple[tuple[str, tuple[QuantScheme, ...]], ...] = (
    ("int4", (INT4,) * 3),
    ("int4, 128, zero points", (QuantScheme("awq", 4, 128, 128, offset_codec="zero_point"),) * 3),
    ("int4, 64, bf16 scales", (QuantScheme("mlx", 4, 64, 64, zero_point=8, scale_type="bf16"),) * 3),
    ("int8", (INT8,) * 3),
    ("fp8, 128", (FP8_BLOCK128,) * 3),
    ("fp8, rows", (FP8_CHANNEL,) * 3),
    ("mixed", (INT4, FP8_BLOCK128, INT8)),
)
SHAPES = ((96, 80, 20), (33, 17, 2))  # hidden, width, tokens


def slots_of(hidden: int, width: int, kinds: tuple[QuantScheme, ...], num_slots: int) -> torch.Tensor:
    """Any codes; scales as weights have them, with no NaN among e4m3."""
    layout, rng = expert_layout(hidden, width, kinds), np.random.default_rng(0)
    slots = rng.integers(0, 256, (num_slots, layout.record_bytes), np.uint8)
    for matrix in layout.matrices:
        assert matrix.scheme is not None
        if matrix.scheme.code_type == "e4m3":
            codes = slots[:, matrix.offset :][:, : matrix.sections.codes.nbytes]
            codes[codes & 127 == 127] = 1
        scales = matrix.sections.scales
        assert scales is not None
        at = matrix.offset + scales.offset
        kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[matrix.scheme.scale_type]
        unit = 2.0**120 if matrix.scheme.code_type == "e4m3" else 1.0
        values = torch.from_numpy(rng.uniform(0.01, 0.02, (num_slots, scales.nbytes // kind.itemsize))) * unit
        slots[:, at : at + scales.nbytes] = values.to(kind).view(torch.uint8).numpy()
    return torch.from_numpy(slots)


@triton.jit
def _decode(codes, out):
    i = tl.arange(0, 256)
    tl.store(out + i, triton_experts._e4m3(tl.load(codes + i)))


def e4m3_differences() -> int:
    """Codes whose value is not that of the table."""
    found, wanted = torch.empty(256), torch.from_numpy(E4M3_VALUES)
    _decode[(1,)](torch.arange(256, dtype=torch.int32), found)
    is_same = (found == wanted) | (found.isnan() & wanted.isnan())
    return int((~is_same).sum())


def main() -> None:
    print(json.dumps({"e4m3_differences": e4m3_differences()}))
    for name, kinds in CASES:
        for hidden, width, tokens in SHAPES:
            layout = expert_layout(hidden, width, kinds)
            assert takes(layout)
            slots = slots_of(hidden, width, kinds, 5)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(tokens, hidden, generator=generator)
            ids = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(tokens)]).int()
            ids[:, 0] = 3  # more pairs than a program takes, where there are many tokens
            placed = [(3, 1), (0, 4), (2, 2), (7, 0)]  # 1 is elsewhere, nobody asks for 7
            for activations in ("int8", "fp32"):
                twin = RecordExperts(layout, activations)  # type: ignore[arg-type]
                wanted_pairs, wanted = twin.rows(x, ids, slots, placed)
                pairs, rows = TritonExperts(layout, activations).rows(x, ids, slots, placed)  # type: ignore[arg-type]
                print(
                    json.dumps(
                        {
                            "case": [name, hidden, width, tokens, activations],
                            "same_pairs": pairs.tolist() == wanted_pairs.tolist(),
                            "difference": float((rows - wanted).abs().max() / wanted.abs().max()),
                        }
                    )
                )
    assert not takes(expert_layout(64, 96, (INT4, INT4, replace(INT4, codebook=tuple(range(16))))))


if __name__ == "__main__":
    main()
