"""Facts of a machine that is well, one thing changed at a time."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from glmlocal.machine.findings import findings, is_busy

GIB = 1 << 30
WELL: dict[str, Any] = {
    "kernels": {
        "native": True, "isa": "avx512", "forced": None, "available": ["generic", "avx2", "avx512"],
        "cpu_has": ["avx2", "avx512"], "missing": [], "problem": None, "cause": None, "has_compiler": True,
        "compiler": "GCC 12",
    },
    "cpu": {
        "cores": 8, "allowed_cores": 8, "limit": None, "threads": 8, "busy_cpus": 0.0,
        "numa_nodes": [{"node": 0, "cpus": 8, "memory_bytes": 64 * GIB}],
    },
    "memory": {
        "total_bytes": 64 * GIB, "available_bytes": 60 * GIB, "limit_bytes": None, "swap_used_bytes": 0,
        "transparent_huge_pages": "madvise",
    },
    "peaks": {"difference": 0.05},
    "kernel_rates": {"spread": 0.02},
    "disk": {
        "path": "/models", "filesystem": "ext4", "direct": True, "gb_per_s": {"1": 1.0, "4": 3.0}, "problem": None,
    },
    "gpus": [],
    "gpus_on_bus": {},
    "versions": {"torch": "2.13.0+cpu", "torch_cuda": None, "torch_rocm": None},
    "stored": {"path": "/state/measurements.json", "problem": None},
}  # fmt: skip
RTX = {"vendor": "NVIDIA", "name": "RTX 4090"}
RADEON = {"vendor": "AMD", "name": "RX 7900"}


def changed(**changes: Any) -> dict[str, Any]:
    """WELL with ``cpu__limit=2`` and the like."""
    facts = deepcopy(WELL)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            facts[section][key] = value
        else:
            facts[section] = value
    return facts


def bad(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings(facts) if finding.level != "ok"]


def test_a_machine_that_is_well_has_one_ok_per_subject() -> None:
    found = findings(WELL)
    assert {finding.level for finding in found} == {"ok"}
    assert [finding.subject for finding in found] == [
        "kernels", "cores", "load", "memory", "huge pages", "disk", "GPU",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        (
            {"kernels__problem": "reference (no native extension: x)", "kernels__cause": "build",
             "kernels__available": [], "kernels__isa": "reference", "kernels__has_compiler": False},
            ("fix", "kernels"), "install a C++20 compiler",
        ),
        (
            {"kernels__problem": "reference (no native extension: x)", "kernels__cause": "build",
             "kernels__available": [], "kernels__isa": "reference"},
            ("fix", "kernels"), "there is a compiler",
        ),
        ({"kernels__problem": "torch: no", "kernels__cause": "torch"}, ("fix", "kernels"), "install torch again"),
        ({"kernels__problem": "ISA x?", "kernels__cause": "isa"}, ("fix", "kernels"), "unset GLMLOCAL_CPU_ISA"),
        ({"kernels__forced": "avx2", "kernels__isa": "avx2"}, ("warn", "kernels"), "avx512 would run"),
        ({"kernels__forced": "reference", "kernels__isa": "reference"}, ("warn", "kernels"), "unset"),
        (
            {"kernels__isa": "avx2", "kernels__available": ["generic", "avx2"], "kernels__missing": ["avx512"]},
            ("warn", "kernels"), "this CPU has avx512, this build of glmlocal does not",
        ),
        (
            {"kernels__missing": ["amx"]},
            ("warn", "kernels"), "this CPU has amx, this build of glmlocal does not",
        ),
        ({"cpu__limit": 2.5, "cpu__threads": 2}, ("fix", "cores"), "2.5 CPUs' worth of time on 8 cores: 2 threads"),
        ({"cpu__allowed_cores": 4}, ("warn", "cores"), "only 4 of 8 cores"),
        ({"cpu__busy_cpus": 1.5}, ("warn", "load"), "1.5 CPUs"),
        ({"peaks__difference": 0.3}, ("warn", "load"), "30%"),
        ({"kernel_rates__spread": 0.09}, ("warn", "load"), "9% apart"),
        (
            {"cpu__numa_nodes": [{"node": 0, "cpus": 4, "memory_bytes": GIB}, {"node": 1, "cpus": 4,
             "memory_bytes": GIB}]},
            ("warn", "NUMA"), "numactl",
        ),
        ({"memory__limit_bytes": 48 * GIB, "memory__available_bytes": 40 * GIB}, ("warn", "memory"), "48 GiB of 64"),
        ({"memory__available_bytes": 20 * GIB}, ("warn", "memory"), "only 20 GiB of 64 GiB are free"),
        ({"memory__swap_used_bytes": 8 * GIB}, ("warn", "memory"), "8 GiB are swapped out"),
        ({"memory__transparent_huge_pages": "never"}, ("fix", "huge pages"), "echo madvise"),
        ({"memory__transparent_huge_pages": None}, ("warn", "huge pages"), "does not say"),
        ({"disk": {"path": "/x", "problem": "full"}}, ("warn", "disk"), "full"),
        ({"disk__direct": False}, ("warn", "disk"), "refuses O_DIRECT"),
        ({"disk__gb_per_s": {"1": 0.1, "4": 0.2}}, ("warn", "disk"), "0.20 GB/s"),
        ({"disk__filesystem": "tmpfs"}, ("warn", "disk"), "is memory"),
        ({"gpus": [RTX]}, ("fix", "GPU"), "RTX 4090: torch 2.13.0+cpu was built without CUDA"),
        ({"gpus": [RADEON], "versions__torch_cuda": "12.8"}, ("fix", "GPU"), "without ROCM"),
        ({"gpus_on_bus": {"NVIDIA": 2}}, ("fix", "GPU"), "2 NVIDIA GPUs are plugged in, the driver shows 0"),
        ({"stored__problem": "read-only"}, ("warn", "measurements"), "read-only"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_with_advice(changes: dict[str, Any], expected: tuple[str, str], words: str) -> None:
    facts = changed(**changes)
    assert bad(facts) == [expected]
    finding = findings(facts)[0]
    assert words in f"{finding.text} {finding.advice}"
    assert finding.advice or finding.subject == "huge pages"
    assert "\n" not in finding.text + finding.advice


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels__forced": "avx512"},  # what would have been chosen
        {"kernels__missing": ["avx_vnni"]},  # slower than what runs
        {"kernels__missing": ["neon"]},  # no build has it
        {"cpu__limit": 8.0},
        {"cpu__limit": 16.0},
        {"cpu__busy_cpus": 0.2},
        {"peaks": None},
        {"kernel_rates": None},
        {"peaks__difference": None},
        {"memory__limit_bytes": 64 * GIB},
        {"memory__swap_used_bytes": GIB},
        {"memory__transparent_huge_pages": "always"},
        {"gpus": [RTX], "gpus_on_bus": {"NVIDIA": 1}, "versions__torch_cuda": "12.8"},
        {"gpus": [RADEON], "versions__torch_rocm": "6.4"},
    ],
)
def test_what_is_well_is_left_alone(changes: dict[str, Any]) -> None:
    assert bad(changed(**changes)) == []


def test_those_to_fix_come_first() -> None:
    facts = changed(cpu__allowed_cores=4, memory__transparent_huge_pages="never")
    assert [finding.level for finding in findings(facts)][:3] == ["fix", "warn", "ok"]


def test_busy() -> None:
    assert not is_busy(WELL)
    assert is_busy(changed(cpu__busy_cpus=0.5))
    assert is_busy(changed(peaks__difference=0.2))
    assert is_busy(changed(kernel_rates__spread=0.06))
