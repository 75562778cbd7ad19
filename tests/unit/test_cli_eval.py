from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import VOCAB_SIZE, FakeLLM, FakeTokenizer, install
from glmlocal.cli import eval as eval_command
from glmlocal.cli.main import main

Run = Callable[..., tuple[int, str, str]]
TEXT = "The quick brown fox jumps over the lazy dog, twice. 中文也可以。\n" * 2


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    (tmp_path / "text").write_text(TEXT, "utf-8")

    def call(*arguments: str, text: bool = True) -> tuple[int, str, str]:
        install(monkeypatch)
        code = main(["eval", *arguments, *(["--text", str(tmp_path / "text")] if text else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def measure(run: Run, *arguments: str, **options: Any) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json", **options)
    assert (code, out.count("\n")) == (0, 1), err
    result: dict[str, Any] = json.loads(out)
    return result


def direct(model: str, context: int, stride: int) -> list[tuple[np.ndarray[Any, Any], int]]:
    """Log-probabilities and target of every scored token, the plain way: one run of the model per token."""
    tokens, llm, rows = list(TEXT.encode()), FakeLLM(model), []
    starts, end = {}, min(context, len(tokens))
    for target in range(1, len(tokens)):
        if target >= end:
            end = min(end + stride, len(tokens))
        starts[target] = max(0, end - context)
    for target, start in starts.items():
        logits = llm.logits(tokens[start:target]).numpy()[-1].astype(np.float64)
        rows.append((logits - math.log(np.exp(logits).sum()), tokens[target]))
    return rows


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (17, 1), (20, 19), (1000, 3)])
def test_perplexity_equals_scoring_token_by_token(run: Run, context: int, stride: int) -> None:
    found = measure(run, "a", "--context", str(context), "--stride", str(stride))
    nll = [-row[target] for row, target in direct("a", context, stride)]
    assert found["num_scored"] == len(nll) == found["tokens"] - 1
    assert found["nll"] == pytest.approx(np.mean(nll), rel=1e-12)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-12)
    assert found["nll_stderr"] == pytest.approx(np.std(nll, ddof=1) / np.sqrt(len(nll)), rel=1e-12)
    assert (found["context"], found["stride"]) == (context, stride)
    assert FakeLLM.instances[0].context == context


def test_quant_is_of_the_model_and_not_of_the_reference(run: Run) -> None:
    code, _, err = run("a", "--against", "b", "--context", "32", "--quant", "int8")
    assert (code, [llm.quant for llm in FakeLLM.instances]) == (0, ["int8", "keep"])
    assert "--quant int8: 2 of 3" in err


def test_windows_matter_to_the_fake_model(run: Run) -> None:
    assert measure(run, "a", "--context", "16")["nll"] != measure(run, "a", "--context", "60")["nll"]


def test_the_default_is_the_bundled_text_in_windows_of_512(run: Run) -> None:
    found = measure(run, "a", text=False)
    assert (found["text"], found["context"], found["stride"]) == ("bundled text", 512, 256)
    assert 10_000 < found["tokens"] < 30_000


@pytest.mark.parametrize("through_a_file", [False, True])
def test_divergence_equals_the_formula(run: Run, tmp_path: Path, through_a_file: bool) -> None:
    windows = ("--context", "32", "--stride", "10")
    if through_a_file:
        path = str(tmp_path / "saved.logits")
        _, _, err = run("reference", *windows, "--save-logits", path)
        assert "of fp16 log-probabilities" in err
        found = measure(run, "model", "--against-logits", path, text=False)
        assert found["text"] == path
    else:
        found = measure(run, "model", "--against", "reference", *windows)
    tolerance = 2e-3 if through_a_file else 1e-10
    pairs = list(zip(direct("reference", 32, 10), direct("model", 32, 10), strict=True))
    kl = [(np.exp(p) * (p - q)).sum() for (p, _), (q, _) in pairs]
    delta = [np.exp(q[target]) - np.exp(p[target]) for (p, target), (q, _) in pairs]
    against = found["against"]
    assert against["model"] == "reference"
    assert against["kl_mean"] == pytest.approx(np.mean(kl), rel=tolerance)
    assert against["kl_median"] == pytest.approx(np.median(kl), rel=tolerance)
    assert against["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=tolerance)
    assert against["kl_max"] == pytest.approx(max(kl), rel=tolerance)
    assert against["top1_agreement"] == pytest.approx(np.mean([p.argmax() == q.argmax() for (p, _), (q, _) in pairs]))
    assert against["delta_p_rms"] == pytest.approx(np.sqrt(np.mean(np.square(delta))), rel=tolerance)
    reference_nll = -np.mean([p[target] for (p, target), _ in pairs])
    assert against["perplexity"] == pytest.approx(np.exp(reference_nll), rel=tolerance)
    assert all(llm.closed for llm in FakeLLM.instances[: 2 - through_a_file])


def test_a_model_agrees_with_itself(run: Run, tmp_path: Path) -> None:
    against = measure(run, "a", "--against", "a", "--context", "32")["against"]
    assert (against["kl_max"], against["top1_agreement"], against["delta_p_rms"]) == (0, 1, 0)
    run("a", "--context", "32", "--save-logits", str(tmp_path / "x"))
    against = measure(run, "a", "--against-logits", str(tmp_path / "x"), text=False)["against"]
    assert 0 <= against["kl_max"] < 1e-6
    assert against["top1_agreement"] == 1


def test_table(run: Run) -> None:
    code, out, err = run("a", "--against", "b", "--context", "32")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] or line.split()[0] for line in out.splitlines()][1:3] == ["perplexity", "mean"]
    for word in ("windows of 32 advancing by 16", "against b", "KL divergence", "same top token", "delta p", "±"):
        assert word in out


