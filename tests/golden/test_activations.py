"""int8 activations through the whole engine: how far logits go from exact ones, and which of the two auto is.

Tolerances are of the logit range, on a tiny model without routers, whose choices a rounding can turn over; 64 features
average fewer errors than thousands do. Measured: 8.1e-3 (Q5_1) to 1.07e-2 (Q8_0).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
import tiny_gguf
from glmlocal import LLM
from glmlocal.errors import ConfigError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.models import precision
from loading import load_engine
from test_logits_glm4_moe import TOKENS, load, relative_error

TOLERANCE = 3e-2


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build_model(first_k_dense_replace=3, num_hidden_layers=3, use_qk_norm=True)
    return tiny.save(model, tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_logits_stay_near_those_of_exact_activations(quant: str, dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tiny_gguf.convert(dense, path, quant)
    rounded, exact = (load(path, activations=kind).logits(TOKENS) for kind in ("int8", "fp32"))
    assert TOLERANCE / 30 < relative_error(rounded, exact) < TOLERANCE


def test_one_prefill_is_chunks_is_token_by_token(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path)
    engine = load(directory, quant="int4", activations="int8")
    whole = engine.logits(TOKENS)
    for chunk_size in (1, 3, 7, 64):
        engine.scheduler.max_num_batched_tokens = chunk_size
        if cpu.available:
            assert torch.equal(engine.logits(TOKENS), whole)
        else:
            assert relative_error(engine.logits(TOKENS), whole) < TOLERANCE


def int8_runs(path: Path, **options: str) -> bool:
    return load_engine(open_checkpoint(path), context=64, **options).runner.model.lm_head.weight.int8_activations  # type: ignore[arg-type]


def test_auto_is_exact_for_small_models(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    tiny_gguf.convert(dense, path, "Q8_0")
    assert not int8_runs(path)
    assert int8_runs(path, activations="int8")
    monkeypatch.setattr(precision, "EXACT_BELOW_BYTES", 1000)
    assert int8_runs(path)
    assert not int8_runs(path, activations="fp32")
    assert not int8_runs(dense)  # nothing to multiply as integers


def test_another_wish_is_refused(dense: Path) -> None:
    with pytest.raises(ConfigError, match="--activations is 'bf16', wanted auto, int8, fp32"):
        LLM(dense, activations="bf16")
