"""GLM-5's config and tensors: those that transformers saves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import open_checkpoint
from glmlocal.models.dsa_config import DsaConfig, layer_tensors, top_tensors
from glmlocal.models.footprints import of_checkpoint

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 32,
    "first_k_dense_replace": 2,
    "index_topk_freq": 2,
    "index_skip_topk_offset": 3,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dsa")
    GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**TINY)).bfloat16().save_pretrained(directory)
    return directory


def test_tensors_are_those_that_transformers_saves(saved: Path) -> None:
    config = DsaConfig.from_hf(json.loads((saved / "config.json").read_text()))
    expected = dict(top_tensors(config))
    for i in range(config.num_hidden_layers):
        expected |= layer_tensors(config, i)
    assert expected == {name: tuple(t.shape) for name, t in load_file(saved / "model.safetensors").items()}
    assert [config.has_indexer(i) for i in range(7)] == [True, True, True, False, True, False, True]


def test_footprint_of_a_checkpoint_without_mtp(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    footprint = of_checkpoint(checkpoint)
    assert footprint.weights_bytes == checkpoint.tensors.nbytes
    assert footprint.total_params == sum(ref.num_elements for ref in checkpoint.tensors.values())
    assert footprint.mtp is None
    assert footprint.kv_bytes["bf16"] == tuple(64 + 32 * full for full in (1, 1, 1, 0, 1, 0))
    assert footprint.attention_window == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("model.layers.4.self_attn.indexer.wk.weight"),
            r"lacks the tensor .*4\.self_attn\.indexer\.wk",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)}), r"lm_head\.weight has shape \[96, 32\]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 64, dtype=torch.int8)}), r"lm_head\.weight is I8"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
            r"model\.norm\.weight is F8_E4M3",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(saved: Path, tmp_path: Path, change: Any, said: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=said):
        of_checkpoint(open_checkpoint(tmp_path))


def test_a_copy_in_the_mtp_layer_is_looked_at_too(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    config = DsaConfig.from_hf(json.loads((saved / "config.json").read_text()))
    tensors |= {name: torch.zeros(shape) for name, shape in layer_tensors(config, 6).items()}
    tensors["model.layers.6.shared_head.head.weight"] = torch.zeros(96, 64)
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    footprint = of_checkpoint(open_checkpoint(tmp_path))
    assert footprint.holds_mtp
    assert footprint.weights_bytes == open_checkpoint(tmp_path).tensors.nbytes
    tensors["model.layers.6.shared_head.head.weight"] = torch.zeros(96, 64, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight has shape \[96, 64, 1\]"):
        of_checkpoint(open_checkpoint(tmp_path))


def test_indexers_by_list_by_pattern_and_by_schedule() -> None:
    full = [0, 1, 2, *range(6, 78, 4)]
    kinds = ["full" if i in full else "shared" for i in range(78)]
    for change in (
        {"indexer_types": kinds},
        {"index_topk_pattern": "".join(kind[0].upper() for kind in kinds)},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
    ):
        config = DsaConfig.from_hf({"model_type": "glm_moe_dsa", **change})
        assert [i for i in range(79) if config.has_indexer(i)] == [*full, 78]  # 78 is MTP
    assert all(map(DsaConfig().has_indexer, range(79)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "glm5_next"}, "model_type is 'glm5_next'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "6144"}, "hidden_size is '6144'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"n_routed_experts": 10**6}, "n_routed_experts is 1000000"),
        ({"n_routed_experts": 1024, "num_hidden_layers": 129}, "at most 131072 experts in all 129 layers"),
        ({"vocab_size": 1 << 40}, "vocab_size is"),
        ({"index_topk_freq": 0}, "index_topk_freq is 0"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257"),
        ({"first_k_dense_replace": 79}, "first_k_dense_replace is 79"),
        ({"indexer_types": ["full"]}, "indexer_types is"),
        ({"indexer_types": "full"}, "indexer_types is"),
        ({"indexer_types": ["half"] * 78}, "indexer_types is"),
        ({"index_topk_pattern": "X" * 78}, "indexer_types is"),
    ],
)
def test_fields_out_of_range_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        DsaConfig.from_hf({"model_type": "glm_moe_dsa", **change})
