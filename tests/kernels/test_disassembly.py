"""The hot loops keep their accumulators in registers: read from the machine code that is installed.

GCC has moved accumulators to the stack for changes that no other test sees; the speed then halves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import pytest

from glmlocal.kernels import cpu

if not cpu.available:
    pytest.skip("no native kernels here", allow_module_level=True)
if shutil.which("objdump") is None:
    pytest.skip("no objdump here (binutils)", allow_module_level=True)

from glmlocal.kernels.cpu import _cpu

SPILL = re.compile(r".*%[yz]mm\d+,.*\((?:%rsp|%rbp)[^()]*\)$")  # a store; constants may be read from there
MULTIPLY = re.compile(r"(?:\{vex\} )?vpdpbusd|vpmaddubsw|vpmaddwd|vfn?m(?:add|sub)\d+ps|vdpbf16ps")
HOT = [
    # (function, multiplications that the innermost loop must have)
    ("avx512", "multiply_in_registers<8, 7, false, false>", 112),
    ("avx512", "multiply_in_registers<8, 5, false, false>", 80),
    ("avx512", "multiply_in_registers<8, 7, true, false>", 112),
    ("avx512", "multiply_in_registers<8, 7, false, true>", 112),
    ("avx512", "multiply_in_registers<8, 7, true, true>", 112),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Quads4, glmlocal::avx512::PlainScales, 1>", 32),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Quads8, glmlocal::avx512::PlainScales, 1>", 32),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Quads4, glmlocal::avx512::PlainScales, 4>", 64),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Quads6, glmlocal::avx512::GroupScales, 1>", 32),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Quads4, glmlocal::avx512::GroupScales, 1>", 32),
    ("amx", "multiply_amx<16, false, false, false>", 16),
    ("amx", "multiply_amx<12, true, true, false>", 24),
    ("amx", "multiply_amx<16, false, false, true>", 16),
    ("avx512", "multiply_tile<6, 4>", 24),
    ("avx512", "multiply_few_rows<glmlocal::avx512::Bf16Codec, 1>", 64),
]
# With 16 registers GCC 12 keeps a few things on the stack, not one per product: in a tile one of the 12 sums, from one
# word to the next; in few rows what a sum starts from. With VNNI it is rows' scales and starts.
NEARLY = [
    ("avx2", "multiply_tile<4, 6, 1>", 96, 12),
    ("avx_vnni", "multiply_in_registers<8, 4, false, false>", 64, 4),
    ("avx2", "multiply_few_rows<glmlocal::avx2::Quads4, glmlocal::avx2::PlainScales, 1>", 20, 2),
    ("avx2", "multiply_few_rows<glmlocal::avx2::Quads8, glmlocal::avx2::PlainScales, 1>", 34, 2),
]


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


@cache
def symbols() -> dict[str, tuple[int, int]]:
    """Demangled name of every function → its address and size."""
    listing = subprocess.run(["objdump", "-t", "-C", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in listing.splitlines():
        match = re.match(r"([0-9a-f]+) .{7} \.text\s+([0-9a-f]+)\s+(?:\.hidden )?(.*)", line)
        if match:
            found[match[3]] = (int(match[1], 16), int(match[2], 16))
    return found


def instructions(isa: str, function: str) -> list[Instruction]:
    pattern = re.compile(rf"(?:^|[ :])glmlocal::{isa}::\(anonymous namespace\)::{re.escape(function)}\(")
    places = [place for name, place in symbols().items() if pattern.search(name) and "lambda" not in name]
    assert len(places) == 1, f"{len(places)} functions {function} of {isa}; were symbols stripped?"
    start, size = places[0]
    command = ["objdump", "-d", "--no-show-raw-insn", f"--start-address={start}", f"--stop-address={start + size}"]
    code = subprocess.run([*command, _cpu.__file__], capture_output=True, text=True, check=True).stdout
    lines = (re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in code.splitlines())
    return [Instruction(int(match[1], 16), match[2]) for match in lines if match]


def innermost_loop(code: list[Instruction], multiplications: int) -> list[Instruction]:
    """The shortest run that ends in a jump back to its start and multiplies that often."""
    loops = []
    for end, instruction in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", instruction.text)
        if jump is None or int(jump[1], 16) > instruction.address:
            continue
        body = [each for each in code[: end + 1] if each.address >= int(jump[1], 16)]
        if sum(bool(MULTIPLY.match(each.text)) for each in body) >= multiplications:
            loops.append(body)
    assert loops, "no such loop"
    return min(loops, key=len)


@pytest.mark.parametrize(("isa", "function", "multiplications"), HOT, ids=lambda value: str(value))
def test_a_hot_loop_stores_nothing_on_the_stack(isa: str, function: str, multiplications: int) -> None:
    loop = innermost_loop(instructions(isa, function), multiplications)
    spilled = [each.text for each in loop if SPILL.match(each.text)]
    assert not spilled, f"{len(spilled)} of {len(loop)} instructions: {spilled[:4]}"


@pytest.mark.parametrize(("isa", "function", "multiplications", "most"), NEARLY, ids=lambda value: str(value))
def test_with_16_registers_few_things_are_stored_on_the_stack(
    isa: str, function: str, multiplications: int, most: int
) -> None:
    loop = innermost_loop(instructions(isa, function), multiplications)
    spilled = [each.text for each in loop if SPILL.match(each.text)]
    assert len(spilled) <= most, f"{len(spilled)} of {len(loop)} instructions: {spilled[:4]}"


def test_the_search_sees_a_spill() -> None:
    code = [
        Instruction(16, "vpdpbusd %zmm1,%zmm2,%zmm3"),
        Instruction(22, "vmovdqa64 %zmm3,0x40(%rsp)"),
        Instruction(30, "vmovaps -0x38(%rsp),%zmm7"),
        Instruction(38, "jne    10 <f>"),
    ]
    loop = innermost_loop(code, 1)
    assert len(loop) == 4
    assert [each.address for each in loop if SPILL.match(each.text)] == [22]