def test_text_of_a_header_never_rewrites_the_terminal(run: Run, tmp_path: Path) -> None:
    run("evil\x1b[2J", "--context", "32", "--save-logits", str(tmp_path / "x"))
    _, out, _ = run("a", "--against-logits", str(tmp_path / "x"), text=False)
    assert "against evil␛[2J" in out


class OtherTokenizer(FakeTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return b"other" if token_id == 65 else super().token_bytes(token_id)


class OtherSplitting(FakeTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [0, *text.encode()]


def give_tokenizers(monkeypatch: pytest.MonkeyPatch, **tokenizers: FakeTokenizer) -> None:
    original = FakeLLM.__init__

    def init(self: FakeLLM, model: str, **options: Any) -> None:
        original(self, model, **options)
        self.tokenizer = tokenizers.get(model, self.tokenizer)

    monkeypatch.setattr(FakeLLM, "__init__", init)


def test_models_with_other_tokens_are_not_compared(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_tokenizers(monkeypatch, other=OtherTokenizer(), splits=OtherSplitting())
    code, out, err = run("a", "--against", "other")
    assert (code, out) == (2, "")
    assert f"different vocabularies of {VOCAB_SIZE} and {VOCAB_SIZE} tokens" in err
    code, _, err = run("a", "--against", "splits")
    assert code == 2
    assert "split the text differently" in err
    run("other", "--context", "32", "--save-logits", str(tmp_path / "x"))
    code, _, err = run("a", "--against-logits", str(tmp_path / "x"), text=False)
    assert code == 2
    assert "different vocabularies" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--stride", "32", "--context", "32"), "--stride 32 leaves no overlap in windows of 32 tokens"),
        (("a", "--stride", "600"), "--stride 600 leaves no overlap"),
        (("a", "--context", "1"), "argument --context: wanted a whole number of at least 2"),
        (("a", "--against", "b", "--against-logits", "x"), "not allowed with"),
        (("a", "--against-logits", "x"), "carries its own text"),
        (("missing",), "'missing' is not there"),
    ],
)
def test_bad_options(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the text has 0 tokens"), (b"x", "the text has 1 tokens"), (b"ab\xff", "is not UTF-8 text: byte 0xff")],
)
def test_bad_texts(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    code, _, err = run("a", "--text", str(tmp_path / "bad"), text=False)
    assert code == 2
    assert message in err


def test_missing_and_too_large_texts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("a", "--text", str(tmp_path / "none"), text=False)
    assert code == 2
    assert "No such file or directory" in err
    monkeypatch.setattr(eval_command, "MAX_TEXT_BYTES", 10)
    code, _, err = run("a")
    assert code == 2
    assert "is larger than 10 B" in err


def test_saved_logits_fix_context_and_stride_and_are_not_replaced(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    assert run("a", "--context", "32", "--save-logits", path)[0] == 0
    size = (tmp_path / "x").stat().st_size
    code, _, err = run("a", "--against-logits", path, "--context", "64", text=False)
    assert code == 2
    assert "--context is 64, but" in err
    assert measure(run, "a", "--against-logits", path, "--context", "32", "--stride", "16", text=False)["against"]
    code, _, err = run("a", "--context", "32", "--save-logits", path)
    assert code == 2
    assert "exists; choose another name" in err
    assert (tmp_path / "x").stat().st_size == size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "x"]
