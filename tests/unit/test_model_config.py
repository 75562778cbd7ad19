from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from crafted import TINY, tiny_tensors, write_checkpoint
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import TensorIndex, TensorRef, open_checkpoint
from glmlocal.models.config import (
    ModelConfig,
    check_tensors,
    expected_mtp_tensors,
    expected_tensors,
    mtp_problem,
    optional_mtp_tensors,
)

# The released configs (older transformers form: rope values at the top level).
AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM_4_5: dict[str, Any] = {
    **AIR,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "use_qk_norm": True,
}
GLM_4_6: dict[str, Any] = {**GLM_4_5, "max_position_embeddings": 202752}
GLM_4_7: dict[str, Any] = {**GLM_4_6, "transformers_version": "4.57.1"}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("config", "model", "mtp", "mtp_with_copies"),
    [
        (GLM_4_5, 352_797_829_024, 3_988_069_792, 5_539_962_272),
        (GLM_4_6, 352_797_829_024, 3_988_069_792, 5_539_962_272),
        (GLM_4_7, 352_797_829_024, 3_988_069_792, 5_539_962_272),
        (AIR, 106_852_251_264, 2_375_059_584, 3_616_573_568),
    ],
)
def test_parameters_of_the_releases(config: dict[str, Any], model: int, mtp: int, mtp_with_copies: int) -> None:
    parsed = ModelConfig.from_hf(config)
    assert count(expected_tensors(parsed)) == model
    assert count(expected_mtp_tensors(parsed)) == mtp
    assert count(expected_mtp_tensors(parsed) | optional_mtp_tensors(parsed)) == mtp_with_copies


def test_whole_checkpoints_have_the_published_size() -> None:
    for config, copies, total in [
        (GLM_4_5, True, 358_337_791_296),
        (GLM_4_6, False, 356_785_898_816),
        (AIR, True, 110_468_824_832),
    ]:
        parsed = ModelConfig.from_hf(config)
        shapes = expected_tensors(parsed) | expected_mtp_tensors(parsed)
        assert count(shapes | (optional_mtp_tensors(parsed) if copies else {})) == total


def test_the_released_values_are_read() -> None:
    config = ModelConfig.from_hf(GLM_4_5)
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.n_routed_experts) == (92, 3, 160)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (96, 8, 128)
    assert (config.rope_theta, config.partial_rotary_factor, config.rotary_dim) == (1e6, 0.5, 64)
    assert (config.use_qk_norm, config.attention_bias, config.routed_scaling_factor) == (True, True, 2.5)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ((151329, 151336, 151338), 151329, None)
    air = ModelConfig.from_hf(AIR)
    assert (config.kv_bytes_per_token("bf16"), air.kv_bytes_per_token("bf16")) == (376_832, 188_416)
    assert [air.kv_bytes_per_token(dtype) for dtype in ("fp32", "fp8")] == [376_832, 94_208]
    assert air.kv_bytes_per_token("int8") == 94_208 + 2 * 46 * 8 * 4


def test_defaults_are_those_of_transformers() -> None:
    from transformers import Glm4MoeConfig

    ours, theirs = ModelConfig.from_hf({"model_type": "glm4_moe", "head_dim": 128}), Glm4MoeConfig()
    skipped = {"head_dim", "eos_token_id", "quant_method", "rope_theta", "partial_rotary_factor"}
    for field in fields(ModelConfig):
        if field.name not in skipped:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.eos_token_id == ()
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]
    assert {field.default for field in fields(ModelConfig) if field.name == "head_dim"} == {128}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1000000, "partial_rotary_factor": 0.25},
        {"rope_theta": 1000000.0, "partial_rotary_factor": 0.25, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_theta": 1e6}, "partial_rotary_factor": 0.25},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}, "partial_rotary_factor": 0.25},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_parameters": {"rope_theta": 1e6}},
        {},
        {"rope_parameters": {"rope_type": "default"}},
    ],
)
def test_both_forms_of_rope_values_mean_what_they_mean_to_transformers(rope: dict[str, Any]) -> None:
    from transformers import Glm4MoeConfig

    theirs = Glm4MoeConfig(**{key: dict(v) if isinstance(v, dict) else v for key, v in rope.items()}).rope_parameters
    ours = ModelConfig.from_hf({"model_type": "glm4_moe", "head_dim": 128, **rope})
    assert (ours.rope_theta, ours.partial_rotary_factor) == (theirs["rope_theta"], theirs["partial_rotary_factor"])


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_a_config_that_transformers_saves_is_read_back(name: str, tmp_path: Path) -> None:
    import json

    from transformers import Glm4MoeConfig

    theirs = Glm4MoeConfig(architectures=["Glm4MoeForCausalLM"], **{**tiny.BASE, **tiny.CONFIGS[name]})
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    for field in fields(ModelConfig):
        if field.name not in {"quant_method", "rope_theta", "partial_rotary_factor", "eos_token_id"}:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.eos_token_id == tuple(theirs.eos_token_id)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf({**AIR, **changes})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


