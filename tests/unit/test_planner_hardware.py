"""Hardware in words, the table of GPUs, and this machine as a value."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmlocal.errors import ConfigError
from glmlocal.machine import gpus as gpu_probe
from glmlocal.machine.cpu import Cpu as CpuFacts
from glmlocal.machine.disk import DiskRates
from glmlocal.machine.kernel_rates import KernelRates, ProductRate
from glmlocal.machine.measurements import Measurements
from glmlocal.planner import gpus, hardware, probe
from glmlocal.planner.machine import Nvme, Ram
from glmlocal.units import GIB, MIB, parse_size


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("nvidia h100 pcie", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("h200", "H200"),
        ("NVIDIA H20", "H20"),
        ("H20 141GB", "H20-3e"),
        ("NVIDIA H20-3e", "H20-3e"),
        ("NVIDIA B200", "B200"),
        ("A100", "A100"),
        ("A100 40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("L4", "L4"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000"),
        ("4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("3060", "RTX 3060 12GB"),
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("4060Ti16", "RTX 4060 Ti 16GB"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("5060Ti", "RTX 5060 Ti 16GB"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX 5070 Ti"),
        ("NVIDIA GB10", "DGX Spark GB10"),
        ("DGX Spark", "DGX Spark GB10"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("MI325X", "MI325X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("7900XT", "RX 7900 XT"),
        ("AMD Radeon AI PRO R9700", "AI PRO R9700"),
        ("MI50", "MI50 32GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla V100-PCIE-32GB", "V100 32GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("Tesla T4", "T4"),
        ("Tesla P40", "P40"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("NVIDIA TITAN RTX", "Titan RTX"),
        ("2080 Ti", "RTX 2080 Ti"),
        ("NVIDIA A800-SXM4-80GB", "A800"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080"),
        ("3080 12GB", "RTX 3080 12GB"),
        ("4070S", "RTX 4070 SUPER"),
        ("4060 Ti 8GB", "RTX 4060 Ti 8GB"),
        ("NVIDIA RTX PRO 5000 Blackwell", "RTX PRO 5000"),
        ("RTX PRO 5000 72GB", "RTX PRO 5000 72GB"),
        ("AMD Instinct MI250X", "MI250X"),
        ("MI300A", "MI300A"),
        ("MI355X", "MI355X"),
        ("AMD Ryzen AI MAX+ 395 w/ Radeon 8060S", "Strix Halo"),
        ("Radeon RX 7800 XT", "RX 7800 XT"),
        ("MI50 16GB", "MI50 16GB"),
    ],
)
def test_names_as_people_and_drivers_write_them(name: str, found: str) -> None:
    assert gpus.find(name).name == found
    assert hardware.parse_gpus(f"2x{name}")[1].name == found


def test_every_card_is_found_by_its_own_name_and_is_plausible() -> None:
    for spec in gpus.SPECS:
        gpu = gpus.find(spec.name)
        assert gpu == spec.gpu()
        # The driver reports a little less, or with HBM and ECC off a little more, than the box says in GB.
        assert 0.92 < gpu.memory_bytes / (spec.size_gb * 1e9) < 1.09, spec.name
        assert 250 < gpu.read_gb_per_s < 10_000
        assert (gpu.int8_top_per_s is None) == spec.name.startswith("V100"), spec.name
        int8 = gpu.int8_top_per_s or gpu.bf16_tflop_per_s
        assert int8 >= gpu.bf16_tflop_per_s
        assert gpu.fp8_tflop_per_s is None or gpu.bf16_tflop_per_s < gpu.fp8_tflop_per_s <= int8 + 1
        # Pascal, Volta, Turing, Ampere, CDNA 1 and 2, RDNA 2 and 3 and Vega have no FP8 units.
        nvidia = ("P40", "V100", "T4", "Quadro", "Titan", "RTX 20", "A800", "A30", "A4", "A1", "RTX A", "RTX 30")
        amd = ("MI50", "MI100", "MI2", "RX 6", "RX 7", "PRO W7", "Strix")
        old = (*nvidia, *amd)
        assert (gpu.fp8_tflop_per_s is None) == spec.name.startswith(old), spec.name


def test_what_a_driver_reports_decides_between_cards_of_one_name() -> None:
    assert gpus.find("AMD 0x744c", 20464 * MIB).name == "RX 7900 XT"
    assert gpus.find("AMD 0x744c", 24560 * MIB).name == "RX 7900 XTX"
    eight = gpus.find("NVIDIA GeForce RTX 4060 Ti", 8188 * MIB)
    assert eight.memory_bytes == 8188 * MIB  # the driver's word, not the table's


def test_links() -> None:
    assert gpus.parse_link("pcie4x16") == pytest.approx(26.2, abs=0.1)  # of 31.5
    assert gpus.parse_link("PCIe 5.0 x8") == gpus.parse_link("pcie4x16")
    assert gpus.parse_link("pcie3x1") == pytest.approx(26.2 / 32, abs=0.06)
    assert gpus.parse_link("25.5GB/s") == 25.5
    for bad in ("", "pcie7x16", "pcie4x3", "nvlink", "25", "0GB/s", "pcie٤x16"):
        with pytest.raises(ConfigError, match="pcie4x16"):
            gpus.parse_link(bad)


def test_several_kinds_of_gpus_keep_their_order() -> None:
    names = [gpu.name for gpu in hardware.parse_gpus("2xH100, 1 x RTX4090,24GiB@1008")]
    assert names == ["H100", "H100", "RTX 4090", "24GiB@1008"]
    assert hardware.parse_gpus("none") == ()
    assert hardware.parse_gpus("H100")[0].memory_bytes == 81559 * MIB


def test_a_gpu_described_by_memory_and_bandwidth() -> None:
    gpu, twin = hardware.parse_gpus("2x24GiB@936")
    assert gpu == twin
    assert gpu.name == "24GiB@936"
    assert gpu.memory_bytes == 24 * GIB
    assert gpu.read_gb_per_s == 936
    known = gpus.find("3090")  # computes as an RTX 3090 of that bandwidth would
    assert gpu.bf16_tflop_per_s == pytest.approx(known.bf16_tflop_per_s, rel=0.01)
    assert gpu.int8_top_per_s == pytest.approx(known.int8_top_per_s, rel=0.01)
    assert gpu.fp8_tflop_per_s is None
    assert gpu.link_gb_per_s == known.link_gb_per_s


def test_a_link_replaces_the_cards_own_but_not_shared_memory() -> None:
    card, spark = hardware.parse_gpus("4090,gb10", link=12.5)
    assert card.link_gb_per_s == 12.5
    assert spark.link_gb_per_s == spark.read_gb_per_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2xFOO", "no GPU 'FOO'"),
        ("0xH100", "1 to 64"),
        ("300xH100", "1 to 64"),
        ("40xH100,40xH100", "more than 64"),
        ("2xH100,", "nothing between"),
        (",", "nothing between"),
        ("", "nothing between"),
        ("RTX 4900", "did you mean RTX 4090"),
        ("titn", "did you mean Titan RTX"),
        ("4099", "did you mean RTX 4090"),
        ("nan", "in the table, which has for example"),  # near to no Titan
        ("0", "in the table, which has for example"),
        ("-1", "in the table, which has for example"),
        ("A100 48GB", "A100 with 80 GB"),
        ("1x24GiB@nan", "as GB/s"),
        ("1x24GiB@-3", "as GB/s"),
        ("24GiB@0", "as GB/s"),
        ("24GiB", "GB/s too: 24GiB@1008"),
        ("-1GiB@900", "is negative"),
        ("２xH100", "no GPU"),
        ("-2xH100", "asks for -2 GPUs"),
        ("2xH100,none", "none stands alone"),
        ("Auto, 2xH100", "auto stands alone"),
        ("auto,H100", "auto stands alone"),
    ],
)
def test_bad_gpus_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        hardware.parse_gpus(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ram_and_nvme() -> None:
    assert hardware.parse_ram("128GiB@60.5") == Ram(128 * GIB, 128 * GIB - int(0.06 * 128 * GIB), 60.5)
    assert hardware.parse_ram("16GiB").available_bytes == 14 * GIB  # 2 GiB at least stay the system's
    assert hardware.parse_ram("16GiB@80GB/s").read_gb_per_s == 80
    assert hardware.parse_nvme("2TB@7") == Nvme(2 * 10**12, 7.0)
    assert hardware.parse_nvme("none") is None


@pytest.mark.parametrize(
    "text", ["", "128", "-1GiB", "1e99TB", "nan@inf", "16GiB@", "16GiB@0", "9" * 400 + "TB", "0GiB"]
)
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ram"):
        hardware.parse_ram(text)
    with pytest.raises(ConfigError, match="--nvme"):
        hardware.parse_nvme(text)


def test_too_little_memory_for_the_system_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 GiB"):
        hardware.parse_ram("2GiB")


def test_sizes() -> None:
    assert parse_size("24GiB") == 24 * GIB
    assert parse_size(" 1.5 tb ") == 1_500_000_000_000
    assert parse_size("512M") == 512_000_000
    for bad in ("24", "24 B", "24GiBs", "２4GiB", "1.GiB", "2000000TB", "24\u212aB"):
        with pytest.raises(ConfigError, match="24GiB"):
            parse_size(bad)


_PIECES = st.sampled_from(
    [
        "2x",
        "0x",
        "x",
        "H100",
        "4090",
        "24GiB",
        "@",
        "1008",
        ",",
        " ",
        "nan",
        "inf",
        "-",
        "1e9",
        "TB",
        "none",
        "GB",
        "٣",
        "×",
    ]
)
_WORDS = st.one_of(st.text(max_size=30), st.lists(_PIECES, max_size=6).map("".join))


@given(_WORDS)
@example("9" * 5000 + "GB")
@example("4090 " + "9" * 5000 + "gb")
@example("1x" * 500)
def test_no_words_make_the_parsers_fail_otherwise(text: str) -> None:
    for parse in (hardware.parse_gpus, hardware.parse_ram, hardware.parse_nvme, gpus.parse_link, parse_size):
        with contextlib.suppress(ConfigError):
            parse(text)


# This machine


def _facts(flags: str = "avx2 fma f16c", cores: int = 8, sockets: int = 1) -> CpuFacts:
    return CpuFacts(
        "Fast CPU", "x86_64", sockets, cores, cores, tuple(range(cores)), cores, 1 << 25, frozenset(flags.split()), ()
    )


def _measured(**changes: object) -> Measurements:
    disk = DiskRates("/", "ext4", True, GIB, {1: 2.0, 2: 3.5, 4: 3.0})
    values: dict[str, object] = {"disk": disk, "busy": False, "int8_gop_per_s": 900.0} | changes
    return Measurements(
        "f" * 16, "2026-11-23T00:00:00+00:00", "0.1", "avx512", 6, False, read_gb_per_s=70.5,
        read_gb_per_s_one_thread=40.0, fp32_gflop_per_s=300.0, **values,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine of 64 GiB, 40 GiB of them free, without GPUs and measurements."""
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path))
    monkeypatch.setattr(probe.memory, "system_bytes", lambda: (64 * GIB, 60 * GIB))
    monkeypatch.setattr(probe.memory, "available_bytes", lambda root: 40 * GIB)
    monkeypatch.setattr(probe.cgroups, "memory_limit", lambda root: None)
    monkeypatch.setattr(probe.cgroups, "cpu_limit", lambda root: float("inf"))
    monkeypatch.setattr(probe.cpu_probe, "probe", _facts)
    monkeypatch.setattr(probe.gpu_probe, "probe", tuple)
    monkeypatch.setattr(probe.measurements, "load_own", lambda: (None, "nothing was measured"))
    return monkeypatch


