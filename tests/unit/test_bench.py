"""What glmlocal bench works out, and its command with made-up ceilings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from crafted import TINY, tiny_gguf, tiny_tensors
from glmlocal import LLM, bench, kernels, peaks
from glmlocal.bench import Row, Spread
from glmlocal.cli import bench as bench_command
from glmlocal.cli import main as cli
from glmlocal.cost import HEAD, ModelCost, Part
from glmlocal.errors import PlanError
from glmlocal.peaks import Peaks

DOCS = Path(__file__).parents[2] / "docs"
FAST = Peaks(2, 1e6, 1e6, None, 1 << 29)  # ceilings that nothing here reaches
COST = ModelCost((Part("attention", "Q4_0", 1000, 500, True), Part(HEAD, "bf16", 10, 20, False)), 2, 4, 8, 64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build_model(), tmp_path_factory.mktemp("tiny"))


def measured_peaks(monkeypatch: pytest.MonkeyPatch, *results: Peaks) -> None:
    # before, between the two rounds, after, and as often as the ceilings are tried again
    following = chain([results[0], *results], repeat(results[-1]))
    monkeypatch.setattr(peaks, "measure", lambda threads: next(following))


class Clock:
    """A subject that takes a second to the first token and 10 ms for each other; notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[float, float]:
        self.calls.append((tuple(prompt), num_tokens))
        return 1.0, 0.01 * (num_tokens - 1)


def test_rows_and_their_names() -> None:
    found = bench.rows((32, 0, 512), 64, (0, 4096))
    assert [row.name for row in found] == ["pp32", "pp512", "tg64", "tg64 @ d4096"]
    assert [row.positions for row in found] == [33, 513, 1 + 65, 4096 + 65]
    assert bench.rows((0,), 0, (0, 1)) == []


def test_rows_beyond_the_context_are_skipped_with_the_reason() -> None:
    wanted = bench.rows((511, 512), 64, (447, 448, 4096))
    fitting, skipped = bench.split(wanted, 512, 1024)
    assert [row.name for row in fitting] == ["pp511", "tg64 @ d447"]
    assert [(skip.row.name, skip.reason) for skip in skipped] == [
        ("pp512", "needs 513 tokens, memory allows a context of 512"),
        ("tg64 @ d448", "needs 513 tokens, memory allows a context of 512"),
        ("tg64 @ d4096", "needs 4161 tokens, the model's context is 1024"),
    ]


def test_prompts_are_plain_varied_and_share_no_prefix(directory: Path) -> None:
    with LLM(directory, context=64) as llm:
        ids = bench.plain_ids(llm)
        assert set(ids) == set(range(llm.tokenizer.vocab_size)) - {0, 1, 2, 3, 4}  # role tokens and ends
    prompt, again = bench.prompts(ids), bench.prompts(ids)
    made = [prompt(200) for _ in range(8)]
    assert made == [again(200) for _ in range(8)]
    assert all(set(p) <= set(ids) and len(p) == 200 and len(set(p)) > 80 for p in made)
    assert len({p[0] for p in made}) == 8


def test_every_row_is_repeated_by_turns_with_a_prompt_of_its_own() -> None:
    subject, wanted = Clock(), bench.rows((4,), 10, (0, 6))
    found = list(bench.timed(subject, wanted, 2, bench.prompts(range(5, 100))))
    assert found == [(row, pytest.approx(4.0 if row.context is None else 100.0)) for row in wanted * 2]
    assert [(len(prompt), tokens) for prompt, tokens in subject.calls] == [(4, 1), (1, 11), (6, 11)] * 2
    assert len({prompt[0] for prompt, _ in subject.calls}) == 6