NAN, INF = float("nan"), float("inf")
POSITIVE = [
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "n_group", "topk_group", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, 10**10, 10**400, NAN, INF, 46.0, "46", True, [46], {}])
@pytest.mark.parametrize("field", POSITIVE)
def test_absurd_whole_numbers_are_refused_by_name_value_and_range(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert message.startswith(f"{field} is ")
    assert "a whole number from" in message


@pytest.mark.parametrize("field", ["first_k_dense_replace", "num_nextn_predict_layers"])
def test_counts_that_may_be_zero(field: str) -> None:
    assert getattr(ModelConfig.from_hf({**AIR, field: 0}), field) == 0
    for value in (-1, 10**9, 1.0, "1", False):
        assert refusal(**{field: value}).startswith(f"{field} is ")


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, -INF, 1e300, 10**400, "1e-5", True, []])
@pytest.mark.parametrize("field", ["rms_norm_eps", "routed_scaling_factor", "rope_theta", "partial_rotary_factor"])
def test_absurd_numbers_are_refused(field: str, value: Any) -> None:
    assert refusal(**{field: value}).startswith(f"{field} is ")


@pytest.mark.parametrize("value", [0, 1, "true", "False", [], 0.5])
@pytest.mark.parametrize("field", ["norm_topk_prob", "attention_bias", "use_qk_norm", "tie_word_embeddings"])
def test_flags_must_be_true_or_false(field: str, value: Any) -> None:
    assert "true or false" in refusal(**{field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 127}, "head_dim is 127"),
        ({"head_dim": 6}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor"),
        ({"num_key_value_heads": 7}, "a divisor of num_attention_heads 96"),
        ({"num_key_value_heads": 192}, "a divisor of num_attention_heads 96"),
        ({"first_k_dense_replace": 47}, "0 to num_hidden_layers 46"),
        ({"n_group": 3}, "n_group is 3"),
        ({"n_group": 128}, "at least 2 in a group"),
        ({"n_group": 256}, "n_group is 256"),
        ({"topk_group": 2}, "topk_group is 2"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5"),
        ({"num_experts_per_tok": 129}, "1 to 128"),
        ({"n_group": 32, "topk_group": 1}, "num_experts_per_tok is 8"),
        ({"num_hidden_layers": 512, "n_routed_experts": 1024}, "n_routed_experts"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
        ({"eos_token_id": list(range(10_000))}, "eos_token_id"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"bos_token_id": -2}, "bos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'full_attention'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": NAN}}, "rope_theta is nan"),
        ({"num_mtp_layers": 2}, "num_mtp_layers is 2"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "field", "wanted"),
    [
        ({"num_nextn_predict_layers": None, "num_mtp_layers": 2}, "num_nextn_predict_layers", 2),
        ({"n_routed_experts": None, "num_local_experts": 64}, "n_routed_experts", 64),
        ({"head_dim": None, "num_attention_heads": 64, "num_key_value_heads": 8}, "head_dim", 64),
        ({"eos_token_id": 5}, "eos_token_id", (5,)),
        ({"eos_token_id": None}, "eos_token_id", ()),
        ({"eos_token_id": [200_000]}, "eos_token_id", (200_000,)),
        ({"pad_token_id": -1}, "pad_token_id", None),
        ({"n_group": 4, "topk_group": 2}, "topk_group", 2),
        ({"first_k_dense_replace": 46}, "first_k_dense_replace", 46),
        ({"architectures": None}, "vocab_size", 151552),
        ({"model_type": None}, "vocab_size", 151552),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "vocab_size", 151552),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method", "gptq"),
        ({"quantization_config": "x"}, "quant_method", None),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quant_method", "mlx"),
    ],
)
def test_accepted_forms(changes: dict[str, Any], field: str, wanted: Any) -> None:
    assert getattr(ModelConfig.from_hf({**AIR, **changes}), field) == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
        ({"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}, "'glm_moe_dsa'"),
        ({"model_type": "glm4v_moe", "architectures": ["Glm4vMoeForConditionalGeneration"]}, "Glm4vMoe"),
        ({"architectures": ["Glm4MoeModel"]}, "'Glm4MoeModel'"),
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None, "architectures": None}, "no architecture"),
        ({"model_type": ["glm4_moe"]}, "model_type"),
        ({"architectures": ["\x1b]0;x\x07"]}, "x1b"),
    ],
)
def test_other_architectures_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    message = refusal(**changes)
    assert words in message
    assert "glmlocal runs Glm4MoeForCausalLM" in message


