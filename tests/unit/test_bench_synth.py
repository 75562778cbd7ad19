"""benchmarks/synth.py: what it writes loads elsewhere, has the true shapes, and behaves as asked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import synth
from synthetic import gguf_file, pieces, safetensors_dir, storage
from synthetic.model import SHAPES, Bigram, build_bigram, popularity
from synthetic.text import build_vocabulary

from glmlocal.errors import ConfigError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import reference
from glmlocal.llm import LLM
from loading import load_engine

FORMATS = ("gguf-q4_0", "gguf-q8_0", "safetensors-bf16", "safetensors-fp8")
TABLE_CODECS = [storage.BF16(), storage.Q4_0(), storage.Q8_0()]


def write_tiny(directory: Path, file_format: str = "safetensors-bf16", **wishes: Any) -> Path:
    return synth.write(synth.make_spec("tiny", file_format, **wishes), directory / "out")


def hf_model(directory: Path) -> Glm4MoeForCausalLM:
    # The loading report names the MTP layer, which transformers does not load, on stderr.
    return Glm4MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def hf_tensors(directory: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("GLM-4.5-Air", 106_852_251_264), ("GLM-4.5", 352_797_829_024), ("GLM-4.7", 352_797_829_024)],
)
def test_full_depth_has_the_published_number_of_parameters(model: str, parameters: int) -> None:
    spec = synth.make_spec(model, "safetensors-bf16")
    assert (
        sum(piece.nbytes // (4 if piece.dtype == "F32" else 2) for piece in safetensors_dir.pieces(spec)) == parameters
    )


def test_mtp_layer_of_air_has_the_published_number_of_parameters() -> None:
    spec = synth.make_spec("GLM-4.5-Air", "gguf-q4_0", layers=2, mtp_acceptance=0.8)
    weights = sum(np.prod(piece.shape) for piece in gguf_file.pieces(spec) if piece.name.startswith("blk.2."))
    copies = 2 * 151552 * 4096  # of embedding and head, which we do not write
    assert weights == 3_616_573_568 - copies


def test_five_layers_of_air_in_q4_0_are_about_6_gb() -> None:
    spec = synth.make_spec("GLM-4.5-Air", "gguf-q4_0", layers=5)
    assert sum(piece.nbytes for piece in gguf_file.pieces(spec)) == pytest.approx(6.1e9, rel=0.01)


@pytest.mark.parametrize("codec", [*TABLE_CODECS, storage.FP8()], ids=lambda codec: codec.name)
def test_random_rows_have_mean_zero_and_the_wanted_size(codec: Any) -> None:
    std = np.array([0.5] * 512 + [0.01] * 512, np.float32)
    rows = codec.random(np.random.default_rng(0), std, 256)
    assert rows.shape == (1024, codec.row_bytes(256))
    if isinstance(codec, storage.FP8):
        scales = [storage.fp8_scales(np.random.default_rng(1), size, 512) for size in (0.5, 0.01)]
        codes = torch.from_numpy(rows).view(torch.float8_e4m3fn).float().numpy()
        values = codes * np.concatenate(scales)[:, None]
    else:
        values = codec.decode(rows)
    assert np.isfinite(values).all()
    for part, size in ((values[:512], 0.5), (values[512:], 0.01)):
        assert part.std() == pytest.approx(size, rel=0.03)
        assert abs(part.mean()) < 0.02 * size


def test_q8_0_never_holds_minus_128() -> None:
    rows = storage.Q8_0().random(np.random.default_rng(0), np.ones(512, np.float32), 512)
    assert rows.reshape(512, -1, 34)[..., 2:].view(np.int8).min() == -127


@pytest.mark.parametrize("codec", TABLE_CODECS, ids=lambda codec: codec.name)
def test_halving_is_exact_and_marks_stand_out(codec: storage.TableCodec) -> None:
    rows = codec.random(np.random.default_rng(0), np.ones(200, np.float32), 128)
    assert np.array_equal(codec.decode(codec.halve(rows, 6)), codec.decode(rows) / 64)
    marked = np.random.default_rng(1).random(200) < 0.5
    before = codec.decode(rows)
    codec.mark(rows, marked)
    after = codec.decode(rows)
    assert (after[~marked, 0] == 0).all()
    assert after[marked, 0].min() > 0.85
    assert np.array_equal(before[:, 1:], after[:, 1:])


def test_popularity_is_zipf_like_and_sums_to_top_k() -> None:
    assert popularity(128, 8, 0) == pytest.approx(np.full(128, 8 / 128))
    shares = popularity(128, 8, 1.0)
    assert shares.sum() == pytest.approx(8)
    assert shares[0] == pytest.approx(0.95)
    assert shares[9] / shares[19] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_router_of_air_has_the_chosen_skew(skew: float) -> None:
    spec = synth.make_spec("GLM-4.5-Air", "gguf-q4_0", layers=2, skew=skew, seed=5)
    router, bias = (
        next(piece for piece in gguf_file.pieces(spec) if piece.name == name)
        for name in ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias")
    )
    weight = router.tensor.fill.rows(router.codec, np.random.default_rng(5), slice(0, 128), 4096, {}.__getitem__)
    correction = bias.tensor.fill.rows(bias.codec, np.random.default_rng(5), slice(0, 1), 128, {}.__getitem__)
    topk_ids, _ = reference.router_topk(
        torch.randn(8192, 4096, generator=torch.Generator().manual_seed(1))
        @ torch.from_numpy(weight.view(np.float32)).T,
        torch.from_numpy(correction.view(np.float32)[0]),
        top_k=8,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    shares = np.sort(np.bincount(topk_ids.flatten().numpy(), minlength=128) / 8192)[::-1]
    assert np.abs(shares - popularity(128, 8, skew)).max() < 0.03
    assert 0 < np.abs(correction.view(np.float32)).max() < 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, file_format: str) -> None:
    def content(seed: int, name: str) -> bytes:
        path = write_tiny(tmp_path / name, file_format, seed=seed, mtp_acceptance=0.5)
        return (path / "model.safetensors" if path.is_dir() else path).read_bytes()

    first = content(0, "a")
    assert first == content(0, "b")
    assert first != content(1, "c")


@pytest.mark.parametrize(("file_format", "linear"), [("gguf-q4_0", "Q4_0"), ("gguf-q8_0", "Q8_0")])
def test_gguf_stores_each_kind_of_tensor_as_llama_cpp_would(tmp_path: Path, file_format: str, linear: str) -> None:
    reader = GGUFReader(write_tiny(tmp_path, file_format, mtp_acceptance=0.5))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.2.ffn_down_exps.weight"] == linear
    assert kinds["blk.4.nextn.eh_proj.weight"] == "Q8_0"
    rest = {name for name, kind in kinds.items() if kind == "F32"}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.0.attn_q.bias", "output_norm.weight"} <= rest
    assert reader.fields["glm4moe.block_count"].contents() == 5
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 1024
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        assert np.abs(values).max() > 0, tensor.name


def test_chunks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 10_000)
    reader = GGUFReader(write_tiny(tmp_path, "gguf-q8_0", mtp_acceptance=0.5))
    by_name = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    bigram = tiny_bigram(0.5)
    words = np.flatnonzero(bigram.previous >= 0)
    embedding, head = by_name["token_embd.weight"], by_name["output.weight"]
    assert np.array_equal(head[words], embedding[bigram.previous[words]] / 16)


def test_transformers_loads_bf16_and_activations_are_sane(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, seed=2)
    model, info = Glm4MoeForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    ids = torch.randint(300, 800, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(ids, output_hidden_states=True)
    sizes = [float(states.std()) for states in out.hidden_states]
    assert all(0.8 < size < 2.5 for size in sizes), sizes
    assert 1 < out.logits.std() < 5
    assert out.logits.abs().max() < 40


def test_sharded_safetensors_load_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hf_tensors(write_tiny(tmp_path / "whole"))
    monkeypatch.setattr(safetensors_dir, "SHARD_BYTES", 500_000)
    path = write_tiny(tmp_path / "sharded", mtp_acceptance=None)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    parts = hf_tensors(path)
    assert len(set(index["weight_map"].values())) > 3
    assert set(index["weight_map"]) == set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    hf_model(path)


def test_fp8_is_compressed_tensors_style(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "safetensors-fp8", mtp_acceptance=0.5)
    tensors = hf_tensors(path)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn
    assert tensors[f"{name}_scale"].shape == (128, 1)
    assert tensors[f"{name}_scale"].dtype == torch.float32
    assert tensors[f"{name}_scale"].unique().numel() > 32
    weight = tensors[name].float() * tensors[f"{name}_scale"]
    assert float(weight.std()) == pytest.approx((64 * 4) ** -0.5, rel=0.1)
    exact = {n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == torch.bfloat16 and t.ndim == 2}
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert exact == {*config["ignore"], "model.embed_tokens"}
    assert config["quant_method"] == "compressed-tensors"


def tiny_bigram(acceptance: float, seed: int = 0) -> Bigram:
    vocabulary = build_vocabulary(1024)
    words = range(vocabulary.first_word, vocabulary.first_special)
    return build_bigram(words, 1024, acceptance, np.random.default_rng([seed, 1]))


def test_fp8_runs_as_fp8_and_gives_the_logits_of_its_weights(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "safetensors-fp8", mtp_acceptance=0.5)
    tokens = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with LLM(path, context=64) as llm:
        got = llm.logits(tokens)
    model = load_engine(open_checkpoint(path), context=64, draft=1).runner.model
    assert model.layers[1].experts.weights.up[3].kind == "fp8_channel"
    assert model.mtp[0].layer.experts.weights.up[0].kind == "fp8_channel"
    assert {model.lm_head.weight.kind, model.mtp[0].eh_proj.weight.kind} == {"bf16"}

    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        scale = tensors.pop(name)
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight].float() * scale
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({name: tensor.float() for name, tensor in tensors.items()}, wide / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (wide / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        want = hf_model(wide)(torch.tensor([tokens])).logits[0]
    assert float((got - want).abs().max()) < 1e-4 * float(want.max() - want.min())


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_bigram_is_one_cycle_with_an_exact_share_of_marks(acceptance: float) -> None:
    bigram = tiny_bigram(acceptance)
    words = np.flatnonzero(bigram.previous >= 0)
    token, seen = int(words[0]), set()
    while token not in seen:
        seen.add(token)
        token = int(bigram.following[token])
    assert seen == set(words.tolist())
    assert abs(bigram.marked.sum() - (1 - acceptance) * len(words)) <= 1
    assert not bigram.marked[bigram.previous[bigram.wrong_word]]


def mtp_drafts(path: Path, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft after each token and the hidden state to recycle, by the MTP layer as a one-layer transformers model.

    tokens int64 [n] are t_(i+1), hidden fp32 [n, hidden] are the main model's final states of t_i.
    """
    raw = {name: tensor.float() for name, tensor in hf_tensors(path).items()}
    config = Glm4MoeConfig.from_pretrained(path)
    layer = f"model.layers.{config.num_hidden_layers}."
    config.num_hidden_layers, config.first_k_dense_replace = 1, 0
    own = {f"model.layers.0.{name.removeprefix(layer)}": t for name, t in raw.items() if name.startswith(layer)}
    own |= {"lm_head.weight": raw["lm_head.weight"], "model.embed_tokens.weight": raw["model.embed_tokens.weight"]}
    glue = {
        name: own.pop(f"model.layers.0.{name}.weight") for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    }
    own["model.norm.weight"] = glue["shared_head.norm"]
    model = Glm4MoeForCausalLM(config).eval()
    experts = "model.layers.0.mlp.experts."
    gate, up, down = (
        torch.stack([own.pop(f"{experts}{e}.{part}_proj.weight") for e in range(16)]) for part in ("gate", "up", "down")
    )
    own |= {f"{experts}gate_up_proj": torch.cat([gate, up], 1), f"{experts}down_proj": down}
    model.load_state_dict(own)
    norm = reference.rms_norm
    embedded = norm(raw["model.embed_tokens.weight"][tokens], glue["enorm"], 1e-5)
    z = torch.cat([embedded, norm(hidden, glue["hnorm"], 1e-5)], -1) @ glue["eh_proj"].T
    with torch.no_grad():
        out = model(inputs_embeds=z[None], output_hidden_states=True)
    return out.logits[0].argmax(-1), out.hidden_states[-1][0]


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_mtp_layer_is_right_as_often_as_asked(tmp_path: Path, acceptance: float) -> None:
    path = write_tiny(tmp_path, mtp_acceptance=acceptance)
    bigram = tiny_bigram(acceptance)
    words = np.flatnonzero(bigram.previous >= 0)
    text = [int(words[7])]
    for _ in range(len(words)):
        text.append(int(bigram.following[text[-1]]))  # once round the cycle
    tokens = torch.tensor(text)
    with torch.no_grad():
        out = hf_model(path)(tokens[None], output_hidden_states=True)
    assert torch.equal(out.logits[0, :-1].argmax(-1), tokens[1:]), "the model must follow the cycle"
    drafts, recycled = mtp_drafts(path, tokens[1:-1], out.hidden_states[-1][0, :-2])
    right = drafts == tokens[2:]
    assert torch.equal(right, ~torch.from_numpy(bigram.marked)[tokens[1:-1]])
    assert float(right.float().mean()) == pytest.approx(acceptance, abs=0.01)
    second, _ = mtp_drafts(path, drafts[:-1], recycled[:-1])  # draft 2 from draft 1 and its own hidden state
    both = right[:-1] & (second == tokens[3:])
    assert float(both.float().mean()) == pytest.approx(acceptance**2, abs=0.06)


