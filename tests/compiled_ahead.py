"""The Triton kernels compiled for GPUs that are not here, with ptxas; in a process of its own, not interpreted.

    python tests/compiled_ahead.py

Prints one JSON line per kernel, scheme and architecture: registers, and bytes of stack (0: nothing spilled).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))

from glmlocal.formats.expert_pack_layout import expert_layout
from glmlocal.kernels import triton_experts
from interpreted import CASES

ARCHITECTURES = (80, 89, 90, 120)
HIDDEN, WIDTH = 4096, 1408  # GLM-4.5-Air's
COMPILED = ("int4", "int4, 128, zero points", "fp8, 128")
TYPES = {"slot_bytes": "i64", "slots": "*u8", "tokens": "*i32", "chunks": "*i32"}  # others are fp32 tensors


def source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    return ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)


def resources(cubin: bytes) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def main() -> None:
    for name in COMPILED:
        kinds = dict(CASES)[name]
        gate, up, down = expert_layout(HIDDEN, WIDTH, kinds).matrices
        constants, scale = triton_experts.constants, triton_experts.scale_type
        tokens = triton_experts.TOKEN_ROWS
        both = {"GATE": constants(gate), "UP": constants(up), "GATE_SCALE": scale(gate), "UP_SCALE": scale(up)}
        alone = {"DOWN": constants(down), "DOWN_SCALE": scale(down)}
        for kernel, values in ((triton_experts._hidden_kernel, both), (triton_experts._down_kernel, alone)):
            for architecture in ARCHITECTURES:
                target = GPUTarget("cuda", architecture, 32)
                made = triton.compile(source(kernel, values | {"TOKENS": tokens}), target=target)
                case = [name, kernel.__name__, architecture]
                print(json.dumps({"case": case} | resources(made.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
