"""Bad checkpoints through the real command line: one clear line, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

import tiny
import tiny_gguf
from glmlocal.cli.main import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save(tiny.build_model(), tmp_path / "tiny")


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, object]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, "truncated: 100 of"),
    "empty shard": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight")),
        "model.layers.1.mlp.experts.5.up_proj.weight",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:32].clone()})),
        "model.norm.weight",
    ),
    "wrong dtype": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()})),
        "I32",
    ),
    "unknown architecture": (
        lambda d: edit_config(d, model_type="llama", architectures=["LlamaForCausalLM"]),
        "llama",
    ),
    "no layers": (lambda d: edit_config(d, num_hidden_layers=0), "num_hidden_layers"),
    "absurd layers": (lambda d: edit_config(d, num_hidden_layers=10**9), "num_hidden_layers"),
    "negative heads": (lambda d: edit_config(d, num_attention_heads=-4), "num_attention_heads"),
    "experts as text": (lambda d: edit_config(d, n_routed_experts="many"), "n_routed_experts"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_bad_checkpoint_is_one_line_and_exit_2(
    breakage: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = BREAKAGES[breakage]
    spoil(checkpoint)
    files = sorted(checkpoint.rglob("*"))
    assert main(["chat", str(checkpoint), "-p", "hi", "--max-tokens", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(checkpoint.rglob("*")) == files


@pytest.mark.parametrize("command", [["chat", "-p", "hi"], ["show"], ["eval"]])
def test_a_missing_file_is_named(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path / "nowhere.gguf")]) == 2
    err = capsys.readouterr().err
    assert "nowhere.gguf" in err
    assert err.count("\n") == 1


def test_an_unsupported_gguf_type_is_refused_by_name_before_loading(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    add_tensor = GGUFWriter.add_tensor

    def with_q8_k(self: GGUFWriter, name: str, tensor: np.ndarray, raw_dtype: object = None) -> None:
        if name == "blk.0.ffn_down.weight":  # rows of 256 weights are 292 bytes in Q8_K, which no file has
            tensor, raw_dtype = np.zeros((64, 292), np.uint8), GGMLQuantizationType.Q8_K
        add_tensor(self, name, tensor, raw_dtype=raw_dtype)

    monkeypatch.setattr(GGUFWriter, "add_tensor", with_q8_k)
    tiny_gguf.convert(checkpoint, file)
    assert main(["chat", str(file), "-p", "hi"]) == 2
    err = capsys.readouterr().err
    assert "Q8_K" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "100000"], "512"),
        (["--context", "-5"], "context"),
        (["--temp", "-1"], "temperature"),
        (["--temp", "nan"], "temp"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--threads", "0"], "threads"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    options: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(checkpoint), "-p", "hi", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "show", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(checkpoint), "--context", "32", "-p", "word " * 100]) == 2
    assert "32" in capsys.readouterr().err


def test_the_contract_of_one_answer(checkpoint: Path) -> None:
    """A real process: stdout is the answer and a newline, --json is one object with the same text."""
    command = [
        sys.executable,
        "-m",
        "glmlocal",
        "chat",
        str(checkpoint),
        "-p",
        "fox",
        "--temp",
        "0",
        "--max-tokens",
        "9",
    ]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    as_json = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert (plain.returncode, as_json.returncode) == (0, 0), plain.stderr + as_json.stderr
    answer = json.loads(as_json.stdout)
    assert set(answer) >= {"text", "reasoning", "finish_reason", "usage", "timings"}
    assert plain.stdout == answer["text"] + "\n"
    assert answer["usage"]["completion_tokens"] <= 9
    assert answer["finish_reason"] in {"stop", "length"}


def test_without_native_kernels_it_answers_and_says_so(checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "glmlocal",
        "chat",
        str(checkpoint),
        "-p",
        "fox",
        "--temp",
        "0",
        "--max-tokens",
        "5",
    ]
    environment = {**os.environ, "GLMLOCAL_CPU_ISA": "reference"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("running slowly on the plain kernels: reference")
