"""A model larger than its memory runs within it: the resident set of the process stays below what --ram said."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import packed
import tiny
from glmlocal.engine.planning import plan_here
from glmlocal.errors import ConfigError, PlanError
from glmlocal.formats.expert_pack import PACK_FILE
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.offload import runtime
from glmlocal.planner.plan import Wants
from glmlocal.units import MIB

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _groups import inside, memory_group

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

RAM_MIB = 420
# Answers a prompt for every line it is given, and says how it fares; the argument is --ram, if any.
PROGRAM = """
import json, sys, time
from glmlocal import LLM
from glmlocal.memory import available_bytes

def resident():  # the peak of this process; ru_maxrss would also have its parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

with LLM(sys.argv[1], ram=(sys.argv[2:] or [None])[0], context=512, max_batch=1, threads=2) as llm:
    ram = next(device for device in llm.plan.devices if device.kind == "ram")
    for line in sys.stdin:
        start, pause_s = line.split()
        start = int(start)
        time.sleep(float(pause_s))
        prompt = [3 + (start + i * 7) % 380 for i in range(200)]
        answer = llm.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
        stats = llm.offload_stats
        print(json.dumps({
            "answer": answer.token_ids,
            "peak": resident(),
            "available": available_bytes(),
            "slots": stats and stats.slots,
            "slot_bytes": stats and stats.slot_bytes,
            "read_bytes": stats and stats.read_bytes,
            "planned": ram.used_bytes,
        }), flush=True)
"""
HOG = "import sys; held = bytearray(b'1') * int(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


class Running:
    """The program, or a hog."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, start: int, pause_s: float = 0.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start} {pause_s}\n")
        self._process.stdin.flush()
        return json.loads(self.line())  # type: ignore[no-any-return]

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended with {self._process.wait(10)}, {-signal.SIGKILL} is being killed"
        return line


@contextmanager
def running(command: list[str], home: Path) -> Iterator[Running]:
    """Ends when its input does, which is when the context is left."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"GLMLOCAL_HOME": str(home), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    ) as process:
        yield Running(process)


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 128, "num_hidden_layers": 6}
    model = tiny.build_model(**sizes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()  # so that all experts are used
    found = packed.pack(tiny.save(model.to(torch.bfloat16), directory / "source"), directory / "packed")
    assert (found / PACK_FILE).stat().st_size > 240 * MIB
    return found


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A memory control group of as many MiB as the test's parameter says."""
    made = memory_group("test", request.param * MIB)
    try:
        group = made.__enter__()
    except ConfigError as error:
        pytest.skip(str(error))
    yield group
    made.__exit__(None, None, None)


def test_the_resident_set_stays_within_ram(packed_model: Path, tmp_path: Path) -> None:
    with running([sys.executable, "-c", PROGRAM, str(packed_model), f"{RAM_MIB}MiB"], tmp_path) as program:
        found = [program.ask(start) for start in range(0, 360, 40)][-1]
    pack_bytes = (packed_model / PACK_FILE).stat().st_size
    assert 20 * MIB < found["slot_bytes"] < pack_bytes // 2, "less than half of the experts have a slot"
    assert found["read_bytes"] > found["slot_bytes"], "all slots are filled"
    assert found["planned"] <= RAM_MIB * MIB
    assert found["peak"] <= RAM_MIB * MIB


@pytest.mark.parametrize("group", [560], indirect=True)
def test_without_a_budget_it_stays_within_its_control_group(packed_model: Path, tmp_path: Path, group: Path) -> None:
    command = inside(group, [sys.executable, "-c", PROGRAM, str(packed_model)])
    with running(command, tmp_path) as program:
        found = [program.ask(start) for start in range(0, 360, 40)][-1]
    assert found["read_bytes"] > found["slot_bytes"] > 0, "all slots are filled"
    assert found["planned"] <= 560 * MIB
    assert found["peak"] <= 560 * MIB


@pytest.mark.parametrize("group", [1400], indirect=True)
def test_it_makes_room_for_its_neighbours_in_a_control_group(packed_model: Path, tmp_path: Path, group: Path) -> None:
    """Two hogs take what is left of the group, the second also what was given back for the first: nobody is killed."""

    def hog(num_bytes: int) -> list[str]:
        return inside(group, [sys.executable, "-c", HOG, str(num_bytes)])

    command = inside(group, [sys.executable, "-c", PROGRAM, str(packed_model), "520MiB"])
    with running(command, tmp_path) as program:
        before = [program.ask(start) for start in range(0, 360, 40)][-1]
        with running(hog(before["available"] - 190 * MIB), tmp_path) as first:
            assert first.line() == "held\n"
            squeezed = program.ask(320, runtime.CHECK_S)
            with running(hog(squeezed["available"] - 60 * MIB), tmp_path) as second:
                assert second.line() == "held\n"
                last = program.ask(320, runtime.CHECK_S)
        after = [program.ask(320, runtime.CHECK_S) for _ in range(2)][-1]
    assert 1 < squeezed["slots"] < before["slots"]
    assert squeezed["available"] > 300 * MIB, "memory was really given back"
    assert before["answer"] == squeezed["answer"] == last["answer"] == after["answer"]
    assert after["slots"] > last["slots"], "and taken again"


def test_a_budget_below_the_least_names_one_that_is_enough(tmp_path: Path) -> None:
    """Not the machine that would hold all experts."""
    directory = packed.pack(tiny.save(tiny.build_model(5), tmp_path / "source"), tmp_path / "packed")
    checkpoint = open_checkpoint(directory)
    with pytest.raises(PlanError, match="does not fit") as caught:
        plan_here(checkpoint, "keep", Wants(), ram="1MiB")
    first = re.search(r"would fit: --ram ([\d.]+GiB) \(most experts are read from the disk", str(caught.value))
    assert first is not None, str(caught.value)
    assert plan_here(checkpoint, "keep", Wants(), ram=first[1]).fits
