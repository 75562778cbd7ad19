"""benchmarks/peers.py: workers, statistics, the gate on greedy text, and the dequantized model against its source."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import engines
import peers
import synth
from _common import Summary, Worker, WorkerError, interleave, paired_ratios
from gguf import GGUFReader, dequantize

FAKE_ENGINE = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from _common import serve

class Fake:
    def __init__(self, model, threads, context):
        if model.endswith("bad.gguf"): raise ValueError("no such\\nmodel")
        print("a library that prints on stdout")
        self.step = {step}
    def vocab_size(self): return 1000
    def encode(self, text): return list(text.encode())
    def prefill(self, prompt): return len(prompt) * 0.001
    def decode(self, prompt, num_tokens): return num_tokens * 0.01
    def greedy(self, prompt, num_tokens):
        tokens = [(prompt[-1] + (i + 1) * self.step) % 1000 for i in range(num_tokens)]
        return {{"tokens": tokens, "near": [[token] for token in tokens]}}
    def crash(self): sys.stderr.write("out of memory\\n"); sys.stderr.flush(); sys.exit(3)

serve(Fake)
"""


@pytest.fixture
def fake_engine(tmp_path: Path) -> Callable[[int], list[str]]:
    """Commands of workers that count upwards in steps."""

    def command(step: int = 1) -> list[str]:
        path = tmp_path / f"fake{step}.py"
        path.write_text(FAKE_ENGINE.format(benchmarks=str(Path(engines.__file__).parent), step=step))
        return [sys.executable, str(path)]

    return command


def test_worker_answers_although_libraries_print(fake_engine: Callable[..., list[str]]) -> None:
    with Worker("fake", fake_engine()) as worker:
        worker.call("load", model="m.gguf", threads=1, context=64)
        assert worker.call("vocab_size") == 1000
        assert worker.call("prefill", prompt=[1, 2, 3]) == pytest.approx(0.003)
        assert worker.call("greedy", prompt=[7], num_tokens=2)["tokens"] == [8, 9]


def test_worker_reports_errors_in_one_line_and_lives_on(fake_engine: Callable[..., list[str]]) -> None:
    with Worker("fake", fake_engine()) as worker:
        with pytest.raises(WorkerError, match=r"^fake: ValueError: no such$"):
            worker.call("load", model="bad.gguf", threads=1, context=64)
        worker.call("load", model="m.gguf", threads=1, context=64)
        with pytest.raises(WorkerError, match="no attribute 'nonsense'"):
            worker.call("nonsense")


def test_worker_that_dies_says_its_last_words(fake_engine: Callable[..., list[str]]) -> None:
    with Worker("fake", fake_engine()) as worker:
        worker.call("load", model="m.gguf", threads=1, context=64)
        with pytest.raises(WorkerError, match=r"^fake ended with status 3 in crash: out of memory$"):
            worker.call("crash")
        with pytest.raises(WorkerError, match="status 3"):
            worker.call("vocab_size")


def test_interleave_alternates_who_is_first_and_drops_the_warm_up() -> None:
    calls: list[tuple[str, int]] = []

    def measure(name: str) -> Callable[[int], float]:
        return lambda repeat: calls.append((name, repeat)) or float(repeat)  # type: ignore[func-returns-value]

    results = interleave({"a": measure("a"), "b": measure("b")}, 3)
    assert results == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert calls == [("a", -1), ("b", -1), ("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]


def test_summary_and_paired_ratios() -> None:
    assert Summary.of([5.0]) == Summary(5.0, 5.0, 5.0)
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.median, summary.low, summary.high) == (3.0, 2.0, 4.0)
    assert summary.spread == pytest.approx(1 / 3)
    assert paired_ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_agreement_counts_until_the_first_difference() -> None:
    reference = [{"tokens": [1, 2, 3], "near": [[1], [2, 5], [3]]}, {"tokens": [4, 4, 4], "near": [[4], [4], [4]]}]
    assert peers.agreement([[1, 2, 3], [4, 4, 4]], reference) == peers.Agreement(6, 0, None)
    assert peers.agreement([[1, 5, 9], [4, 4, 4]], reference) == peers.Agreement(4, 1, None)
    result = peers.agreement([[1, 6, 3], [4, 4, 0]], reference)
    assert result == peers.Agreement(3, 0, "prompt 0, token 1: 6 instead of 2")


def test_gate_is_strict_for_the_first_engine_and_lenient_for_peers() -> None:
    parted, good = peers.Agreement(90, 1, "prompt 2, token 5: 1 instead of 2"), peers.Agreement(128, 0, None)
    assert peers.wrong_engines({"glmlocal": parted, "llama.cpp": good}, "glmlocal") == ["glmlocal"]
    assert peers.wrong_engines({"glmlocal": good, "llama.cpp": parted}, "glmlocal") == []
    assert peers.wrong_engines({"llama.cpp": peers.Agreement(31, 4, None)}, "glmlocal") == ["llama.cpp"]


def test_prompts_are_reproducible_and_never_share_a_prefix() -> None:
    prompts = [peers.make_prompt(50_000, f"prefill 32 {repeat}", 32) for repeat in range(-1, 20)]
    assert prompts[3] == peers.make_prompt(50_000, "prefill 32 2", 32)
    assert len({prompt[0] for prompt in prompts}) == len(prompts)
    assert all(500 <= token < 45_000 for prompt in prompts for token in prompt)


def run_with_fakes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: dict[str, list[str]], *arguments: str
) -> int:
    """peers.main on fake engines in place of the real ones."""
    monkeypatch.setattr(peers, "Worker", lambda name, command: Worker(name, commands[name]))
    monkeypatch.setattr(peers, "_interpreter", lambda *_: sys.executable)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    return peers.main(["--model", str(model), "--repeats", "2", "--prefill", "8,16", "--decode", "4", *arguments])


