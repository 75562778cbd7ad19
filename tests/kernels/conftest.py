"""Fixtures of the kernel tests: every instruction set that this machine has, and thread counts, put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from glmlocal import kernels
from glmlocal.kernels import cpu

if cpu.available:
    from glmlocal.kernels.cpu import _cpu

    _ISAS = _cpu.available_isas()
else:
    _ISAS = []


@pytest.fixture(params=_ISAS or [pytest.param("", marks=pytest.mark.skip(reason="no native kernels here"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set, forced."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads until the test ends."""
    before = kernels.num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)
