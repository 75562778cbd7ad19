"""Our logits against transformers' Glm4MoeForCausalLM, over a table of configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeForCausalLM

import tiny
from glmlocal.engine.engine import Engine
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from loading import load_engine

TOKENS = torch.randint(0, 384, (70,), generator=torch.Generator().manual_seed(3)).tolist()
TOLERANCE = 1e-4  # of the logit range, fp32


def load(directory: Path, **options: Any) -> Engine:
    return load_engine(open_checkpoint(directory), **options)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / (want.max() - want.min()))


@torch.no_grad()
def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint on disk and what transformers computes from it."""
    model = tiny.build_model(**tiny.CONFIGS[request.param])
    directory = tiny.save(model, tmp_path_factory.mktemp(request.param), max_shard_size="60KB")
    return directory, reference_logits(model, TOKENS)


def test_logits_equal_transformers(pair: tuple[Path, torch.Tensor]) -> None:
    directory, want = pair
    got = load(directory).logits(TOKENS)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < TOLERANCE


def test_one_prefill_is_chunks_is_token_by_token(pair: tuple[Path, torch.Tensor]) -> None:
    directory, want = pair
    engine = load(directory)
    whole = engine.logits(TOKENS)
    for chunk_size in (1, 7, 64):
        engine.scheduler.max_num_batched_tokens = chunk_size
        logits = engine.logits(TOKENS)
        assert relative_error(logits, want) < TOLERANCE
        if cpu.available and engine.runner.model.config.head_dim % 8 == 0:  # the native kernels promise the same bits
            assert torch.equal(logits, whole)


def greedy(engine: Engine, prompts: dict[str, list[int]], num_tokens: int = 12) -> dict[str, list[int]]:
    for name, prompt in prompts.items():
        engine.add(Request(name, tuple(prompt), SamplingParams(temperature=0, max_tokens=num_tokens)))
    generated: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            generated[output.request_id] += output.token_ids
        engine.scheduler.check_integrity()
    return generated


@torch.no_grad()
def reference_greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int = 12) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", ["air", "glm45", "four_groups"])
def test_several_requests_in_one_batch_write_what_each_writes_alone(config: str, tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS[config])
    engine = load(tiny.save(model, tmp_path), max_batch=3, context=128)
    engine.scheduler.max_num_batched_tokens = 16  # chunked prefill beside decode
    prompts = {"a": TOKENS[:5], "b": TOKENS[5:50], "c": TOKENS[50:51], "d": TOKENS[:40]}
    assert greedy(engine, prompts) == {name: reference_greedy(model, prompt) for name, prompt in prompts.items()}


def test_preemption_does_not_change_the_text(tmp_path: Path) -> None:
    model = tiny.build_model()
    directory = tiny.save(model, tmp_path)
    engine = load(directory, max_batch=1, context=64)  # two blocks of 32 in all
    engine.scheduler.max_batch = 2
    prompts = {"old": TOKENS[:20], "young": TOKENS[20:45]}
    generated = greedy(engine, prompts, 30)
    assert generated == {name: reference_greedy(model, prompt, 30) for name, prompt in prompts.items()}


PARAMETERS = [
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.1.self_attn.v_proj.bias",
    "model.layers.2.self_attn.q_norm.weight",
    "model.layers.2.self_attn.k_norm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.2.mlp.gate.weight",
    "model.layers.2.mlp.gate.e_score_correction_bias",
    "model.layers.2.mlp.shared_experts.down_proj.weight",
    "model.layers.2.mlp.experts.3.down_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_matters(name: str, tmp_path: Path) -> None:
    """Without its bias, norm or correction bias a checkpoint must give other logits: nothing is ignored."""
    model = tiny.build_model(**tiny.CONFIGS["glm45"])
    directory = tiny.save(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    neutral = torch.ones_like if re.search(r"norm", name) else torch.zeros_like
    assert not torch.equal(tensors[name], neutral(tensors[name]))
    tensors[name] = neutral(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(load(directory).logits(TOKENS), reference_logits(model, TOKENS)) > 10 * TOLERANCE


def test_bf16_and_f16_weights_are_widened_exactly(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        directory = tiny.save(tiny.build_model().to(dtype), tmp_path / str(dtype))
        stored = Glm4MoeForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )  # the stored values, computed in fp32
        want = reference_logits(stored.eval(), TOKENS)
        assert relative_error(load(directory, kv_dtype="fp32").logits(TOKENS), want) < TOLERANCE


def test_the_mtp_layer_is_loaded_for_drafts_only_and_changes_nothing_yet(tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS["glm45"])
    plain, engine = load(tiny.save(model, tmp_path, mtp=True)), load(tmp_path, draft=1)
    assert plain.runner.model.mtp == ()
    assert torch.equal(plain.logits(TOKENS), engine.logits(TOKENS))
    (mtp,) = engine.runner.model.mtp
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(mtp.enorm.weight, tensors["model.layers.4.enorm.weight"])
    assert mtp.eh_proj.weight.shape == (64, 128)
    assert mtp.embed_tokens is not None
    assert mtp.head is not None
    assert relative_error(engine.logits(TOKENS), reference_logits(model, TOKENS)) < TOLERANCE
