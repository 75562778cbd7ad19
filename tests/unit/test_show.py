from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crafted import STRING, TINY, U32, tiny_gguf, tiny_tensors, write_checkpoint
from glmlocal.cli import show
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import open_checkpoint

CONFIG = {**TINY, "num_experts_per_tok": 1}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "release", CONFIG, tiny_tensors(CONFIG), shards=2)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    show.add_parser(parser.add_subparsers())
    return show.run(parser.parse_args(["show", *arguments]))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    return json.loads(shown(capsys, str(path), "--json"))  # type: ignore[no-any-return]


def test_json_says_what_the_model_is(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, release)
    arrays = tiny_tensors(TINY)
    main = {name: array for name, array in arrays.items() if ".layers.3." not in name}
    total, without_mtp = (sum(array.size for array in group.values()) for group in (arrays, main))
    idle = sum(array.size for name, array in main.items() if ".experts." in name and ".experts.0." not in name)
    assert facts["parameters"] == {
        "total": total,
        "without_mtp": without_mtp,
        "active": without_mtp - idle,
        "active_without_embeddings": without_mtp - idle - 96 * 64,
    }
    assert facts["name"] == "release"
    assert facts["format"] == "safetensors"
    assert facts["problem"] is None
    assert facts["layers"] == {"total": 3, "dense": 1, "moe": 2}
    assert facts["experts"] == {"routed": 4, "per_token": 1, "shared": 1, "groups": 1, "groups_used": 1}
    assert facts["attention"] == {
        "heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 16, "bias": True, "qk_norm": True,
    }  # fmt: skip
    assert facts["context"] == 512
    assert facts["kv_bytes_per_token"] == {"used": 3 * 2 * 2 * 32 * 4, "16bit": 3 * 2 * 2 * 32 * 2, "dtype": "fp32"}
    assert facts["mtp"] == {
        "layers": 1, "present": True, "usable": True, "problem": None, "embedding_copy": True, "head_copy": True,
    }  # fmt: skip
    assert facts["eos_token_ids"] == [1, 2]
    assert facts["chat_template"] is False
    assert facts["bytes"]["tensors"] == 4 * total
    assert facts["bytes"]["files"] == sum(file.stat().st_size for file in release.glob("*.safetensors"))
    assert [file["name"] for file in facts["files"]] == sorted(file.name for file in release.glob("*.safetensors"))


def test_the_rows_add_up(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, release)
    rows = {row["kind"]: row for row in facts["tensors"]}
    assert list(rows) == [
        "embeddings", "attention", "dense FFN", "shared experts", "routed experts", "router", "norms", "MTP", "head",
    ]  # fmt: skip
    assert sum(row["parameters"] for row in rows.values()) == facts["parameters"]["total"]
    assert sum(row["bytes"] for row in rows.values()) == facts["bytes"]["tensors"]
    assert sum(row["tensors"] for row in rows.values()) == len(tiny_tensors(TINY))
    assert rows["routed experts"]["parameters"] == 2 * 4 * 3 * 64 * 32
    assert rows["dense FFN"]["parameters"] == 3 * 64 * 96
    assert rows["router"]["parameters"] == 2 * (4 * 64 + 4)
    assert rows["norms"]["parameters"] == 3 * (2 * 64 + 2 * 32) + 64
    assert all(row["bits_per_weight"] == 32 for row in rows.values())


def test_the_documented_keys_are_the_keys(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented = (show.__doc__ or "").split("one object:")[1].split("The exit code")[0]
    for key, value in as_json(capsys, release).items():
        assert key in documented, key
        first = value[0] if isinstance(value, list) else value
        for inner in first if isinstance(first, dict) else ():
            assert inner in documented, inner


def test_quantization_is_shown_per_kind_of_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def type_of(name: str) -> str:
        if "ffn_gate_inp" in name:
            return "F32"
        if "exps" in name:
            return "Q5_1" if "down" in name else "Q4_0"
        return "Q8_0"

    path = tiny_gguf(TINY, tiny_tensors(TINY), type_of).write(tmp_path / "tiny.gguf")
    rows = {row["kind"]: row for row in as_json(capsys, path)["tensors"]}
    per_expert_matrix = 2 * 4 * 64 * 32
    assert rows["routed experts"]["dtypes"] == {
        "Q4_0": 2 * per_expert_matrix * 18 // 32,
        "Q5_1": per_expert_matrix * 24 // 32,
    }
    assert rows["routed experts"]["bits_per_weight"] == pytest.approx((4.5 + 4.5 + 6) / 3)
    assert rows["embeddings"]["bits_per_weight"] == 8.5
    text = shown(capsys, str(path))
    assert "Q4_0 60 %, Q5_1 40 %" in text
    assert "yes, 1 layer, with copies of embedding and head" in text


def test_the_text_names_what_a_person_asks_for(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(release))
    for words in (
        "release", "Glm4MoeForCausalLM", "3: 1 dense, 2 MoE", "4 routed, 1 per token, 1 shared", "hidden 64",
        "4 heads of 32 (16 rotary), 2 for keys and values, biases, qk-norm", "512 tokens",
        "1,536 bytes per token (fp32; 768 at 16 bits)", "1, 2", "2 (model-00001-of-00002.safetensors",
        "routed experts", "32.00", "without the embedding table",
    ):  # fmt: skip
        assert words in text, words


def test_a_tied_table_is_counted_as_the_head_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**TINY, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    path = write_checkpoint(tmp_path / "tied", config, tiny_tensors(config, mtp=False))
    assert "without the embedding table" not in shown(capsys, str(path))
    facts = as_json(capsys, path)
    assert facts["parameters"]["active"] == facts["parameters"]["active_without_embeddings"]
    assert facts["mtp"]["present"] is False
    assert facts["tie_word_embeddings"] is True


def test_what_cannot_be_run_is_shown_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tiny_tensors(TINY)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.uint8)
    del tensors["model.layers.3.enorm.weight"]
    path = write_checkpoint(tmp_path / "odd", TINY, tensors)
    facts = as_json(capsys, path)
    assert "lm_head.weight is F8_E4M3" in facts["problem"]
    assert facts["mtp"]["usable"] is False
    assert facts["mtp"]["present"] is True
    assert {row["kind"]: row["dtypes"] for row in facts["tensors"]}["head"] == {"F8_E4M3": 96 * 64}
    text = shown(capsys, str(path))
    assert "cannot run" in text
    assert "not usable: 1 of its" in text


