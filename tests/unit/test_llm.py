from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from glmlocal import LLM
from glmlocal.errors import CheckpointError, ConfigError, PlanError, RequestError
from glmlocal.formats.index import open_checkpoint
from glmlocal.models.footprints import of_checkpoint
from glmlocal.planner.gpus import find
from glmlocal.planner.plan import Wants
from glmlocal.planner.plan_json import as_json, from_json
from glmlocal.planner.solve import plan

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(**tiny.CONFIGS["glm45"]), tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, context=256) as model:
        yield model


def test_a_stream_joins_to_the_answer_that_is_not_streamed(llm: LLM) -> None:
    whole = llm.chat(MESSAGES, enable_thinking=False, **GREEDY)
    deltas = list(llm.chat(MESSAGES, enable_thinking=False, stream=True, **GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert len(whole.token_ids) == 24
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("length", 24)
    assert [delta.completion for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].completion is not None


def test_thinking_is_split_off_and_counted(llm: LLM) -> None:
    end_think = llm.tokenizer.token_to_id("</think>")
    prompt_tokens = llm.chat(MESSAGES, **GREEDY).usage.prompt_tokens
    answer = llm.chat(MESSAGES, **GREEDY)
    assert (answer.text, answer.usage.reasoning_tokens) == ("", 24)  # it never closes its thinking
    assert answer.reasoning
    closed = llm.chat(MESSAGES, logit_bias={end_think: 1e9}, **{**GREEDY, "max_tokens": 3})
    assert closed.token_ids == (end_think,) * 3
    assert (closed.text, closed.reasoning, closed.usage.reasoning_tokens) == ("", "", 1)
    silent = llm.chat(MESSAGES, enable_thinking=False, **GREEDY)
    assert (silent.reasoning, silent.usage.reasoning_tokens) == ("", 0)
    assert silent.usage.prompt_tokens > prompt_tokens  # "\n<think></think>" closes the prompt


def test_stop_strings_end_the_answer_before_them(llm: LLM) -> None:
    whole = llm.generate("fox", **GREEDY).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = llm.generate("fox", stop=[stop], **GREEDY)
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 24


def test_a_stop_token_ends_the_answer_and_is_not_text(llm: LLM) -> None:
    tokens = llm.generate("fox", **GREEDY).token_ids
    stop = tokens[5]
    cut = llm.generate("fox", stop_token_ids=[stop], **GREEDY)
    assert cut.token_ids == tokens[: tokens.index(stop) + 1]
    assert cut.finish_reason == "stop"
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1], skip_special_tokens=True)


def test_interleaved_streams_do_not_disturb_each_other(llm: LLM) -> None:
    prompts = ["fox", "the lazy dog jumps", "q"]
    alone = [llm.generate(prompt, **GREEDY).token_ids for prompt in prompts]
    streams = [llm.generate(prompt, stream=True, **GREEDY) for prompt in prompts]
    together: list[list[int]] = [[] for _ in prompts]
    for deltas in zip(*streams, strict=False):
        for tokens, delta in zip(together, deltas, strict=True):
            tokens += delta.token_ids
    for tokens, stream in zip(together, streams, strict=True):
        tokens += [token for delta in stream for token in delta.token_ids]
    assert [tuple(tokens) for tokens in together] == alone


def test_threads_share_the_model(llm: LLM) -> None:
    alone = llm.generate("fox", **GREEDY).token_ids
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(llm.generate("fox", **GREEDY).token_ids)) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    pool = llm._engine.scheduler.block_pool
    stream = llm.generate("fox", stream=True, **GREEDY)
    next(stream)
    assert pool.num_free_blocks < pool.num_blocks
    stream.close()
    assert pool.num_free_blocks == pool.num_blocks
    assert not llm._engine.has_work


def test_a_stream_that_is_never_read_costs_nothing(llm: LLM) -> None:
    llm.generate("fox", stream=True, **GREEDY)
    assert not llm._engine.has_work


def test_prefill_progress_is_reported_for_long_prompts(llm: LLM) -> None:
    llm._engine.scheduler.max_num_batched_tokens = 16
    try:
        deltas = list(llm.generate([7] * 50, stream=True, temperature=0, max_tokens=1))
    finally:
        llm._engine.scheduler.max_num_batched_tokens = 512
    assert [delta.prefill_progress for delta in deltas] == [0.32, 0.64, 0.96, None]


def test_the_next_turn_of_a_chat_is_not_computed_again(llm: LLM) -> None:
    tokens = [(7 * i) % 380 for i in range(110)]
    answer = llm.generate(tokens, **GREEDY)
    turn = [*tokens, *answer.token_ids, 5, 6, 7]
    before = llm.engine.rates.num_prefilled_tokens
    again = llm.generate(turn, **GREEDY)
    assert llm.engine.rates.num_prefilled_tokens - before == len(turn) - 128  # the answer too
    with LLM(llm.model_name, context=256) as fresh:
        assert fresh.generate(turn, **GREEDY).token_ids == again.token_ids