# --- tensors against a config


def index_of(refs: dict[str, tuple[tuple[int, ...], str]], kind: Any = "safetensors") -> TensorIndex:
    file = Path("/nowhere/model")
    made = {name: TensorRef(name, file, 0, 1, shape, dtype) for name, (shape, dtype) in refs.items()}
    return TensorIndex(kind, file, made, (file,))


CONFIG = ModelConfig.from_hf(TINY)
COMPLETE = {name: (shape, "BF16") for name, shape in (expected_tensors(CONFIG) | expected_mtp_tensors(CONFIG)).items()}
COPIES = {name: (shape, "BF16") for name, shape in optional_mtp_tensors(CONFIG).items()}


def complaint(refs: dict[str, tuple[tuple[int, ...], str]], kind: str = "safetensors") -> str:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(CONFIG, index_of(refs, kind))
    return str(caught.value)


def test_a_complete_checkpoint_passes_with_and_without_mtp() -> None:
    assert check_tensors(CONFIG, index_of(COMPLETE)) is True
    assert check_tensors(CONFIG, index_of(COMPLETE | COPIES)) is True
    assert check_tensors(CONFIG, index_of({n: r for n, r in COMPLETE.items() if ".layers.3." not in n})) is False


@pytest.mark.parametrize("name", list(expected_tensors(CONFIG)))
def test_every_missing_tensor_is_named_with_its_shape(name: str) -> None:
    refs = {other: ref for other, ref in COMPLETE.items() if other != name}
    assert f"lacks the tensor {name} (shape {list(COMPLETE[name][0])});" in complaint(refs)


@pytest.mark.parametrize("name", list(expected_tensors(CONFIG)))
def test_every_wrong_shape_is_named_with_both_shapes(name: str) -> None:
    shape = COMPLETE[name][0]
    wrong = (*shape[:-1], shape[-1] + 1)
    assert f"{name} has shape {list(wrong)}, wanted {list(shape)};" in complaint({**COMPLETE, name: (wrong, "BF16")})
    assert name in complaint({**COMPLETE, name: ((1, *shape), "BF16")})


@pytest.mark.parametrize(
    "name", [n for n, s in expected_tensors(CONFIG).items() if len(s) == 1 or n.endswith("gate.weight")]
)
def test_norms_biases_and_routers_must_not_be_quantized(name: str) -> None:
    assert name in complaint({**COMPLETE, name: (COMPLETE[name][0], "Q8_0")}, "gguf")


@pytest.mark.parametrize("dtype", ["F64", "F8_E5M2", "I32", "U8", "Q8_0", "Q4_K"])
def test_dtypes_that_safetensors_may_not_have_are_named_and_counted(dtype: str) -> None:
    names = ["model.layers.1.mlp.experts.2.up_proj.weight", "lm_head.weight"]
    message = complaint(COMPLETE | {name: (COMPLETE[name][0], dtype) for name in names})
    assert f"{names[0]} is {dtype} and 1 more" in message
    assert "BF16, F16, F32" in message


def test_several_missing_tensors_are_counted() -> None:
    refs = {name: ref for name, ref in COMPLETE.items() if ".up_proj." not in name}
    missing = sum(".up_proj." in name for name in expected_tensors(CONFIG))
    assert f"and {missing - 1} more" in complaint(refs)