def test_a_machine_that_was_not_measured_is_modelled_and_says_so(own: pytest.MonkeyPatch) -> None:
    machine = probe.machine()
    assert machine.is_this_machine
    assert machine.gpus == ()
    assert (machine.cpu.threads, machine.cpu.fp32_gflop_per_s, machine.cpu.int8_gop_per_s) == (8, 8 * 96.0, 8 * 128.0)
    assert machine.ram == Ram(64 * GIB, 40 * GIB, 36.0)  # two channels of DDR4
    assert machine.nvme is not None
    assert machine.nvme.read_gb_per_s == hardware.DEFAULT_NVME_GB_PER_S
    assert {machine.cpu.basis, machine.ram.basis, machine.nvme.basis} == {"modelled"}
    assert any("nothing was measured" in note for note in machine.notes)


def test_what_a_processor_is_decides_its_modelled_rates(own: pytest.MonkeyPatch) -> None:
    own.setattr(
        probe.cpu_probe, "probe", lambda: _facts("avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16", 96, 2)
    )
    machine = probe.machine()
    assert machine.cpu.int8_gop_per_s == 96 * 576
    assert machine.ram.read_gb_per_s == 2 * 8 * 30  # two sockets of eight channels of DDR5
    own.setattr(probe.cpu_probe, "probe", lambda: _facts("sse2"))
    assert probe.machine().cpu.int8_gop_per_s is None


