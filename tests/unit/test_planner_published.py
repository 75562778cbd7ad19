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


def placed(name: str, context: int, *, gpus: str = "none", ram: str = "64GiB@60", nvme: str = "none") -> PlacedModel:
    fp32, int8 = ZEN4
    cpu = Cpu("16 cores of Zen 4", 16, 16 * fp32, 16 * int8)
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
    assert rate.high < 3.1 * 29


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


def test_a_small_gpu_is_promised_more_than_llama_cpp_reached_without_a_cache_of_experts() -> None:
    """11.8 tok/s: Air Q3_K_M, Ryzen 9900X, 64 GB of DDR5-6000, RX 6800 (mudkipdev/flake). There whole layers' experts
    stay in RAM; here the most used ones are to be on the GPU, which this version does not run yet."""
    rate = decode(placed("GLM-4.5-Air-GGUF:Q3_K_M", 8192, gpus="16GiB@512", ram="64GiB@75"), 0)
    assert 11.8 < rate.low < 1.5 * 11.8


def test_tensor_parallelism_is_faster_than_layers_in_turn() -> None:
    """GLM-4.6-FP8 on eight H100, SGLang with TP 8: 70 tok/s (zai-org/GLM-4.5 issue 113); `--engine` is for that."""
    rate = decode(placed("GLM-4.6-FP8", 8192, gpus="8xH100", ram="512GiB@200"), 0)
    assert 0.85 * 70 < rate.high < 70