def test_an_unsupported_quantization_is_named_where_its_tensors_have_other_names() -> None:
    config = ModelConfig.from_hf({**TINY, "quantization_config": {"quant_method": "gptq"}})
    refs = {name.replace("proj.weight", "proj.qweight"): (shape, "I32") for name, (shape, _) in COMPLETE.items()}
    with pytest.raises(CheckpointError, match="quantized with 'gptq', which is not supported yet"):
        check_tensors(config, index_of(refs))


def test_an_unsupported_quantization_is_named_where_its_tensors_have_another_dtype() -> None:
    config = ModelConfig.from_hf({**TINY, "quantization": {"bits": 4}})
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is U32 \(quantized with 'mlx'\), which is not supported"
    ):
        check_tensors(config, index_of({**COMPLETE, "lm_head.weight": ((96, 8), "U32")}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention_bias": False}, "model.layers.0.self_attn.q_proj.bias"),
        ({"use_qk_norm": False}, "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_biases_and_norms_that_the_config_denies_are_not_silently_dropped(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        check_tensors(ModelConfig.from_hf({**TINY, **changes}), index_of(COMPLETE))


def test_other_tensors_in_safetensors_are_left_alone() -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ((16,), "F32"), "score.weight": ((2, 64), "I64")}
    assert check_tensors(CONFIG, index_of(COMPLETE | extra))
    assert "inv_freq" in complaint(COMPLETE | extra, "gguf")


def test_tied_embeddings_need_no_head() -> None:
    config = ModelConfig.from_hf({**TINY, "tie_word_embeddings": True})
    refs = {name: ref for name, ref in COMPLETE.items() if name != "lm_head.weight"}
    assert "lm_head.weight" not in expected_tensors(config)
    assert check_tensors(config, index_of(refs))
    assert "lm_head.weight" in complaint(refs)


@pytest.mark.parametrize("name", list(expected_mtp_tensors(CONFIG)))
def test_an_mtp_layer_without_one_of_its_tensors_is_not_usable(name: str) -> None:
    refs = {other: ref for other, ref in COMPLETE.items() if other != name}
    assert check_tensors(CONFIG, index_of(refs)) is False
    assert (mtp_problem(CONFIG, index_of(refs)) or "").startswith("1 of its")


@pytest.mark.parametrize("name", [*list(expected_mtp_tensors(CONFIG))[-4:], *optional_mtp_tensors(CONFIG)])
def test_an_mtp_layer_with_a_wrong_tensor_is_not_usable_and_says_why(name: str) -> None:
    for wrong in (((3, 3), "BF16"), ((COMPLETE | COPIES)[name][0], "Q8_K")):
        index = index_of(COMPLETE | COPIES | {name: wrong})
        assert check_tensors(CONFIG, index) is False
        assert name in (mtp_problem(CONFIG, index) or "")


def test_all_declared_mtp_layers_must_be_there() -> None:
    config = ModelConfig.from_hf({**TINY, "num_nextn_predict_layers": 2})
    assert check_tensors(config, index_of(COMPLETE)) is False
    assert any(name.startswith("model.layers.4.") for name in expected_mtp_tensors(config))
    both = {name: (shape, "F16") for name, shape in (expected_tensors(config) | expected_mtp_tensors(config)).items()}
    assert check_tensors(config, index_of(both)) is True


def test_an_undeclared_mtp_layer_is_not_used() -> None:
    assert check_tensors(ModelConfig.from_hf({**TINY, "num_nextn_predict_layers": 0}), index_of(COMPLETE)) is False


def test_nothing_is_read_for_the_check(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "release", TINY, tiny_tensors(TINY)))
    (tmp_path / "release" / "model.safetensors").unlink()
    assert check_tensors(CONFIG, checkpoint.tensors)


def test_fused_experts_in_the_wrong_orientation_are_noticed(tmp_path: Path) -> None:
    tensors = {name: array for name, array in tiny_tensors(TINY, mtp=False).items() if ".experts." not in name}
    for layer in (1, 2):  # [experts, in, out], as some other architectures fuse them
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.zeros((4, 64, 64), np.float32)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = np.zeros((4, 32, 64), np.float32)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "fused", TINY, tensors))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has shape \[32, 64\], wanted \[64, 32\]"):
        check_tensors(CONFIG, checkpoint.tensors)
