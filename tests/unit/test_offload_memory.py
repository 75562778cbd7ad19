"""A model larger than its memory runs within it: the resident set of the process stays below what --ram said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import packed
import tiny
from glmlocal.engine.planning import plan_here
from glmlocal.errors import PlanError
from glmlocal.formats.expert_pack import PACK_FILE
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.planner.plan import Wants
from glmlocal.units import MIB

if not cpu.available:
    pytest.skip("packs need the native kernels", allow_module_level=True)

RAM_MIB = 420
PROGRAM = """
import json, sys
from glmlocal import LLM

def resident():  # the peak of this process; ru_maxrss would also have its parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

with LLM(sys.argv[1], ram=sys.argv[2], context=512, max_batch=1, threads=2) as llm:
    for start in range(0, 360, 40):
        llm.generate([3 + (start + i * 7) % 380 for i in range(200)], max_tokens=8, temperature=0.0, ignore_eos=True)
    stats = llm.offload_stats
    ram = next(device for device in llm.plan.devices if device.kind == "ram")
    print(json.dumps({
        "peak": resident(),
        "slot_bytes": stats and stats.slot_bytes,
        "read_bytes": stats and stats.read_bytes,
        "planned": ram.used_bytes,
    }))
"""


def test_the_resident_set_stays_within_ram(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 128, "num_hidden_layers": 6}
    model = tiny.build_model(**sizes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()  # so that all experts are used
    model = model.to(torch.bfloat16)
    directory = packed.pack(tiny.save(model, tmp_path / "source"), tmp_path / "packed")
    pack_bytes = (directory / PACK_FILE).stat().st_size
    assert pack_bytes > 240 * MIB
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), f"{RAM_MIB}MiB"],
        capture_output=True,
        text=True,
        env={"GLMLOCAL_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert 20 * MIB < found["slot_bytes"] < pack_bytes // 2, "less than half of the experts have a slot"
    assert found["read_bytes"] > found["slot_bytes"], "all slots are filled"
    assert found["planned"] <= RAM_MIB * MIB
    assert found["peak"] <= RAM_MIB * MIB


def test_a_budget_below_the_least_names_one_that_is_enough(tmp_path: Path) -> None:
    """Not the machine that would hold all experts."""
    directory = packed.pack(tiny.save(tiny.build_model(5), tmp_path / "source"), tmp_path / "packed")
    checkpoint = open_checkpoint(directory)
    with pytest.raises(PlanError, match="does not fit") as caught:
        plan_here(checkpoint, "keep", Wants(), ram="1MiB")
    first = re.search(r"would fit: --ram ([\d.]+GiB) \(most experts are read from the disk", str(caught.value))
    assert first is not None, str(caught.value)
    assert plan_here(checkpoint, "keep", Wants(), ram=first[1]).fits