def test_the_longest_prompt_warms_up() -> None:
    subject = Clock()
    bench.warm_up(subject, bench.rows((4, 32), 8, (0, 16)), bench.prompts(range(5, 100)))
    assert [(len(prompt), tokens) for prompt, tokens in subject.calls] == [(32, 1), (1, 4)]


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 0.0)
    assert Spread.of([1.0, 4.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0, pytest.approx(1.2909944))


@pytest.mark.parametrize(("fraction", "is_wrong"), [(0.99, False), (1.0, False), (1.01, True)])
def test_more_than_a_ceiling_is_an_error(fraction: float, is_wrong: bool) -> None:
    for row, ceiling in ((Row(8), "peak"), (Row(8, 4), "read bandwidth")):
        error = bench.Measured(row, bench.Spread(1.0, 1.0, 1.0, 0.0), 1, 1.0, fraction).error
        assert (error is not None) == is_wrong
        assert not is_wrong or (ceiling in str(error) and row.name in str(error))


def test_a_row_that_the_model_would_just_allow_is_left_out_for_memory() -> None:
    row = Row(8)
    fitting, skipped = bench.split([row], row.positions - 1, row.positions)
    assert (fitting, [each.reason for each in skipped]) == ([], ["needs 9 tokens, memory allows a context of 8"])
    assert bench.split([row], row.positions, row.positions) == ([row], [])
    _, skipped = bench.split([row], 8, 8)
    assert skipped[0].reason == "needs 9 tokens, the model's context is 8"


@pytest.mark.parametrize("found", [0, 3, 5])
def test_a_model_that_stops_early_is_not_timed(found: int) -> None:
    class Short:
        def generate(self, prompt: object, **options: object) -> Iterator[SimpleNamespace]:
            return iter([SimpleNamespace(token_ids=(1,))] * found)

    subject = bench.Model(Short())  # type: ignore[arg-type]
    if found == 5:
        assert min(subject.run([1], 5)) >= 0
        return
    with pytest.raises(PlanError, match=f"stopped after {found} of 5 tokens"):
        subject.run([1], 5)


def test_fractions_are_rates_over_ceilings() -> None:
    ceilings = Peaks(1, read_gb_per_s=2e-6, fp32_gflop_per_s=4e-5, int8_gop_per_s=None, read_bytes=1)
    prefill = bench.judge(Row(8), [5.0, 10.0, 15.0], COST, ceilings)
    flops = 2 * (1000 * 8 + 10) + 4 * 4 * 8 * 2 * 36
    assert (prefill.work, prefill.repeats) == (flops, 3)
    assert prefill.fraction == pytest.approx(flops / 8 * 10 / 4e4)
    decode = bench.judge(Row(3, 0), [2.0], COST, ceilings)
    assert decode.work == 500 + 20 + 64 * 3  # a prompt of one, then 2, 3 and 4 positions
    assert decode.fraction == pytest.approx(decode.work * 2.0 / 2e3)
    integers = Peaks(1, 1.0, 1.0, 8e-5, 1)
    assert bench.judge(Row(8), [10.0], COST, integers).fraction == pytest.approx(flops / 8 * 10 / 8e4)
    assert bench.arithmetic_peak(COST, integers) == ("int8", 8e-5)
    floats = ModelCost(COST.parts[1:], 2, 4, 8, 64)
    assert bench.arithmetic_peak(floats, integers) == ("fp32", 1.0)


def test_more_than_the_ceiling_is_an_error() -> None:
    ceilings = Peaks(1, 1e-6, 1e-6, None, 1)
    exact = bench.judge(Row(1, 0), [1000 / (520 + 64 * 2)], COST, ceilings)
    assert (exact.fraction, exact.error) == (pytest.approx(1.0), None)
    above = bench.judge(Row(1, 9), [1000.0], COST, ceilings)
    assert above.error is not None
    assert above.error.startswith("tg1 @ d9 reaches")
    assert "read bandwidth" in above.error
    prefill = bench.judge(Row(2), [1000.0], COST, ceilings)
    assert prefill.error is not None
    assert prefill.error.startswith("pp2 reaches")


def test_the_larger_peak_counts_and_a_difference_shows() -> None:
    before, after = Peaks(2, 50.0, 400.0, 1500.0, 7), Peaks(2, 60.0, 390.0, 1400.0, 7)
    assert before.best_of(after) == Peaks(2, 60.0, 400.0, 1500.0, 7)
    assert before.difference(after) == pytest.approx(1 / 6)
    assert bench.is_busy(before, after)
    assert not bench.is_busy(before, Peaks(2, 43.0, 400.0, None, 7))
    assert not bench.is_busy(before, None)
    run = bench_command.Run([], [], before, after, [Peaks(2, 55.0, 500.0, 1450.0, 9)])
    assert run.peaks == Peaks(2, 60.0, 500.0, 1500.0, 9)
    assert Peaks(2, 1.0, 1.0, None, 7).best_of(after).int8_gop_per_s == 1400.0


@pytest.mark.parametrize(
    ("cache", "free", "size"),
    [(32, 20 << 10, 512), (96, 20 << 10, 768), (32, 300, 150), (0, 0, 16)],  # MiB
)
def test_the_buffer_is_beyond_the_caches_and_within_memory(cache: int, free: int, size: int) -> None:
    assert peaks.read_bytes(cache << 20, free << 20) == size << 20


def test_the_cost_is_that_of_the_loaded_model(directory: Path) -> None:
    with LLM(directory, context=64) as llm:
        cost = bench.cost_of(llm)
        item_bytes = llm.engine.runner.kv_cache.keys[0].element_size()
    parts = {part.name: part for part in cost.parts}
    assert {name: part.weights for name, part in parts.items()} == {
        "attention": 3 * (64 * 64 + 2 * 32 * 64 + 64 * 64),
        "dense FFN": 3 * 64 * 96,
        "router": 2 * 8 * 64,
        "shared experts": 2 * 3 * 64 * 32,
        "routed experts": 2 * 8 * 3 * 64 * 32,
        HEAD: 384 * 64,
    }
    assert parts["routed experts"].weights_per_token == 2 * 2 * 3 * 64 * 32
    assert parts["attention"].nbytes == 4 * parts["attention"].weights
    assert not any(part.is_integer for part in cost.parts)
    assert cost.kv_bytes_per_token == 3 * 2 * 2 * 16 * item_bytes
    assert (cost.num_layers, cost.num_attention_heads, cost.head_dim) == (3, 4, 16)


def test_layers_for_speculation_are_no_part_of_the_cost(directory: Path) -> None:
    with LLM(directory, context=64) as llm:
        runner, cost = llm.engine.runner, bench.cost_of(llm)
        runner.model = replace(runner.model, mtp=runner.model.layers[-1:])  # type: ignore[arg-type]
        assert bench.cost_of(llm) == cost


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_matrices_that_are_multiplied_as_integers_are_known(activations: str, tmp_path: Path) -> None:
    path = tiny_gguf(TINY, tiny_tensors(TINY), lambda name: "Q4_0" if "exps" in name else "F32").write(
        tmp_path / "m.gguf"
    )
    with LLM(path, context=64, activations=activations) as llm:
        cost = bench.cost_of(llm)
    kinds = {part.name: (part.kind, part.is_integer) for part in cost.parts}
    assert kinds["routed experts"] == ("Q4_0", activations == "int8")
    assert kinds["attention"] == ("f32", False)
    # The file's MTP layer has as many again, which no step reads.
    assert sum(part.weights for part in cost.parts if part.name == "routed experts") == 2 * 4 * 3 * 64 * 32


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


QUICK = ("--prefill", "8,16", "--decode", "4", "--context", "0,32", "--repeat", "2")


def test_json_has_the_documented_keys(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_peaks(monkeypatch, FAST, Peaks(2, 1.1e6, 9e5, None, 1 << 29))
    code, out, err = run(capsys, str(directory), *QUICK, "--threads", "1", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert list(facts)[:6] == ["model", "threads", "prefill", "decode", "peaks", "memory"]
    assert (facts["model"], facts["threads"], facts["repeat"]) == (str(directory), 1, 2)
    assert [row["tokens"] for row in facts["prefill"]] == [8, 16]
    assert [(row["context"], row["tokens"]) for row in facts["decode"]] == [(0, 4), (32, 4)]
    for row in (*facts["prefill"], *facts["decode"]):
        assert 0 < row["min"] <= row["tokens_per_s"] <= row["max"]
        assert row["repeats"] == 2
        assert 0 <= row.get("fraction_of_peak", row.get("fraction_of_bandwidth")) <= 1
    assert facts["peaks"] == {
        "read_gb_per_s": 1.1e6, "fp32_gflop_per_s": 1e6, "int8_gop_per_s": None, "arithmetic": "fp32",
        "read_bytes": 1 << 29,
        "before": {"read_gb_per_s": 1e6, "fp32_gflop_per_s": 1e6, "int8_gop_per_s": None},
        "after": {"read_gb_per_s": 1.1e6, "fp32_gflop_per_s": 9e5, "int8_gop_per_s": None},
        "difference": 0.1, "busy": False,
    }  # fmt: skip
    assert facts["skipped"] == facts["errors"] == []
    assert facts["interrupted"] is False
    assert facts["memory"]["kv_bytes"] == facts["memory"]["kv_bytes_per_token"] * (32 + 5)
    assert facts["isa"] == kernels.isa()
    assert set(facts["quant"]) == {"f32"}
    documented = set(re.findall(r"`(\w+)`", (DOCS / "bench.md").read_text("utf-8")))
    for key, value in facts.items():
        assert key in documented, key
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and key != "quant":
            assert set(first) <= documented, key


def test_the_table_names_rows_as_llama_bench_does(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_peaks(monkeypatch, FAST, Peaks(2, 7e5, 1e6, None, 1 << 29))
    code, out, err = run(capsys, str(directory), *QUICK)
    assert (code, err) == (0, "")
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert {"pp8", "pp16", "tg4", "tg4 @ d32"} <= set(names)
    assert "\x1b" not in out
    assert "the machine is busy: its peaks before and after differ by 30%" in out


def test_what_does_not_fit_is_skipped_and_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_peaks(monkeypatch, FAST, FAST)
    options = ("--prefill", "8,512", "--decode", "4", "--context", "0,4096", "--repeat", "1", "--json")
    code, out, err = run(capsys, str(directory), *options)
    assert code == 0
    reason = "needs 4101 tokens, the model's context is 512"
    facts = json.loads(out)
    assert [row["tokens"] for row in facts["prefill"]] == [8]
    assert {"test": "tg4 @ d4096", "tokens": 4, "context": 4096, "reason": reason} in facts["skipped"]
    assert f"tg4 @ d4096 is skipped: it {reason}" in err
    assert "pp512 is skipped" in err


def test_nothing_that_fits_is_bad_input(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(directory), "--prefill", "4096", "--decode", "0")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("glmlocal: error: nothing fits: pp4096 needs 4097 tokens")
    code, out, err = run(capsys, str(directory), "--prefill", "0", "--decode", "0")
    assert (code, out) == (2, "")
    assert "nothing to measure" in err


def test_a_fraction_above_one_fails_and_is_still_shown(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Peaks(2, 1e-9, 1e6, None, 1 << 29)
    measured_peaks(monkeypatch, slow, slow)
    code, out, err = run(capsys, str(directory), *QUICK, "--json")
    assert code == 1
    facts = json.loads(out)
    assert len(facts["errors"]) == 2
    assert all(text.startswith("tg4") for text in facts["errors"])
    assert err.count("glmlocal: error: tg4") == 2
    assert facts["decode"][0]["fraction_of_bandwidth"] > 1


def test_ceilings_that_were_disturbed_are_measured_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Peaks(2, 1e-9, 1e6, None, 1 << 29)
    measured_peaks(monkeypatch, slow, slow, slow, slow, FAST)  # before, between, after, and two more tries
    code, out, err = run(capsys, str(directory), *QUICK, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["errors"] == []
    assert 0 < facts["decode"][0]["fraction_of_bandwidth"] < 1
    assert facts["peaks"]["read_gb_per_s"] == FAST.read_gb_per_s


def test_ctrl_c_prints_what_was_measured(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bench.timed

    def interrupted(*arguments: Any) -> Iterator[tuple[Row, float]]:
        yield from islice(real(*arguments), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "timed", interrupted)
    measured_peaks(monkeypatch, FAST)
    code, out, _ = run(capsys, str(directory), *QUICK, "--json")
    assert code == 130
    facts = json.loads(out)
    assert facts["interrupted"] is True
    assert [len(facts["prefill"]), len(facts["decode"])] == [2, 0]
    assert facts["peaks"]["after"] is None
    measured_peaks(monkeypatch, FAST)
    code, out, _ = run(capsys, str(directory), *QUICK)
    assert code == 130
    assert "pp16" in out
    assert "interrupted" in out


@pytest.mark.parametrize("text", ["", "8,", "8,x", "-3", "99999999999", "1.5"])
def test_lists_of_lengths(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "demo", f"--prefill={text}")
    assert (code, out) == (2, "")
    assert "is no list of numbers of tokens" in err
