"""Which kernels run: detection, GLMLOCAL_CPU_ISA, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glmlocal import kernels
from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu

_SCRIPT = """
import torch
from glmlocal.errors import KernelUnavailable
try:
    from glmlocal import kernels
except KernelUnavailable as error:
    print(error)
else:
    x, w = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    assert torch.equal(kernels.linear(x, kernels.pack(w)), x @ w.T)
    kernels.set_num_threads(1)
    assert kernels.num_threads() == 1
    print(kernels.describe())
"""


def run(isa: str) -> str:
    env = os.environ | {"GLMLOCAL_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_isa_of_this_machine_can_be_forced() -> None:
    assert _cpu.available_isas()[0] == "generic"
    for isa in _cpu.available_isas():
        assert run(isa) == f"native {isa}, 1 thread"
    assert run("") == f"native {_cpu.available_isas()[-1]}, 1 thread"


def test_the_reference_can_be_forced() -> None:
    assert run("reference") == "reference (GLMLOCAL_CPU_ISA=reference)"


def test_an_unknown_isa_is_an_error_that_lists_the_choices() -> None:
    choices = ", ".join([*_cpu.available_isas(), "reference"])
    assert run("avx9000") == f"GLMLOCAL_CPU_ISA=avx9000 is not available here; available: {choices}"


def test_set_isa_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="ISA 'neon9' is not available here; available: generic"):
        _cpu.set_isa("neon9")


def test_describe_names_the_isa(isa: str) -> None:
    assert kernels.describe().startswith(f"native {isa}, ")
