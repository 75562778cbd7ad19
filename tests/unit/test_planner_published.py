"""Forecasts for machines that nobody here has, against what other engines' users published for them.

Not our kernels: a forecast that leaves these numbers outside its range needs a reason. docs/design/003 has the table.
"""

from __future__ import annotations

from functools import partial

import pytest

from glmlocal import catalogue
from glmlocal.models.footprints import of_release
from glmlocal.planner.efficiency import DEFAULT
from glmlocal.planner.forecast import PlacedModel
from glmlocal.planner.hardware import parse_gpus, parse_nvme, parse_ram
from glmlocal.planner.machine import Cpu, Machine
from glmlocal.planner.plan import Rate, Wants
from glmlocal.planner.solve import plan

ZEN4 = (144.0, 576.0)  # per core, as planner.probe models AVX-512


ZEN5 = (267.0, 1048.0)  # measured
AVX2 = (96.0, 128.0)


def placed(
    name: str,
    context: int,
    *,
    gpus: str = "none",
    ram: str = "64GiB@60",
    nvme: str = "none",
    cores: int = 16,
    each: tuple[float, float] = ZEN4,
) -> PlacedModel:
    fp32, int8 = each
    cpu = Cpu("that many", cores, cores * fp32, cores * int8)
    machine = Machine(parse_gpus(gpus), cpu, parse_ram(ram), parse_nvme(nvme))
    release = catalogue.find(name)
    assert isinstance(release, catalogue.Release)
    footprint = of_release(release)
    found = plan(footprint, machine, Wants(context=context, batch=1, draft=0), with_advice=False)
    assert found.placement is not None
    return PlacedModel(footprint, found.placement, machine, found.resolved, DEFAULT)


def decode(model: PlacedModel, context: int) -> Rate:
    return model.rate(partial(model.decode, context=context))


@pytest.mark.parametrize(("context", "published"), [(0, 49.61), (8192, 42.79), (32768, 30.46), (61440, 22.82)])
def test_air_on_two_a6000(context: int, published: float) -> None:
    """llama.cpp CUDA, Q4_0, layers split over both: ik_llama.cpp PR 700, averages over 1,024 tokens."""
    rate = decode(placed("GLM-4.5-Air-GGUF:Q4_0", 65536, gpus="2xA6000"), context + 512)
    assert rate.low < published < rate.high
    assert published / rate.value == pytest.approx(1, abs=0.15)


def test_a_prompt_of_air_on_two_a6000() -> None:
    model = placed("GLM-4.5-Air-GGUF:Q4_0", 65536, gpus="2xA6000")
    rate = model.rate(partial(model.prefill, tokens=4096), 4096)
    assert rate.low < 1349.21 < rate.high


def test_air_on_a_7950x() -> None:
    """ik_llama.cpp, IQ2, CPU only: 9 tok/s and 141 of a prompt."""
    model = placed("GLM-4.5-Air-GGUF:Q2_K", 8192)
    rate, prompt = decode(model, 0), model.rate(partial(model.prefill, tokens=512), 512)
    assert rate.low < 9 < rate.high
    assert prompt.low < 141 < prompt.high


def test_glm_5_2_from_a_slow_disk() -> None:
    """colibri, 25 GB of RAM: 0.05 to 0.1 tok/s, from drives of which it is not said how fast they are."""
    rates = [decode(placed("GLM-5.2-MLX-4bit", 4096, ram="25GiB@60", nvme=f"1TB@{speed}"), 0) for speed in (0.9, 1.5)]
    assert rates[0].low < 0.05 < rates[0].high
    assert rates[1].low < 0.1 < rates[1].high
    assert all(rate.bound_by == "nvme" for rate in rates)


def test_air_on_four_3090_is_promised_more_than_exllamav3_reached() -> None:
    """29 tok/s, 4 bits per weight; "not optimized for Ampere", says another user. We promise about three times it."""
    rate = decode(placed("GLM-4.5-Air-MLX-4bit", 8192, gpus="4xRTX3090"), 0)
    assert rate.low > 29
    assert rate.high < 3.3 * 29