def test_tokenizers_of_both_formats_agree_and_round_trip(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = GGUFReader(write_tiny(tmp_path / "gguf", "gguf-q4_0")).fields["tokenizer.ggml.tokens"].contents()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == tokens[: len(tokenizer)]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 1024 - (151552 - 151329)
    text = "the house of 北京, naïve 12345\n\t😀" + tokenizer.decode([400, 500])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[-2:] == [400, 500]
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert prompt == "[gMASK]<sop><|system|>\nS<|user|>\nU/nothink<|assistant|>\n<think></think>"


def test_special_tokens_of_the_real_vocabulary_have_their_published_ids() -> None:
    vocabulary = build_vocabulary(151552)
    assert vocabulary.eos_token_ids == [151329, 151336, 151338]
    assert vocabulary.tokens.index("<think>") == 151350
    assert vocabulary.tokens.index("/nothink") == 151360
    assert vocabulary.num_tokens == 151365
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == len(vocabulary.token_types()) == 151552
    tokenizer = Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json()))
    assert tokenizer.encode("<|user|>", add_special_tokens=False).ids == [151336]


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        ({"layers": 1}, "--layers is 1, wanted 2"),
        ({"layers": 5}, "--layers is 5"),
        ({"vocab": 1000}, "--vocab is 1000"),
        ({"vocab": 1030}, "--vocab is 1030"),
        ({"skew": -1.0}, "--skew is -1"),
        ({"skew": float("nan")}, "--skew is nan"),
        ({"mtp_acceptance": 1.5}, "--mtp-acceptance is 1.5"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_bad_wishes_are_refused(wishes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        synth.make_spec("tiny", "gguf-q4_0", **wishes)


@pytest.mark.parametrize("file_format", ["gguf-q4_0", "safetensors-bf16"])
def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file_format: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert synth.main(["--model", "tiny", "--format", file_format, "--out", str(tmp_path / "m")]) == 2
    assert "has 4.883 KiB free" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("file_format", ["gguf-q4_0", "safetensors-bf16"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    calls = iter(range(100))

    def random(*args: Any) -> Any:
        if next(calls) > 5:
            raise KeyboardInterrupt
        return original(*args)

    codec = storage.Q4_0 if file_format == "gguf-q4_0" else storage.BF16
    original = codec.random
    monkeypatch.setattr(codec, "random", random)
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path, file_format)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_existing_output_is_kept(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "gguf-q4_0")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_tiny(tmp_path, "gguf-q4_0", seed=1)
    assert path.read_bytes() == before
    assert GGMLQuantizationType.Q4_0 in {tensor.tensor_type for tensor in GGUFReader(path).tensors}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        synth.write(synth.make_spec("tiny", "safetensors-bf16"), tmp_path / "hf")


def test_every_member_of_the_family_is_offered() -> None:
    assert set(SHAPES) == {"GLM-4.5", "GLM-4.5-Air", "GLM-4.6", "GLM-4.7", "tiny"}