def test_a_limit_of_cpu_time_limits_the_threads(own: pytest.MonkeyPatch) -> None:
    own.setattr(probe.cgroups, "cpu_limit", lambda root: 2.5)
    assert probe.machine().cpu.threads == 2


def test_measurements_replace_the_model(own: pytest.MonkeyPatch) -> None:
    own.setattr(probe.measurements, "load_own", lambda: (_measured(), ""))
    machine = probe.machine()
    assert (machine.cpu.threads, machine.cpu.fp32_gflop_per_s, machine.cpu.int8_gop_per_s) == (6, 300.0, 900.0)
    assert machine.ram.read_gb_per_s == 70.5
    assert machine.nvme is not None
    assert (machine.nvme.read_gb_per_s, machine.nvme.path) == (3.5, "/")
    assert {machine.cpu.basis, machine.ram.basis, machine.nvme.basis} == {"measured"}
    assert machine.notes == ()


def test_a_disk_that_is_memory_is_no_disk_and_a_busy_machine_is_noted(own: pytest.MonkeyPatch) -> None:
    disk = DiskRates("/dev/shm", "tmpfs", False, GIB, {1: 9.0})
    own.setattr(probe.measurements, "load_own", lambda: (_measured(disk=disk, busy=True), ""))
    machine = probe.machine()
    assert machine.nvme is None
    assert any("too low" in note for note in machine.notes)


