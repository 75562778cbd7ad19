"""Records by torch alone: the same weights as the native kernels', and the same experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmlocal.kernels import cpu
from quantized import DENSE, SCHEMES, random_matrix

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.formats.expert_pack_layout import ExpertLayout, expert_layout
from glmlocal.kernels.cpu.packing import bind_record, pack_record
from glmlocal.kernels.cpu.slots import bind_layout
from glmlocal.kernels.reference import MatrixRows
from glmlocal.kernels.torch_records import RecordExperts, unpack

KINDS = [*SCHEMES, *DENSE]


def record_of(kind: str, hidden: int, width: int, seed: int = 0) -> tuple[ExpertLayout, np.ndarray]:
    matrices = [random_matrix(kind, *shape, 3 * seed + i) for i, shape in enumerate(_shapes(hidden, width))]
    layout = expert_layout(hidden, width, (SCHEMES.get(kind, kind),) * 3)
    return layout, pack_record(tuple(map(MatrixRows.of, matrices)), layout)  # type: ignore[arg-type]


def _shapes(hidden: int, width: int) -> tuple[tuple[int, int], ...]:
    return (width, hidden), (width, hidden), (hidden, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (288, 80), (512, 272), (33, 17)])
def test_weights_are_those_of_the_native_kernels(kind: str, hidden: int, width: int) -> None:
    layout, record = record_of(kind, hidden, width)
    for matrix, packed in zip(layout.matrices, bind_record(layout, record), strict=True):
        found = unpack(matrix, torch.from_numpy(record))
        torch.testing.assert_close(found, packed.dequantize(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "fp8_block128", "bf16"])
@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_rows_are_those_of_slot_experts(kind: str, activations: str) -> None:
    hidden, width, tokens, top_k, experts = 256, 96, 5, 3, 6
    layout = record_of(kind, hidden, width)[0]
    records = {expert: record_of(kind, hidden, width, expert)[1] for expert in (4, 1, 2)}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).int()
    slots = bind_layout(layout, experts, activations)  # type: ignore[arg-type]
    wanted = torch.full((tokens * top_k, slots.row_floats), torch.nan)
    slots.rows(x, ids, list(records), [record.ctypes.data for record in records.values()], wanted)
    pairs, rows = RecordExperts(layout, activations).rows(  # type: ignore[arg-type]
        x, ids, torch.from_numpy(np.stack(list(records.values()))), [(expert, i) for i, expert in enumerate(records)]
    )
    assert set(pairs.tolist()) == {i for i, expert in enumerate(ids.flatten().tolist()) if expert in records}
    scale = wanted[pairs, :hidden].abs().max()
    torch.testing.assert_close(rows, wanted[pairs, :hidden], rtol=1e-4, atol=float(scale) * 2e-3)