def test_a_file_in_a_foreign_type_is_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_gguf(TINY, tiny_tensors(TINY)).with_tensor("output.weight", type_id=137, data=bytes(96 * 20))
    facts = as_json(capsys, file.write(tmp_path / "ik.gguf"))
    assert "IQ2_K (ggml type 137)" in facts["problem"]


EVIL = "\x1b]0;owned\x07\x1b[2J[bold red]\u009b31m\r\n"


def test_escape_sequences_of_a_file_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_gguf(TINY, tiny_tensors(TINY)).with_keys(general__name=(STRING, EVIL))
    stranger = replace(file.tensors[0], name=f"blk.0.{EVIL}")
    path = replace(file, tensors=(*file.tensors, stranger)).write(tmp_path / "evil.gguf")
    for arguments in ([str(path)], [str(path), "--json"]):
        out = shown(capsys, *arguments)
        assert "owned" in out
        assert not any(ord(c) < 32 and c != "\n" for c in out)
        assert "\x9b" not in out
        assert "\x7f" not in out
    assert "[bold red]" in shown(capsys, str(path))  # nor is it taken for markup
    assert json.loads(shown(capsys, str(path), "--json"))["name"] == EVIL


@pytest.mark.parametrize("name", ["\ud800", "x" * 100_000, ""])
def test_odd_names_are_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = name.encode("utf-8", "surrogatepass")
    path = tiny_gguf(TINY, tiny_tensors(TINY)).with_keys(general__name=(STRING, raw)).write(tmp_path / "m.gguf")
    if name == "\ud800":
        with pytest.raises(CheckpointError, match="UTF-8"):
            run(str(path))
    else:
        assert len(shown(capsys, str(path))) < 20_000


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "neither"])
def test_the_chat_template_is_found(where: str, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (release / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ x }}"} if where == "tokenizer_config.json" else {})
    )
    if where == "chat_template.jinja":
        (release / where).write_text("{{ x }}")
    assert as_json(capsys, release)["chat_template"] is (where != "neither")


def test_a_model_in_the_hubs_cache_has_its_hub_name(release: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--zai-org--GLM-4.5-Air" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    release.rename(snapshot)
    assert show.describe(open_checkpoint(snapshot))["name"] == "zai-org/GLM-4.5-Air"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norms"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.layers.2.self_attn.q_norm.weight", "norms"),
        ("model.layers.2.self_attn.q_proj.bias", "attention"),
        ("model.layers.0.mlp.gate_proj.weight", "dense FFN"),
        ("model.layers.1.mlp.gate.weight", "router"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.1.mlp.experts.3.gate_proj.weight", "routed experts"),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", "shared experts"),
        ("model.layers.3.mlp.experts.3.gate_proj.weight", "MTP"),
        ("model.layers.3.embed_tokens.weight", "MTP"),
        ("model.layers.1.unknown", "other"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert show.kind_of(name, num_hidden_layers=3) == kind


def test_absurd_metadata_is_refused(tmp_path: Path) -> None:
    file = tiny_gguf(TINY, tiny_tensors(TINY)).with_keys(glm4moe__expert_count=(U32, 2**32 - 1))
    with pytest.raises(CheckpointError, match="n_routed_experts"):
        run(str(file.write(tmp_path / "m.gguf")))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_torch_and_transformers_stay_unloaded(flags: list[str], release: Path) -> None:
    """Through the real command line, in a process of its own."""
    program = (
        "import sys; from glmlocal.cli.main import main; code = main(sys.argv[1:]);"
        "loaded = {'torch', 'transformers', 'jinja2', 'tokenizers', 'prompt_toolkit'} & sys.modules.keys();"
        "print('loaded:', sorted(loaded), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "show", str(release), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded: []\n"
    assert "release" in done.stdout