def test_the_system_keeps_its_part_of_a_whole_machine_but_not_of_a_control_group(own: pytest.MonkeyPatch) -> None:
    own.setattr(probe.memory, "available_bytes", lambda root: 63 * GIB)
    assert probe.machine().ram.available_bytes == 64 * GIB - int(64 * GIB * 0.06)
    limit = probe.cgroups.MemoryLimit(32 * GIB, GIB)
    own.setattr(probe.cgroups, "memory_limit", lambda root: limit)
    own.setattr(probe.memory, "available_bytes", lambda root: 31 * GIB)
    assert probe.machine().ram == Ram(32 * GIB, 31 * GIB, 36.0)


def test_describing_one_part_leaves_the_others_as_they_are_and_says_so(own: pytest.MonkeyPatch) -> None:
    machine = probe.machine("2xH100")
    assert not machine.is_this_machine
    assert [gpu.name for gpu in machine.gpus] == ["H100", "H100"]
    assert machine.ram.total_bytes == 64 * GIB
    assert any(note.endswith("as on this machine: CPU, memory") for note in machine.notes)
    assert machine.nvme is None  # another machine's disk is unknown
    assert probe.machine("2xH100", nvme="2TB@7").nvme == Nvme(2 * 10**12, 7.0)
    assert probe.machine("none").nvme is not None
    assert any(note.endswith("CPU, memory, disk") for note in probe.machine("none").notes)
    all_described = probe.machine("none", "128GiB@60", "none")
    assert all_described.ram.read_gb_per_s == 60
    assert all_described.nvme is None
    assert any(note.endswith("as on this machine: CPU") for note in all_described.notes)