@pytest.mark.parametrize(
    ("context", "published"), [(512, 50.35), (4608, 46.77), (8704, 43.46), (12800, 40.46), (16896, 38.03)]
)
def test_air_on_two_a6000_with_ik_llama(context: int, published: float) -> None:
    """ik_llama.cpp PR 700, CUDA graphs and its path for 12 query heads per key: averages over 1,024 tokens."""
    rate = decode(placed("GLM-4.5-Air-GGUF:Q4_0", 20480, gpus="2xA6000"), context)
    assert rate.low < published < rate.high
    assert published / rate.value == pytest.approx(1, abs=0.1)


def test_glm_4_7_on_a_9950x_with_a_5090() -> None:
    """postl.ai, llama.cpp, Q4_0, 256 GB of DDR5-6000 (read at 75 GB/s, assumed): 6.17 tok/s, 619 of a prompt.

    The prompt is promised less than a third of it: a chunk of ours is 512 tokens, and each streams all experts anew.
    """
    model = placed("GLM-4.7-GGUF:Q4_0", 8192, gpus="1xRTX5090", ram="251GiB@75")
    rate, prompt = decode(model, 0), model.rate(partial(model.prefill, tokens=2048), 2048)
    assert rate.low < 6.17 < rate.high
    assert prompt.high < 619


def test_glm_4_7_on_eight_old_xeons() -> None:
    """postl.ai, ik_llama.cpp, Q8_0, eight Xeon E7-8880 v3 (assumed to read 350 GB/s together): 7.5 tok/s."""
    rate = decode(placed("GLM-4.7-GGUF:Q8_0", 8192, ram="900GiB@350"), 0)
    assert rate.low < 7.5 < rate.high


def test_glm_5_2_from_a_disk_that_was_measured() -> None:
    """colibri issue 486, Strix Halo with 124 GB, its CPU alone, a disk at 5.94 GB/s: 0.8 to 1.0 tok/s."""
    rate = decode(placed("GLM-5.2-MLX-4bit", 4096, ram="124GiB@100", nvme="1TB@5.94"), 0)
    assert rate.low < 0.8
    assert rate.high > 1.0
    assert rate.value == pytest.approx(0.9, rel=0.25)


@pytest.mark.parametrize(
    ("name", "gpus", "ram", "cores", "each", "published"),
    [
        ("GLM-4.5-Air-GGUF:Q3_K_M", "16GiB@512", "64GiB@75", 12, ZEN5, 11.8),
        ("GLM-4.5-Air-GGUF:Q4_K_S", "2xRTX3060", "96GiB@60", 12, ZEN4, 10.83),
        ("GLM-4.5-Air-GGUF:Q4_K_M", "32GiB@608", "64GiB@70", 24, AVX2, 14.36),
        ("GLM-5.1-GGUF:UD-Q4_K_XL", "1xRTXPRO6000", "768GiB@400", 16, ZEN5, 18.84),
        ("GLM-5.1-GGUF:UD-Q4_K_XL", "2xRTXPRO6000", "768GiB@400", 16, ZEN5, 21.75),
    ],
    ids=["RX 6800", "two RTX 3060", "Arc Pro B70", "EPYC 9175F", "EPYC 9175F and two GPUs"],
)
def test_whole_layers_in_ram_are_at_the_low_end(
    name: str, gpus: str, ram: str, cores: int, each: tuple[float, float], published: float
) -> None:
    """llama.cpp and ik_llama.cpp keep whole layers' experts in RAM; the expected rate is that of the most used ones on
    the GPU. Sources, as read in December 2026, RAM's rates assumed:

    mudkipdev/flake modules/models/README.md (Ryzen 9900X); reynardo-tjhin/localllm-commands README.md (Ryzen 7900,
    DDR5-5600, all experts in RAM); llin95/-Intel-Arc-Pro-B70-llama.cpp-SYCL-Setup README.md, 2026-07-09 (i9-14900K,
    DDR5-6000, SYCL); loftllc.dev/en/docs/tech/llm-research/glm-5-1-orchestrator-tg-optimization (DDR5-6400, 12
    channels, IQ3_KS with 3.65 bits where ours has 4.5; all experts in RAM, and 22 layers' on two GPUs).
    """
    rate = decode(placed(name, 8192, gpus=gpus, ram=ram, cores=cores, each=each), 0)
    assert rate.low < published < rate.value


