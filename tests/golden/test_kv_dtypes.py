"""Narrow KV caches through the whole engine: how far logits go from those over an fp32 cache, and which one auto is.

Tolerances are of the logit range; measured on a tiny model without routers, whose choices a rounding can turn over, on
avx2 (fp32 products) and avx512 (bf16 products) alike: bf16 1.4e-3 and 1.9e-3, int8 3.4e-3 and 3.6e-3, fp8 1.5e-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
import tiny_gguf
from glmlocal import LLM
from glmlocal.demo.cache import cached_demo
from glmlocal.engine.planning import plan_here
from glmlocal.errors import ConfigError, PlanError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.models import precision
from glmlocal.models.config import KV_DTYPES
from glmlocal.paths import demo_dir
from glmlocal.planner.plan import Wants
from loading import load_engine
from test_logits_glm4_moe import TOKENS, load, relative_error

TOLERANCE = {"bf16": 4e-3, "int8": 8e-3, "fp8": 5e-2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build_model(first_k_dense_replace=3, num_hidden_layers=3, use_qk_norm=True)
    return tiny.save(model, tmp_path_factory.mktemp("dense"))


@pytest.fixture(params=["", "avx2"])
def any_products(request: pytest.FixtureRequest) -> Iterator[None]:
    """The machine's best instruction set, then one that multiplies in fp32 whatever the cache is."""
    if not request.param or not cpu.available:
        yield
        return
    from glmlocal.kernels.cpu import _cpu

    before = _cpu.isa()
    if request.param not in _cpu.available_isas():
        pytest.skip(f"no {request.param} here")
    _cpu.set_isa(request.param)
    yield
    _cpu.set_isa(before)


@pytest.mark.usefixtures("any_products")
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_logits_stay_near_those_over_an_fp32_cache(kv_dtype: str, dense: Path) -> None:
    error = relative_error(load(dense, kv_dtype=kv_dtype).logits(TOKENS), load(dense, kv_dtype="fp32").logits(TOKENS))
    assert TOLERANCE[kv_dtype] / 30 < error < TOLERANCE[kv_dtype]


@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_one_prefill_is_chunks_is_token_by_token(kv_dtype: str, tmp_path: Path) -> None:
    engine = load(tiny.save(tiny.build_model(), tmp_path), kv_dtype=kv_dtype)
    whole = engine.logits(TOKENS)
    for chunk_size in (1, 7, 64):
        engine.scheduler.max_num_batched_tokens = chunk_size
        if cpu.available:
            assert torch.equal(engine.logits(TOKENS), whole)
        else:
            assert relative_error(engine.logits(TOKENS), whole) < TOLERANCE[kv_dtype]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_cache_takes_the_bytes_that_are_planned(kv_dtype: str, dense: Path) -> None:
    engine = load(dense, kv_dtype=kv_dtype, context=64, max_batch=1)
    cache, config = engine.runner.kv_cache, engine.runner.model.config
    assert cache.nbytes == 64 * config.kv_bytes_per_token(kv_dtype)


def kv_dtype_of(path: Path, **options: str) -> torch.dtype:
    return load_engine(open_checkpoint(path), context=64, **options).runner.kv_cache.keys[0].dtype  # type: ignore[arg-type]


def test_auto_follows_the_checkpoint(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tiny.save(tiny.build_model().to(torch.bfloat16), tmp_path / "small")
    assert kv_dtype_of(half) is torch.float32  # small: as exact as it goes
    monkeypatch.setattr(precision, "EXACT_BELOW_BYTES", 1000)
    assert kv_dtype_of(dense) is torch.float32
    assert kv_dtype_of(dense, kv_dtype="int8") is torch.int8
    for dtype in (torch.bfloat16, torch.float16):
        directory = tiny.save(tiny.build_model().to(dtype), tmp_path / str(dtype))
        assert kv_dtype_of(directory) is torch.bfloat16
        assert kv_dtype_of(directory, kv_dtype="fp32") is torch.float32
    for quant, expected in (("Q8_0", torch.bfloat16), ("F32", torch.float32)):
        tiny_gguf.convert(dense, tmp_path / f"{quant}.gguf", quant)
        assert kv_dtype_of(tmp_path / f"{quant}.gguf") is expected


def test_a_dtype_that_there_is_not_is_refused(dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-dtype is 'fp16', wanted auto, fp32, bf16, fp8, int8"):
        LLM(dense, kv_dtype="fp16")


def test_a_context_that_only_a_narrower_cache_holds_is_refused_with_its_name(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(dense)
    used = plan_here(checkpoint, "keep", Wants(context=512, kv_dtype="bf16")).devices[0].used_bytes
    monkeypatch.setattr("glmlocal.memory.available_bytes", lambda root=None: used)
    with pytest.raises(PlanError, match=r"would fit: .*--kv-dtype bf16"):
        load(dense, context=512)
    assert load(dense, context=512, kv_dtype="bf16").scheduler.context == 512
    monkeypatch.setattr("glmlocal.memory.available_bytes", lambda root=None: used - 1)
    with pytest.raises(PlanError, match=r"would fit: .*--kv-dtype int8"):
        load(dense, context=512)


def test_greedy_text_of_the_demo_over_a_bf16_cache_is_that_over_fp32_until_a_near_tie() -> None:
    if cached_demo(demo_dir()) is None:
        pytest.skip("the demo model is not in the cache; `glmlocal show demo` fetches it")
    prompts = ("The history of the lighthouse began", "def fibonacci(n):")
    texts, logits = {}, {}
    for kv_dtype in ("fp32", "auto"):
        with LLM("demo", context=256, kv_dtype=kv_dtype) as llm:
            prompt_ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
            texts[kv_dtype] = [
                llm.generate(ids, temperature=0, max_tokens=64, ignore_eos=True).token_ids for ids in prompt_ids
            ]
            logits[kv_dtype] = [llm.logits([*ids, *text]) for ids, text in zip(prompt_ids, texts["fp32"], strict=True)]
    assert relative_error(logits["auto"][0], logits["fp32"][0]) < 8e-3  # measured: 2.5e-3
    for ids, exact, row, narrow in zip(prompt_ids, texts["fp32"], logits["fp32"], texts["auto"], strict=True):
        different = [i for i, (a, b) in enumerate(zip(exact, narrow, strict=True)) if a != b]
        if different:  # measured: none in the first text, and at token 53 of the second, with a gap of 0.015 of 43
            first = different[0]
            choice = row[len(ids) + first - 1]
            gap = choice[exact[first]] - choice[narrow[first]]
            assert gap < 2e-3 * (choice.max() - choice.min())