def test_gpus_that_are_there(own: pytest.MonkeyPatch) -> None:
    cards = (
        gpu_probe.Gpu("NVIDIA", "NVIDIA GeForce RTX 4090", 24000 * MIB, 0, ""),
        gpu_probe.Gpu("NVIDIA", "NVIDIA RTX 9999", 32 * GIB, 0, ""),
        gpu_probe.Gpu("NVIDIA", "NVIDIA Mystery", 0, 0, ""),
    )
    own.setattr(probe.gpu_probe, "probe", lambda: cards)
    machine = probe.machine(link="pcie3x8")
    assert [(gpu.name, gpu.memory_bytes) for gpu in machine.gpus] == [
        ("RTX 4090", 24000 * MIB),
        ("NVIDIA RTX 9999", 32 * GIB),
    ]
    assert {gpu.link_gb_per_s for gpu in machine.gpus} == {gpus.link_gb_per_s(3, 8)}
    assert any("RTX 9999 is not in the table" in note for note in machine.notes)
    assert any("Mystery is left out" in note for note in machine.notes)


def test_memory_that_a_gpu_shares_with_the_host_is_counted_once(own: pytest.MonkeyPatch) -> None:
    machine = probe.machine("gb10", "119.7GiB")
    assert machine.gpus[0].is_unified
    assert machine.gpus[0].memory_bytes + machine.ram.available_bytes <= gpus.find("gb10").memory_bytes
    assert machine.ram.available_bytes == 4 * GIB


def test_limits_of_this_machine_cannot_exceed_it(own: pytest.MonkeyPatch) -> None:
    own.setattr(
        probe.gpu_probe, "probe", lambda: (gpu_probe.Gpu("NVIDIA", "NVIDIA GeForce RTX 4090", 24000 * MIB, 0, ""),)
    )
    limited = probe.machine("1x4090", "16GiB@500", "1GB", limits_of_this_machine=True)
    assert limited.is_this_machine
    assert limited.gpus[0].memory_bytes == 24000 * MIB
    assert limited.ram == Ram(16 * GIB, 16 * GIB, 36.0)  # its own rate, whatever was said
    assert limited.nvme is not None
    assert limited.nvme.capacity_bytes == 10**9
    assert probe.machine("none", limits_of_this_machine=True).gpus == ()
    for words in ({"gpus": "2x4090"}, {"gpus": "H100"}, {"ram": "65GiB"}):
        with pytest.raises(ConfigError, match="more than"):
            probe.machine(**words, limits_of_this_machine=True)  # type: ignore[arg-type]
    assert probe.machine(ram="128GiB").ram.total_bytes == 128 * GIB  # a description may


def test_probing_needs_no_torch() -> None:
    code = "import sys, glmlocal.planner.probe; print([m for m in ('torch', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rates_of_kernels_are_taken_unless_others_run_and_a_new_build_is_said(own: pytest.MonkeyPatch) -> None:
    rates = KernelRates("b" * 16, {"bf16 fp32": ProductRate((1,), (1e9,))}, {}, {}, {"int8": 1e-5, "fp32": 1e-5}, 1e-3)
    own.setattr(probe.measurements, "load_own", lambda: (_measured(kernels=rates), ""))
    own.setattr(probe, "build_id", lambda: "b" * 16)
    own.delenv("GLMLOCAL_CPU_ISA", raising=False)
    machine = probe.machine()
    assert machine.cpu.kernels == rates
    assert not any("kernels" in note for note in machine.notes)
    own.setattr(probe, "build_id", lambda: "c" * 16)
    assert any("built anew" in note for note in probe.machine().notes)
    assert probe.machine().cpu.kernels == rates
    own.setenv("GLMLOCAL_CPU_ISA", "avx2")
    assert probe.machine().cpu.kernels is None
    assert any("measured as avx512" in note for note in probe.machine().notes)


def test_kernels_that_were_measured_over_other_memory_say_nothing_of_the_described_one(own: pytest.MonkeyPatch) -> None:
    """After doctor on a slow machine ``--ram 96GiB@60`` was forecast as slow as that machine's own memory."""
    rates = KernelRates("none", {}, {}, {}, {}, 1.0)
    own.setattr(probe.measurements, "load_own", lambda: (_measured(kernels=rates), ""))
    assert probe.machine(ram="96GiB@60").cpu.kernels is None
    assert probe.machine(gpus="1xRTX4090").cpu.kernels == rates  # its memory is this machine's
    assert probe.machine(ram="8GiB", limits_of_this_machine=True).cpu.kernels == rates
