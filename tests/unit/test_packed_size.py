"""The size of a packed matrix, against the extension's own layout and against real buffers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from glmlocal.formats.packed_size import packed_bytes
from glmlocal.formats.schemes import INT4, INT8, QUANTIZED_DTYPES, scheme_of
from glmlocal.kernels import cpu
from quantized import DENSE, SCHEMES, random_matrix

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels")

SHAPES = [(1, 1), (15, 31), (16, 32), (17, 33), (64, 256), (65, 257), (100, 1408), (7, 10944), (129, 96), (3, 16)]
ALL_SCHEMES = {**SCHEMES, "int4": INT4, "int8": INT8} | {name: scheme_of(name) for name in QUANTIZED_DTYPES}


@pytest.mark.parametrize("name", sorted(ALL_SCHEMES))
def test_size_of_a_scheme_is_that_of_the_packed_buffer(name: str) -> None:
    from glmlocal.kernels.cpu.packing import pack
    from quantized import random_quantized

    scheme = ALL_SCHEMES[name]
    for rows, columns in SHAPES:
        matrix = random_quantized(scheme, rows, columns, np.random.default_rng(rows))
        packed = pack(matrix)
        assert packed_bytes(rows, columns, scheme) == packed.nbytes == packed.buffer.nbytes
        assert packed.format.scale_type == scheme.scale_type


@pytest.mark.parametrize("name", sorted(DENSE))
def test_size_of_plain_floats_is_that_of_the_packed_buffer(name: str) -> None:
    from glmlocal.kernels.cpu.packing import pack

    for rows, columns in SHAPES:
        assert packed_bytes(rows, columns, name) == pack(random_matrix(name, rows, columns)).nbytes


@pytest.mark.parametrize("scales", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("name", sorted(ALL_SCHEMES))
@pytest.mark.parametrize(
    "shape", [(1, 1), (17, 33), (1408, 4096), (4096, 1408), (4096, 10944), (151552, 5120), (0, 64)]
)
def test_size_is_that_of_the_extensions_layout(name: str, shape: tuple[int, int], scales: str) -> None:
    from glmlocal.kernels.cpu import _cpu

    scheme = ALL_SCHEMES[name]
    layout = _cpu.matrix_layout(
        *shape,
        _cpu.MatrixFormat(
            "e4m3" if scheme.code_type == "e4m3" else f"u{scheme.bits}",
            scale_type=scales,
            group_size=scheme.group_size,
            super_size=scheme.super_size,
            has_sub_scale=scheme.scale_codec == "two_level",
            has_min=scheme.offset_codec != "symmetric",
            has_sub_min=scheme.offset_codec in ("two_level_min", "zero_point"),
        ),
    )
    assert packed_bytes(*shape, replace(scheme, scale_type=scales)) == layout.num_bytes


def test_size_needs_no_torch() -> None:
    code = "import glmlocal.formats.packed_size, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