@pytest.mark.parametrize(
    ("gpus", "context", "published"), [("1xDGXSpark", 0, 21.7), ("1xStrixHalo", 0, 21.04), ("1xStrixHalo", 0, 24.64)]
)
def test_air_in_memory_that_cpu_and_gpu_share(gpus: str, context: int, published: float) -> None:
    """llama.cpp, Q4_K_M and UD-Q4_K_XL (68 GiB both): gisenberg/local-model-eval, 2026-04-12, CUDA;
    kyuz0/amd-strix-halo-toolboxes benchmark/results, builds 6736 with ROCm 6.4.4 and 6486 with Vulkan (RADV)."""
    rate = decode(placed("GLM-4.5-Air-GGUF:Q4_K_M", 16384, gpus=gpus, ram="128GiB@100"), context)
    assert rate.low < published < rate.high


@pytest.mark.parametrize("published", [3257.0, 3792.66, 3926.86])
def test_a_prompt_of_air_on_an_rtx_pro_6000(published: float) -> None:
    """Air Q5_K_S, 4,096 tokens in pieces of 1,024, 2,048 and 4,096: llama.cpp of 2025-08-26, in ik_llama.cpp PR 728."""
    model = placed("GLM-4.5-Air-GGUF:Q5_K_M", 8192, gpus="1xRTXPRO6000")
    rate = model.rate(partial(model.prefill, tokens=4096), 4096)
    assert rate.low < published < rate.high
    assert published / rate.value == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("ram", "nvme", "each", "published"),
    [("64GiB@75", "2TB@10.68", ZEN5, 1.1), ("64GiB@45", "2TB@6", AVX2, 0.77), ("88GiB@60", "2TB@6", ZEN4, 0.62)],
    ids=["9950X3D", "5950X", "7945HX"],
)
def test_glm_5_2_from_three_more_disks(ram: str, nvme: str, each: tuple[float, float], published: float) -> None:
    """colibri issues 280 (2026-07-15; 1.04 to 1.25, disk as measured), 680 (2026-07-28; a 990 PRO) and 102 (2026-07-12;
    an SN850X under WSL2): int4, of which the CPU does nearly all. RAM, and the disks of the last two, are assumed."""
    rate = decode(placed("GLM-5.2-MLX-4bit", 4096, ram=ram, nvme=nvme, each=each), 0)
    assert rate.low < published < rate.high
    assert rate.bound_by == "nvme"


def test_glm_5_1_on_a_threadripper() -> None:
    """5.8 tok/s without GPU and MTP: Ryzen 3995WX, smol-IQ2_KS, ik_llama.cpp PR 1890, 2026-05-27. Eight channels of
    DDR4-3200 are assumed to read 140 GB/s; our nearest has twice the bits, so the range has to reach it from below."""
    rate = decode(placed("GLM-5.1-GGUF:UD-Q4_K_XL", 4096, ram="512GiB@140", cores=64, each=AVX2), 0)
    assert rate.value < 5.8 < rate.high


@pytest.mark.parametrize(
    ("name", "gpus", "ram", "cores", "each", "published"),
    [
        ("GLM-4.5-Air-GGUF:Q4_K_S", "2xRTX3060", "96GiB@60", 12, ZEN4, 98.54),
        ("GLM-4.5-Air-GGUF:Q4_K_M", "32GiB@608", "64GiB@70", 24, AVX2, 85.37),
    ],
    ids=["two RTX 3060", "Arc Pro B70"],
)
def test_short_prompts_beside_ram_are_promised_more_than_llama_cpp_reached(
    name: str, gpus: str, ram: str, cores: int, each: tuple[float, float], published: float
) -> None:
    """512 tokens, sources as above: llama.cpp computes so few of an expert on the CPU, ours are to be streamed."""
    model = placed(name, 8192, gpus=gpus, ram=ram, cores=cores, each=each)
    rate = model.rate(partial(model.prefill, tokens=512), 512)
    assert published < rate.low < 2.5 * published


def test_tensor_parallelism_is_faster_than_layers_in_turn() -> None:
    """GLM-4.6-FP8 on eight H100, SGLang with TP 8: 70 tok/s (zai-org/GLM-4.5 issue 113); `--engine` is for that."""
    rate = decode(placed("GLM-4.6-FP8", 8192, gpus="8xH100", ram="512GiB@200"), 0)
    assert 0.85 * 70 < rate.high < 70
