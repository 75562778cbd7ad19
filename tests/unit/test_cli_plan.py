"""``glmlocal plan``: what it says on a terminal, in files and to programs."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.cells import cell_len
from rich.console import Console

import tiny
import tiny_gguf
from glmlocal.cli import plan as cli_plan
from glmlocal.cli import plan_content as content
from glmlocal.cli import plan_markdown, plan_report, plan_svg, plan_table
from glmlocal.cli.main import main
from glmlocal.cli.plan_content import Bar
from glmlocal.hub import pull
from glmlocal.planner.machine import Cpu, Gpu, Machine, Ram
from glmlocal.planner.plan import (
    Advice,
    Device,
    Forecast,
    Line,
    Placement,
    Plan,
    Rate,
    Resolved,
    Shortfall,
    Wants,
)
from glmlocal.planner.subject import subject
from glmlocal.units import GIB, MIB
from hub.pulling import huggingface
from hub.server import HubServer

CARD = Gpu("RTX 4090", 24 * GIB, 1008, 26, 165, 660, 330)
MACHINE = Machine((CARD,), Cpu("CPU", 8, 400, 800), Ram(64 * GIB, 60 * GIB, 60), None, notes=("modelled: run doctor",))


def _rate(value: float, spread: float = 0.0, bound_by: str = "cpu memory") -> Rate:
    return Rate(
        value, value * (1 - spread), value * (1 + spread), "measured" if not spread else "modelled", bound_by, "a/b"
    )


PLAN = Plan(
    name="Model",
    quant="keep",
    fits=True,
    total_params=110_468_824_832,
    active_params=13_424_129_664,
    weights_bytes=100 * GIB,
    download_bytes=101 * GIB,
    disk_bytes=101 * GIB,
    kv_bytes_per_token=1000,
    max_context=131072,
    machine=MACHINE,
    wants=Wants(),
    resolved=Resolved(8192, 4, 32768, "bf16", "int8", 0, "keep", 512, 8),
    placement=Placement((0, 0), (0, 8), (0, 8), (0, 0), (0, 0), 0),
    devices=(
        Device(
            "gpu:0 RTX 4090",
            "gpu",
            24 * GIB,
            (
                Line("CUDA context", 512 * MIB, "modelled", "libraries"),
                Line("margin", 512 * MIB, "modelled"),
                Line("attention, bf16", 2 * GIB, "exact", "2 × 1 GiB"),
                Line("attention, f32", 1 * GIB, "exact"),
                Line("shared experts, bf16", 1 * GIB, "exact"),
                Line("routed experts, int4", 10 * GIB, "exact"),
                Line("MTP norms, f32", 1 * MIB, "exact"),
                Line("MTP routed experts, int8", 1 * GIB, "modelled"),
                Line("MTP KV cache, bf16", 1 * MIB, "exact"),
                Line("KV cache, bf16", 4 * GIB, "exact"),
            ),
        ),
        Device(
            "RAM", "ram", 60 * GIB, (Line("routed experts, int4", 30 * GIB, "exact"), Line("runtime", GIB, "measured"))
        ),
        Device("NVMe", "nvme", 100 * GIB, ()),
    ),
    forecast=Forecast(
        {0: _rate(12.34), 8192: _rate(9.876, 0.3, "gpu memory")},
        _rate(1234.5),
        {1024: _rate(0.8321, 0.1)},
        0.72,
        {1: _rate(14.0)},
    ),
    shortfall=None,
    advice=(Advice("smaller is faster", "--quant int4"), Advice("only a note")),
)
TOO_LARGE = replace(
    PLAN,
    fits=False,
    placement=None,
    forecast=None,
    max_context=0,
    devices=(replace(PLAN.devices[0], capacity_bytes=10 * GIB), *PLAN.devices[1:]),
    shortfall=Shortfall("gpu:0 RTX 4090", 9 * GIB, "Model needs 19 GiB but 10 GiB can be used: 9 GiB are missing"),
)
HOSTILE = '模型\x1b]0;title\x07\x1b[31m<b>&"|*x*|\n```'
STRANGE = replace(
    PLAN,
    name=HOSTILE,
    machine=replace(MACHINE, notes=(HOSTILE,), gpus=(replace(CARD, name=HOSTILE),)),
    devices=tuple(replace(device, name=HOSTILE + device.name) for device in PLAN.devices),
    advice=(Advice(HOSTILE, HOSTILE),),
)


def _rendered(plan: Plan, width: int = 80, **options: bool) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    plan_report.show(plan, out, ("a note on the choice",), **options)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


# What is said


@pytest.mark.parametrize(
    ("what", "category"),
    [
        ("routed experts, int4 group 32", "experts"),
        ("expert slots, bf16", "experts"),
        ("expert pack", "experts"),
        ("shared, bf16", "other weights"),
        ("attention, f32", "other weights"),
        ("embeddings", "other weights"),
        ("MTP routed experts, int8", "MTP"),
        ("MTP KV cache, bf16", "MTP"),
        ("KV cache, fp8", "KV cache"),
        ("read buffers", "buffers"),
        ("CUDA context", "buffers"),
        ("margin", "margin"),
    ],
)
def test_every_line_belongs_to_a_part_of_the_bar(what: str, category: str) -> None:
    assert content.category(what) == category


def test_bars_and_ledger_account_for_every_byte() -> None:
    gpu, ram = content.bars(PLAN)  # nothing is on NVMe
    assert gpu.segments == (
        ("experts", 11 * GIB),  # the shared one counts with them: nobody asks the bar which
        ("other weights", 3 * GIB),
        ("KV cache", 4 * GIB),
        ("MTP", GIB + 2 * MIB),
        ("buffers", 512 * MIB),
        ("margin", 512 * MIB),
    )
    assert ram.segments == (("experts", 30 * GIB), ("buffers", GIB))
    assert (gpu.used_bytes, ram.used_bytes) == (PLAN.devices[0].used_bytes, PLAN.devices[1].used_bytes)
    ledger = content.ledger(PLAN)
    assert ledger.columns == ("gpu:0 RTX 4090", "RAM")
    rows = {what: (sums, basis) for what, sums, basis in ledger.rows}
    assert rows["attention"] == ((3 * GIB, 0), "exact")
    assert rows["routed experts"] == ((10 * GIB, 30 * GIB), "exact")
    assert rows["MTP weights"] == ((GIB + MIB, 0), "modelled")
    assert rows["MTP KV cache"] == ((MIB, 0), "exact")
    assert rows["runtime"] == ((0, GIB), "measured")
    assert ledger.rows[-1] == ("together", (PLAN.devices[0].used_bytes, PLAN.devices[1].used_bytes), "modelled")


def test_many_gpus_share_a_column() -> None:
    gpus = tuple(replace(PLAN.devices[0], name=f"gpu:{i}") for i in range(8))
    ledger = content.ledger(replace(PLAN, devices=(*gpus, PLAN.devices[1])))
    assert ledger.columns == ("8 GPUs", "RAM")
    assert ledger.rows[-1][1] == (8 * PLAN.devices[0].used_bytes, PLAN.devices[1].used_bytes)


def test_a_sum_is_as_certain_as_its_least_certain_part() -> None:
    assert content.least_certain(["exact", "measured"]) == "measured"
    assert content.least_certain(["modelled", "measured", "exact"]) == "modelled"
    assert content.least_certain([]) == "exact"


def test_numbers_have_three_digits() -> None:
    values = (0.11637, 1.0, 6.646, 104.54, 999.9, 1234.5, 8637.1, 123456.0)
    assert [content.number(value) for value in values] == [
        "0.116", "1", "6.65", "105", "1,000", "1,230", "8,640", "123,000",
    ]  # fmt: skip


def test_where_experts_live() -> None:
    assert content.where(PLAN) == "GPU + RAM"
    assert content.where(TOO_LARGE) == ""
    assert PLAN.placement is not None
    all_in = replace(PLAN.placement, ram_experts=(0, 0))
    assert content.where(replace(PLAN, placement=all_in)) == "GPU"
    on_disk = replace(PLAN.placement, gpu_experts=(0, 0), ram_experts=(0, 0), nvme_experts=(0, 16))
    assert content.where(replace(PLAN, placement=on_disk)) == "NVMe"
    dense = replace(all_in, gpu_experts=(0, 0))
    assert content.where(replace(PLAN, placement=dense)) == "GPU"
    assert content.where(replace(PLAN, placement=replace(dense, layer_device=(-1, -1)))) == "RAM"


def test_a_range_is_shown_where_one_is_promised() -> None:
    speeds = {speed.label: speed for speed in content.speeds(PLAN)}
    assert speeds["decode, empty context"].value == "12.3 tok/s"
    assert speeds["decode, empty context"].range == ""
    assert speeds["decode at 8,192"].range == "6.91 – 12.8"
    assert speeds["decode at 8,192"].bound_by == "gpu memory"
    assert speeds["with 1 MTP draft"].value == "14 tok/s"
    assert speeds["prefill"].value == "1,230 tok/s"
    assert speeds["first token of 1,024"].value == "0.832 s"
    assert list(content.speeds(TOO_LARGE)) == []


# The bar


@pytest.mark.parametrize(
    ("model", "planned", "away", "words"),
    [
        ("GLM-4.5-Air", "GLM-4.5-Air-GGUF:Q2_K", 0, "`glmlocal pull unsloth/GLM-4.5-Air-GGUF:Q2_K` fetches it"),
        ("GLM-4.5-Air-FP8", "GLM-4.5-Air-FP8", 0, "`glmlocal pull zai-org/GLM-4.5-Air-FP8` fetches it"),
        (
            "GLM-4.5-Air-FP8",
            "GLM-4.5-Air-FP8",
            3,
            "pull zai-org/GLM-4.5-Air-FP8 --pack --quant int4` fetches and packs it",
        ),
        ("a/b:Q4_0@v1", "a/b:Q4_0", 0, "`glmlocal pull a/b:Q4_0@v1` fetches it"),
        ("GLM-5", "GLM-5-FP8", 0, None),  # planned for, and not run
        ("demo", "demo", 0, None),
        ("here", "here", 0, None),
    ],
)
def test_what_is_not_here_is_offered(
    model: str, planned: str, away: int, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    placement = replace(PLAN.placement or Placement((), (), (), (), (), 0), nvme_experts=(0, away))
    plan = replace(PLAN, name=planned, quant="int4", placement=placement)
    offer = cli_plan._offer(model, plan)
    assert offer == () if words is None else words in offer[0]
    assert cli_plan._offer(model, replace(plan, fits=False)) == ()


def _bar(capacity: int, *segments: tuple[str, int]) -> str:
    return plan_report.bar_text(Bar("x", capacity, segments), cells=10).plain


def test_a_bar_is_in_proportion() -> None:
    assert _bar(100, ("experts", 50), ("KV cache", 30)) == "█████▒▒▒  "
    assert _bar(100, ("experts", 100)) == "██████████"
    assert _bar(100) == "          "
    assert _bar(0) == "          "


def test_what_is_there_is_seen_however_small() -> None:
    assert _bar(1000, ("experts", 1), ("KV cache", 1), ("margin", 1)) == "█▒░       "
    assert len(_bar(1000, ("experts", 999), ("KV cache", 1), ("margin", 1))) == 10


def test_what_the_device_does_not_have_is_marked() -> None:
    assert _bar(50, ("experts", 80), ("KV cache", 20)) == "█████!!!!!"


# The reports


@pytest.mark.parametrize("plan", [PLAN, TOO_LARGE, STRANGE], ids=["fits", "does not fit", "strange"])
def test_a_report_fits_eighty_columns_and_only_draws(plan: Plan) -> None:
    for options in ({}, {"explain": True}):
        text = _rendered(plan, **options)
        assert max(cell_len(line) for line in text.splitlines()) <= 80
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_bars_begin_in_one_column_and_their_legend_is_one_line() -> None:
    lines = _rendered(replace(STRANGE, devices=(*STRANGE.devices[:1], PLAN.devices[1]))).splitlines()
    bars = [line for line in lines if "▕" in line]
    assert [cell_len(line.partition("▕")[0]) for line in bars] == [17, 17]
    assert "  █ experts  ▓ other weights  ▒ KV cache  ▞ MTP  ▄ buffers  ░ margin" in [line.rstrip() for line in lines]


def test_a_report_says_everything() -> None:
    text = _rendered(PLAN)
    for words in (
        "Model fits 1× RTX 4090", "20 GiB of 24 GiB", "routed experts", "110,468,824,832", "13.42B active",
        "8,192 tokens, 4 sequences that share 32,768", "1,000 bytes per token (bf16)", "131,072 tokens",
        "72% of those", "12.3 tok/s", "6.91 – 12.8", "gpu memory", "--quant int4: smaller is faster",
        "a note on the choice", "modelled: run doctor", "1008 GB/s", "exact", "measured", "modelled",
    ):  # fmt: skip
        assert words in text, words
    assert "2 × 1 GiB" not in text
    assert "2 × 1 GiB (exact)" in _rendered(PLAN, 200, explain=True)
    assert "2,147,483,648 B" in _rendered(PLAN, 200, explain=True)


def test_a_pack_on_the_disk_is_told_from_the_download() -> None:
    assert "161 GiB: the download and the pack of experts" in _rendered(replace(PLAN, disk_bytes=161 * GIB))
    assert "the pack" not in _rendered(PLAN)


def test_a_report_of_what_does_not_fit_begins_with_what_is_missing() -> None:
    lines = _rendered(TOO_LARGE).splitlines()
    assert lines[0] == "Model does not fit 1× RTX 4090"
    assert lines[1] == "Model needs 19 GiB but 10 GiB can be used: 9 GiB are missing"
    assert "!!!" in _rendered(TOO_LARGE)
    assert "what would fit, smallest change first" in lines
    assert "tok/s" not in _rendered(TOO_LARGE)


def test_a_table_of_plans_fits_eighty_columns() -> None:
    rows = [("x" * 90, "GPU + RAM + NVMe", "1,048,576", "12.3", "1.371 TiB"), ("モデル", "GPU", "", "", "1 GiB")]
    lines = list(plan_table.table(("model", "where", "context", "tok/s", "download"), rows, 80))
    assert max(map(cell_len, lines)) == 80
    assert lines[1].split() == ["x" * 33, "GPU", "+", "RAM", "+", "NVMe", "1,048,576", "12.3", "1.371", "TiB"]
    assert "".join(line.split()[0] for line in lines[1:4]) == "x" * 90  # folded, nothing lost
    assert [cell_len(line) for line in (lines[0], lines[4])] == [80, 80]  # wide characters count twice
    assert lines[0].endswith("download")


def test_words_are_on_the_left_of_their_column_and_numbers_on_the_right() -> None:
    lines = list(plan_table.table(("model", "where", "context"), [("GLM", "GPU", "8")], 80))
    assert lines == ["model  where  context", "GLM    GPU          8"]


def test_a_narrow_screen_folds_names_only() -> None:
    lines = list(plan_table.table(("model", "where"), [("GLM", "GPU + RAM")], 5))
    assert lines == ["m  where", "o", "d", "e", "l", "G  GPU + RAM", "L", "M"]


def test_a_table_is_plain_text_in_a_pipe_and_dims_its_headings_on_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pipe, screen = io.StringIO(), Screen()
    for out in (pipe, screen):
        plan_table.show_many(("model", "where"), [("GLM", "GPU")], ["a note"], out)
    assert pipe.getvalue() == "model  where\nGLM    GPU\n\na note\n"
    assert screen.getvalue() == "\x1b[2mmodel  where\x1b[22m\nGLM    GPU\n\n\x1b[2ma note\x1b[22m\n"


def test_every_figure_is_explained() -> None:
    rows = list(content.explanations(PLAN))
    hits = [row for row in rows if row[1] == "experts at hand"]
    assert [(row[2], "no route trace" in row[3]) for row in hits] == [(f"{PLAN.forecast.hit_rate:.0%}", True)]
    assert len(rows) == sum(len(device.lines) for device in PLAN.devices) + len(list(content.speeds(PLAN))) + 1
    assert ("gpu:0 RTX 4090", "attention, bf16", "2,147,483,648 B", "2 × 1 GiB (exact)") in rows


@pytest.mark.parametrize("plan", [PLAN, TOO_LARGE, STRANGE], ids=["fits", "does not fit", "strange"])
def test_markdown_is_whole_tables(plan: Plan) -> None:
    text = plan_markdown.document(plan, explain=True)
    assert text.count("# ") >= 4
    assert ("**Model needs 19 GiB" in text) == (plan is TOO_LARGE)
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table if line}
        assert len(columns) == 1, table
    assert "<b>" not in re.sub("`[^`]*`", "", text)  # in code it is text
    assert "\x1b" not in text
    assert ("\\*x\\*" in text) == (plan is STRANGE)


@pytest.mark.parametrize("plan", [PLAN, TOO_LARGE, STRANGE], ids=["fits", "does not fit", "strange"])
def test_the_picture_is_well_formed_and_in_proportion(plan: Plan) -> None:
    root = ET.fromstring(plan_svg.picture(plan))
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg"
    assert {element.tag for element in root.iter()} <= {
        f"{name}{tag}" for tag in ("svg", "rect", "text", "title", "line")
    }
    height = float(root.get("height", 0))
    for element in root.iter():
        assert float(element.get("y", 0)) < height
    drawn = [(e[0].text or "", float(e.get("width", 0))) for e in root.iter(f"{name}rect") if len(e)]
    whole = max(plan.devices[0].capacity_bytes, plan.devices[0].used_bytes)
    kv = next(width for title, width in drawn if title.startswith("KV cache: 4 GiB"))
    assert kv == pytest.approx(4 * GIB / whole * 530, abs=0.01)
    left = next(float(e.get("x", 0)) for e in root.iter(f"{name}rect") if len(e) and "KV cache" in (e[0].text or ""))
    assert left == pytest.approx(180 + 14 * GIB / whole * 530, abs=0.01)
    assert bool(list(root.iter(f"{name}line"))) == (plan is TOO_LARGE)


# The command


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")


H100S = ("--gpus", "2xH100", "--ram", "1TB@200")


def test_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "GLM-4.5-Air-FP8", *H100S]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("GLM-4.5-Air-FP8 fits 2× H100\n")
    assert err == ""


def test_a_model_that_does_not_fit_exits_with_2_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "GLM-4.5-BF16", "--gpus", "8xH100", "--ram", "1TB@200", "--quant", "keep", "--no-offload"]) == 2
    )
    out, err = capsys.readouterr()
    assert out.startswith("GLM-4.5-BF16 does not fit 8× H100\n")
    first = out.split("what would fit, smallest change first\n")[1].split("\n")[0]
    assert "--cpu-offload-gb" in first
    assert err == ""


def test_json_saved_and_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "计划.svg"
    assert main(["plan", "GLM-4.5-Air-FP8", *H100S, "--json", "--save", str(file), "--svg", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert file.read_text() == printed
    values = json.loads(printed)
    assert values["fits"] is True
    assert values["model"]["total_params"] == 110_468_824_832
    assert values["kv_bytes_per_token"] > 0
    assert values["devices"][0]["lines"][0].keys() >= {"what", "bytes", "basis"}
    assert values["forecast"]["decode_tokens_per_s"].keys() >= {"0", "8192", "32768"}
    ET.fromstring(picture.read_text("utf-8"))
    assert main(["plan", "GLM-4.5-Air-FP8", *H100S]) == 0
    report = capsys.readouterr().out
    assert main(["plan", str(file)]) == 0
    assert capsys.readouterr().out == report
    assert main(["plan", str(file), "--compare"]) == 2
    assert "as it is" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "计划.svg"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    assert main(["plan", "GLM-4.5-Air-FP8", *H100S, "--svg", str(tmp_path / "there")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_damaged_plan_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for data in (b"", b"{}", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(data)
        assert main(["plan", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_family_becomes_the_release_that_suits_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "GLM-4.5-Air", "--gpus", "2xH100", "--ram", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("GLM-4.5-Air-FP8 fits")
    assert "is a family of" in out
    assert main(["plan", "glm-4.5-air", "--gpus", "4xH100", "--ram", "1TB"]) == 0
    assert capsys.readouterr().out.startswith("GLM-4.5-Air-BF16 fits")
    assert main(["plan", "GLM-4.5-Air", "--gpus", "none", "--ram", "96GiB@60", "--nvme", "none"]) == 0
    assert capsys.readouterr().out.startswith("GLM-4.5-Air-GGUF:Q4_K_M fits 96 GiB of RAM")


def test_quant_leaves_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for quant, beginning in (
        ("keep", "GLM-4.5-Air-BF16 "),
        ("int8", "GLM-4.5-Air-FP8 as int8 "),
        ("int4", "GLM-4.5-Air-FP8 as int4 "),
    ):
        main(["plan", "GLM-4.5-Air", "--gpus", "4xH200", "--ram", "1TB", "--quant", quant])
        assert capsys.readouterr().out.startswith(beginning)


def test_compare_shows_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "GLM-4.5-Air", *H100S, "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:40].strip(): line for line in lines[1:]}
    assert "GPU + RAM" in rows["GLM-4.5-Air-BF16"]
    assert "131,072" in rows["GLM-4.5-Air-FP8 as int4"]
    assert "GLM-4.5-Air-GGUF:Q4_K_M" in rows
    assert max(map(len, lines[: len(rows) - 2])) <= 80
    assert main(["plan", "GLM-4.5-BF16", "--gpus", "1xL4", "--ram", "16GiB", "--compare"]) == 2
    assert "does not fit" in capsys.readouterr().out


def test_without_a_model_every_known_release_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from glmlocal import catalogue

    assert main(["plan", *H100S, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [release.name for release in catalogue.releases()]
    by_name = {row["name"]: row for row in rows}
    air = by_name["GLM-4.5-Air-FP8"]
    assert air["fits"] and air["runs"] and air["where"] == "GPU"  # noqa: PT018
    assert air["low"] < air["decode_tokens_per_s"] < air["high"]
    glm5 = by_name["GLM-5-BF16"]
    assert (glm5["fits"], glm5["runs"], glm5["decode_tokens_per_s"]) == (False, False, None)
    assert main(["plan", *H100S]) == 0
    text = capsys.readouterr().out
    assert "[GLM-5-BF16]" in text
    assert main(["plan", *H100S, "--markdown"]) == 0
    assert "| GLM-4.5-Air-FP8 | GPU | 131,072 |" in capsys.readouterr().out


def test_releases_that_a_wish_rules_out_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8xB200", "--ram", "1TB", "--context", "150000", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert "GLM-4.6-FP8" in names
    assert "GLM-4.5-FP8" not in names  # 131,072 at most
    assert main(["plan", "GLM-4.6", *H100S, "--draft", "1", "--compare"]) == 0
    out = capsys.readouterr().out
    assert "GLM-4.6-FP8" in out
    assert "left out, for example: --draft is 1" in out.replace("\n", " ")
    assert main(["plan", *H100S, "--context", "9999999"]) == 2
    assert "--context is 9999999" in capsys.readouterr().err


def test_what_can_be_loaded_in_one_way_only_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.quant for f in subject("GLM-4.5-Air-GGUF:Q4_K_M").footprints] == ["keep"]
    assert [f.quant for f in subject("GLM-4.5-Air-FP8").footprints] == ["keep", "int4"]
    assert [f.quant for f in subject("zai-org/GLM-4.5-Air").footprints] == ["keep", "int8", "int4"]
    monkeypatch.chdir(tmp_path)
    model = tiny.save(tiny.build_model(), Path("GLM-4.5-Ai"))  # what exists counts, not what it is near to
    made = subject(str(model)).footprints
    assert made[0].name == "GLM-4.5-Ai"
    assert len({sum(layer.nbytes for layer in f.layers) for f in made}) == len(made)


def test_what_this_version_does_not_run_is_planned_and_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "GLM-5-FP8", "--gpus", "8xH200"]) == 0
    assert "the architecture of GLM-5 but does not run it" in capsys.readouterr().out
    assert main(["plan", "GLM-4.5-Air-AWQ-FP16Mix", *H100S]) == 0
    assert "does not run it" not in capsys.readouterr().out


def test_the_demo_is_called_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf = tmp_path / "demo-glm4moe.gguf"
    tiny_gguf.convert(tiny.save(tiny.build_model(), tmp_path / "source"), gguf, "F32")
    monkeypatch.setattr("glmlocal.demo.cache.ensure_demo", lambda **_: gguf)
    assert [footprint.name for footprint in subject("demo").footprints][:1] == ["demo"]
    assert subject(str(gguf)).footprints[0].name == "demo-glm4moe.gguf"


def test_a_checkpoint_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path / "模型 1")
    assert main(["plan", str(directory), "--gpus", "none", "--ram", "8GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "模型 1"


def test_a_model_that_is_on_its_hub_only_is_planned_from_its_headers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny.save(tiny.build_model(), tmp_path / "own")
    with HubServer() as server:
        # Its name is near to a release's: what exists on a hub is not a mistake for that.
        server.add("somebody/GLM-4.5-Air-tuned", {path.name: path.read_bytes() for path in own.iterdir()})
        monkeypatch.setattr(pull, "connect", lambda name, *_: huggingface(server, tmp_path / "cache"))
        here = ["--gpus", "none", "--ram", "8GiB"]
        assert main(["plan", "somebody/GLM-4.5-Air-tuned", *here, "--json"]) == 0
        remote = json.loads(capsys.readouterr().out)
        assert main(["plan", "somebody/GLM-4.5-Air-tuned", *here]) == 0
        assert "no weights were downloaded" in " ".join(capsys.readouterr().out.split())
        assert main(["plan", "zai-org/GLM-4.5-Airr", *here]) == 2
        refused = capsys.readouterr().err
        assert main(["plan", "GLM-4.5-Airr", *here]) == 2  # no hub id: nobody is asked
        assert "there is no model 'GLM-4.5-Airr'; did you mean" in capsys.readouterr().err
    assert main(["plan", str(own), *here, "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert remote["model"].pop("name") == "somebody/GLM-4.5-Air-tuned"
    assert local["model"].pop("name") == "own"
    assert (remote["model"], remote["devices"]) == (local["model"], local["devices"])
    assert "did you mean GLM-4.5-Air-BF16" in refused
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (("GLM-4.5-Air-FP8", "--gpus", "2xH100", "--engine", "vllm"), "vllm serve zai-org/GLM-4.5-Air-FP8"),
        (("GLM-4.5", "--gpus", "16xH100", "--engine", "vllm"), "vllm serve zai-org/GLM-4.5 "),
        (("GLM-4.5", "--gpus", "8xH100", "--engine", "vllm"), "vllm serve zai-org/GLM-4.5-FP8 "),
        (("GLM-4.5", "--gpus", "8xH100", "--engine", "vllm", "--cpu-offload-gb", "16"), "vllm serve zai-org/GLM-4.5 "),
        (("zai-org/GLM-4.5", "--gpus", "8xH100", "--engine", "vllm"), "vllm serve zai-org/GLM-4.5 "),
        (("GLM-5-FP8", "--gpus", "8xH200", "--engine", "sglang"), "python3 -m sglang.launch_server"),
    ],
)
def test_engines(words: tuple[str, ...], beginning: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    command = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert " ".join(line.rstrip("\\").strip() for line in command).startswith(beginning)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("GLM-4.5-Ari",), "did you mean GLM-4.5-Air"),
        (("GLM-4.5-Air", "--gpus", "2xFOO"), "no GPU 'FOO'"),
        (("GLM-4.5-Air", "--gpus", "0xH100"), "1 to 64"),
        (("GLM-4.5-Air", "--gpus", "-1xH100"), "--gpus '-1xH100' asks for -1 GPUs; give 1 to 64, or none"),
        (("GLM-4.5-Air", "--ram", "-4GiB"), "'-4GiB' is negative for --ram; write for example 24GiB"),
        (("GLM-4.5-Air", "--ram=-4GiB"), "'-4GiB' is negative for --ram"),
        (("GLM-4.5-Air", "--nvme", "-2TB@7"), "'-2TB' is negative for --nvme"),
        (("GLM-4.5-Air", "--nvme", "2TB@-7"), "cannot read '-7' as GB/s for --nvme"),
        (("GLM-4.5-Air", "--vram", "-1GiB"), "'-1GiB' is negative"),
        (("GLM-4.5-Air", "--context", "-5K"), "wanted a whole number of at least 1"),
        (("GLM-4.5-Air", "--context", "٣٢٠٠٠"), "32768, 32K or 1M, found '٣٢٠٠٠'"),
        (("GLM-4.5-Air", "--context", "1_000"), "found '1_000'"),
        (("GLM-4.5-Air", "--context", "9" * 5000), "wanted a whole number"),
        (("GLM-4.5-Air", "--context", "1M"), "--context is 1048576, wanted 2 to 131072"),
        (("GLM-4.5-Air", "--batch", "٣"), "found '٣'"),
        (("GLM-4.5-Air", "--context", "256K"), "--context is 262144, wanted 2 to 131072"),
        (("GLM-4.5-Air", "--ram", "--json"), "expected one argument"),
        (("GLM-4.5-Air", "--ram", "nan@inf"), "--ram"),
        (("GLM-4.5-Air", "--nvme", "1e99TB"), "--nvme"),
        (("GLM-4.5-Air", "--link", "pcie9x9"), "pcie4x16"),
        (("GLM-4.5-Air", "--context", "999999999"), "131072"),
        (("GLM-4.5-Air", "--engine", "tgi"), "vllm"),
        (("/nowhere/at/all", "--engine", "vllm"), "for example GLM-4.5-Air-FP8"),
        (("GLM-4.5-Air", "--gpus", "1xL4", "--engine", "sglang"), "would hold it"),
        (("--explain",), "wants a MODEL"),
        (("GLM-4.5-Air", "--compare", "--svg", "x.svg"), "leave out --compare"),
        (("GLM-4.5-Air", "--json", "--markdown"), "not allowed with"),
        (("",), "name is empty"),
        (("GLM-4.5-Air", "--svg", "/nowhere/x.svg"), "cannot write '/nowhere/x.svg'"),
        (("\0",), "error"),
        (("x" * 5000,), "error"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


HEAVY = {"torch", "numpy", "transformers", "pydantic", "httpx", "psutil"}


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["GLM-4.5-Air"], HEAVY),
        (["GLM-4.5-Air", "--gpus", "2xH100", "--json"], {*HEAVY, "rich"}),
        (["GLM-4.5-Air-FP8", "--gpus", "2xH100", "--engine", "vllm"], {*HEAVY, "rich"}),
        ([], HEAVY),
    ],
)
def test_planning_needs_nothing_heavy(words: list[str], heavy: set[str]) -> None:
    code = (
        f"import sys; from glmlocal.cli.main import main; main(['plan', *{words}]); "
        "print(sorted({name.split('.')[0] for name in sys.modules}), 'rich.table' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, _, has_tables = done.stdout.splitlines()[-1].rpartition(" ")
    assert "'glmlocal'" in loaded
    assert not {name for name in heavy if f"'{name}'" in loaded}
    assert has_tables == ("True" if words == ["GLM-4.5-Air"] else "False")  # the list has its own, which are quicker


@pytest.mark.parametrize(
    ("words", "most_s"),
    [
        (("GLM-4.5-Air",), 0.4),
        (("GLM-4.5-Air", *H100S, "--explain"), 0.5),
        (H100S, 0.9),  # every release; took 1.0 when each layout's ledger was written, in the search for a context too
    ],
)
def test_planning_takes_little_of_the_processor(words: tuple[str, ...], most_s: float, tmp_path: Path) -> None:
    """The least of five runs with bytecode at hand: other work on the machine makes even CPU time longer. Twice what
    two 2 GHz cores of a server take when nothing else runs."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "glmlocal", "plan", *words],
            capture_output=True, check=False, env={**environment, "PYTHONPYCACHEPREFIX": str(tmp_path)},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times[1:]) < most_s


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--gpus", "8xH100"), "--gpus"),
        (("--ram", "64GiB"), "--ram"),
        (("--context", "4096"), "--context"),
        (("--batch", "2"), "--batch"),
        (("--quant", "int4"), "--quant"),
        (("--no-offload",), "--no-offload"),
        (("--cpu-offload-gb", "0"), "--cpu-offload-gb"),
        (("--compare",), "--compare"),
        (("--engine", "vllm"), "--engine"),
    ],
)
def test_a_saved_plan_is_not_planned_anew(
    more: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Options that would change it are refused, not ignored."""
    file = tmp_path / "plan.json"
    assert main(["plan", "GLM-4.5-Air-FP8", *H100S, "--ram", "64GiB", "--save", str(file)]) == 0
    capsys.readouterr()
    assert main(["plan", str(file), "--explain"]) == 0
    capsys.readouterr()
    assert main(["plan", str(file), *more]) != 0
    error = capsys.readouterr().err
    assert f"without {named};" in error
    assert error.count("\n") == 1