def last_json(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


def test_run_prints_ratios_and_ends_with_json(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fake_engine: Callable[..., list[str]],
) -> None:
    commands = dict.fromkeys(peers.NAMES, fake_engine())
    assert run_with_fakes(monkeypatch, tmp_path, commands, "--engines", "glmlocal,llama.cpp") == 0
    out = capsys.readouterr().out
    assert "greedy  glmlocal: 128 tokens agree" in out
    record = last_json(out)
    assert [(cell["phase"], cell["tokens"], cell["context"]) for cell in record["cells"]] == [
        ("prefill", 8, 0), ("prefill", 16, 0), ("decode", 4, 0), ("decode", 4, 512),
    ]  # fmt: skip
    assert record["cells"][0]["tokens_per_s"]["glmlocal"]["median"] == pytest.approx(1000)
    assert record["cells"][2]["tokens_per_s"]["llama.cpp"]["median"] == pytest.approx(100)
    assert record["cells"][2]["ratio"]["llama.cpp"]["median"] == pytest.approx(1)


def test_differing_text_prints_no_numbers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fake_engine: Callable[..., list[str]],
) -> None:
    commands = {"glmlocal": fake_engine(2), "llama.cpp": fake_engine(1), "transformers": fake_engine(1)}
    assert run_with_fakes(monkeypatch, tmp_path, commands) == 1
    out = capsys.readouterr().out
    assert "glmlocal: greedy text differs" in out
    record = last_json(out)
    assert record["cells"] == []
    assert record["greedy"]["llama.cpp"]["mismatch"] is None
    assert record["greedy"]["glmlocal"]["mismatch"].startswith("prompt 0, token 0")


def test_peer_that_cannot_run_is_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fake_engine: Callable[..., list[str]],
) -> None:
    broken = [sys.executable, "-c", "import sys; sys.exit('no library')"]
    commands = {"glmlocal": fake_engine(), "llama.cpp": fake_engine(), "transformers": broken}
    assert run_with_fakes(monkeypatch, tmp_path, commands) == 0
    out = capsys.readouterr().out
    assert "without transformers: transformers ended with status 1 in load: no library" in out
    assert "no library" in last_json(out)["skipped"]["transformers"]
    assert run_with_fakes(monkeypatch, tmp_path, commands, "--engines", "glmlocal,transformers") == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("peers.py: transformers ended with status 1")


def test_llama_bench_is_read(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "a = sys.argv\n"
        "assert a[a.index('-t') + 1] == '3'\n"
        "prompt, new = int(a[a.index('-p') + 1]), int(a[a.index('-n') + 1])\n"
        "depth = int(a[a.index('-d') + 1]) if '-d' in a else 0\n"
        "if prompt == 13: sys.exit('error: bad prompt')\n"
        "print(json.dumps([{'avg_ts': 500.0 if prompt else 100.0 - depth}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    bench = peers.LlamaBench(str(program), tmp_path / "m.gguf", 3)
    assert peers.Cell("prefill", 32, 0).measure(bench, lambda repeat, n: [0] * n, 0) == pytest.approx(500)
    assert peers.Cell("decode", 16, 50).measure(bench, lambda repeat, n: [0] * n, 0) == pytest.approx(50)
    with pytest.raises(WorkerError, match="status 1: error: bad prompt"):
        bench.prefill([0] * 13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "0"), "are at least 1"),
        (("--context", "-1"), "--context at least 0"),
        (("--model", "/"), "/ is not a file"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(list(arguments)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synth.make_spec("tiny", "gguf-q8_0", layers=3, mtp_acceptance=0.5)
    return synth.write(spec, tmp_path_factory.mktemp("gguf"))


def test_dequantized_has_every_weight_of_the_file_and_its_shape(tiny_gguf: Path) -> None:
    config, weights = engines.dequantized(tiny_gguf)
    assert (config.num_hidden_layers, config.n_routed_experts, config.use_qk_norm) == (3, 16, True)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.routed_scaling_factor == 2.5
    file = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(tiny_gguf).tensors}
    main = sum(values.size for name, values in file.items() if not name.startswith("blk.3."))
    assert sum(tensor.numel() for tensor in weights.values()) == main
    fused = weights["model.layers.1.mlp.experts.gate_up_proj"]
    assert np.array_equal(fused[5, 64:].numpy(), file["blk.1.ffn_up_exps.weight"][5])
    bias = weights["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(bias.numpy(), file["blk.2.exp_probs_b.bias"])


def test_transformers_engine_steps_like_one_pass_over_the_text(tiny_gguf: Path) -> None:
    threads = torch.get_num_threads()
    try:
        engine = engines.Transformers(str(tiny_gguf), threads=1, context=256)
        prompt = [400, 555, 321, 654]
        answer = engine.greedy(prompt, 12)
        text = torch.tensor([prompt + answer["tokens"]])
        logits = engine._model(text).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer["tokens"]
        assert all(token in near for token, near in zip(answer["tokens"], answer["near"], strict=True))
        assert engine.prefill(prompt) > 0
        assert engine.decode(prompt, 3) > 0
        assert engine.vocab_size() == 1024
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