def test_the_queues_of_requests_never_import_torch() -> None:
    modules = ", ".join(f"glmlocal.engine.{name}" for name in ("request", "scheduler", "stats", "grammar", "kv_files"))
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeded_sampling_repeats_and_seeds_differ(llm: LLM) -> None:
    options = {"temperature": 1.5, "max_tokens": 20, "ignore_eos": True}
    first, again, other = (llm.generate("fox", seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert first == again != other


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    answer = llm.generate("fox", logprobs=3, **GREEDY)
    assert answer.logprobs is not None
    tokens = llm.tokenizer.encode("fox")
    logits = llm.logits([*tokens, *answer.token_ids])[len(tokens) - 1 : -1].log_softmax(-1)
    for token, entry, row in zip(answer.token_ids, answer.logprobs, logits, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert len(entry.top) == 3
    assert llm.generate("fox", **GREEDY).logprobs is None


def test_logits_are_float32_per_token(llm: LLM) -> None:
    logits = llm.logits([5, 6, 7])
    assert (logits.shape, logits.dtype) == ((3, 384), torch.float32)
    assert torch.equal(llm.logits([5, 6])[1], logits[1]) or torch.allclose(llm.logits([5, 6])[1], logits[1], atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "0 tokens"),
        ([384], "token 0 is 384"),
        ([1, -1], "token 1 is -1"),
        ([0] * 300, "300 tokens"),
        ([1.5], "1.5"),
    ],
)
def test_logits_refuse_what_they_cannot_score(llm: LLM, tokens: list[int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.logits(tokens)


def test_bad_requests_are_refused_by_the_call(llm: LLM) -> None:
    with pytest.raises(RequestError, match="context holds 256"):
        llm.generate([5] * 256, stream=True)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("", stream=True)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llm.generate("fox", max_tokens=0)
    with pytest.raises(RequestError, match="unknown sampling parameter temprature"):
        llm.generate("fox", temprature=1)
    with pytest.raises(RequestError):
        llm.chat([{"role": "wizard", "content": "hi"}])


def test_the_context_bounds_the_answer(llm: LLM) -> None:
    answer = llm.generate([5] * 250, temperature=0, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")


def test_generation_config_gives_the_defaults(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7, "eos_token_id": [9]}')
    with LLM(tmp_path) as model:
        assert (model.default_sampling().temperature, model.default_sampling().top_k) == (0.25, 7)
        assert model.default_sampling(temperature=0.0).temperature == 0
        assert model.context == 512  # the model's limit


def test_a_base_model_has_no_chat(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with LLM(tmp_path, context=64) as model:
        assert model.chat_template is None
        assert model.generate("fox", temperature=0, max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        with pytest.raises(RequestError, match="base model"):
            model.chat(MESSAGES)


@pytest.mark.parametrize("context", [0, -1, 513, 10**12])
def test_a_context_beyond_the_model_is_refused(directory: Path, context: int) -> None:
    with pytest.raises(ConfigError, match="512"):
        LLM(directory, context=context)


def test_memory_that_is_not_there_is_a_plan_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(directory, context=512) as llm:
        used = llm.plan.devices[0].used_bytes
    monkeypatch.setattr("glmlocal.memory.available_bytes", lambda root=None: used - 100_000)
    with pytest.raises(PlanError, match=r"97.66 KiB are missing; would fit: --context \d+ .*--batch 4"):
        LLM(directory, context=512)
    LLM(directory, context=256).close()
    LLM(directory, context=512, max_batch=4).close()
    monkeypatch.setattr("glmlocal.memory.available_bytes", lambda root=None: 1000)
    with pytest.raises(PlanError, match="does not fit"):
        LLM(directory)


def test_a_saved_plan_is_executed_as_it_stands(directory: Path) -> None:
    with LLM(directory, context=96, kv_dtype="bf16", max_batch=2, quant="int8") as llm:
        saved = from_json(json.dumps(as_json(llm.plan)))
        answer = llm.generate("fox", **GREEDY)
    with LLM(directory, plan=saved) as llm:
        assert llm.plan == saved
        assert llm.context == 96
        assert llm.engine.scheduler.max_batch == 2
        assert llm.engine.runner.kv_cache.keys[0].dtype == torch.bfloat16
        assert llm.engine.runner.model.layers[2].experts.weights.up[0].kind == "int8"
        assert llm.generate("fox", **GREEDY).token_ids == answer.token_ids
    with pytest.raises(PlanError, match="has layers on GPUs, but this version runs models in RAM and from NVMe"):
        LLM(
            directory,
            plan=plan(
                of_checkpoint(open_checkpoint(directory)),
                replace(saved.machine, gpus=(find("H100"),)),
                Wants(context=96),
            ),
        )


def test_auto_quantizes_where_it_has_to(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(directory, context=64, quant="int4") as llm:
        used = llm.plan.devices[0].used_bytes
    monkeypatch.setattr("glmlocal.memory.available_bytes", lambda root=None: used)
    with LLM(directory, context=64, quant="auto") as llm:
        assert llm.plan.resolved.quant == llm.plan.quant == "int4"
        assert llm.engine.runner.model.layers[2].experts.weights.up[0].kind == "int4"


def test_a_limit_of_memory_is_planned_with(directory: Path) -> None:
    with pytest.raises(PlanError, match="does not fit"):
        LLM(directory, ram="200MiB")
    with pytest.raises(ConfigError, match="--ram '100TiB' is more than"):
        LLM(directory, ram="100TiB")


def test_importing_the_package_leaves_torch_unloaded() -> None:
    code = "import glmlocal, sys; glmlocal.SamplingParams; import glmlocal.cli.main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_checkpoint_without_a_tokenizer_works_with_token_ids(directory: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(directory / file)
    with LLM(tmp_path, context=64) as model, LLM(directory, context=64) as whole:
        assert torch.equal(model.logits([5, 6, 7]), whole.logits(torch.tensor([5, 6, 7])))
        answer = model.generate([5, 6, 7], temperature=0, max_tokens=4, ignore_eos=True)
        assert (len(answer.token_ids), answer.text) == (4, "")
        with pytest.raises(CheckpointError, match=r"no tokenizer"):
            model.generate("text")
