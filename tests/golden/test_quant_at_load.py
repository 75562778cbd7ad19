"""``quant`` at load: which weights it changes, into what, and the logits of exactly those weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeForCausalLM

import tiny
import tiny_gguf
from glmlocal import memory
from glmlocal.engine.planning import plan_here
from glmlocal.errors import CheckpointError, ConfigError, PlanError
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.quantize import quantize
from glmlocal.formats.schemes import INT4, INT8
from glmlocal.llm import LLM
from glmlocal.models.weights import Quant
from glmlocal.planner.plan import Wants
from loading import load_engine
from test_logits_glm4_moe import TOKENS, TOLERANCE, reference_logits, relative_error

SCHEMES = {"int4": INT4, "int8": INT8}


def requantized(source: Path, directory: Path, quant: Quant) -> torch.Tensor:
    """Logits of transformers on weights that were quantized here, one by one, and are fp32 again."""
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            scheme = INT8 if name == "lm_head.weight" else SCHEMES[quant]
            tensors[name] = torch.from_numpy(quantize(tensor.float().numpy(), scheme).dequantize())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    model = Glm4MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return reference_logits(model, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_logits_are_those_of_the_quantized_weights(quant: Quant, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS["mha_odd_sizes"]).to(dtype)  # 80 and 48 columns: ragged groups
    directory = tiny.save(model, tmp_path / "model")
    engine = load_engine(open_checkpoint(directory), quant=quant)
    got = engine.logits(TOKENS)
    assert relative_error(got, requantized(directory, tmp_path / "again", quant)) < TOLERANCE
    kept = load_engine(open_checkpoint(directory)).logits(TOKENS)
    assert TOLERANCE < relative_error(got, kept) < {"int8": 0.2, "int4": 0.4}[quant]


def test_only_linear_weights_change_and_head_and_mtp_keep_8_bits(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path, mtp=True)
    model = load_engine(open_checkpoint(directory), quant="int4", draft=1).runner.model
    dense, moe = model.layers[0], model.layers[1]
    for layer, kind in ((dense, "int4"), (moe, "int4"), (model.mtp[0].layer, "int8")):
        attn = tiny.attention_weights(layer)
        assert {p.kind for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)} == {kind}
    assert {p.kind for p in dense.mlp} == {"int4"}
    for layer, kind in ((moe, "int4"), (model.mtp[0].layer, "int8")):
        experts = layer.experts.weights
        assert {p.kind for p in (*experts.gate, *experts.up, *experts.down)} == {kind}
        assert {p.kind for p in layer.shared_experts} == {kind}
        assert tiny.attention_weights(layer).router.weight.kind == "f32"
    assert {model.lm_head.weight.kind, model.mtp[0].eh_proj.weight.kind, model.mtp[0].head.weight.kind} == {"int8"}
    assert model.embed_tokens.dtype == "F32"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_fp8_is_quantized_too(quant: Quant, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(**tiny.FP8_SIZES), tmp_path / "source")
    (tmp_path / "fp8").mkdir()
    directory = tiny.quantize_fp8(source, tmp_path / "fp8", style="deepseek")
    got = load_engine(open_checkpoint(directory), quant=quant).logits(TOKENS)
    assert relative_error(got, requantized(directory / "dequantized", tmp_path / "again", quant)) < TOLERANCE


def test_what_a_gguf_file_has_quantized_stays_and_is_said(tmp_path: Path) -> None:
    tiny_gguf.convert(tiny.save(tiny.build_model(), tmp_path), tmp_path / "tiny.gguf", "Q4_0")
    plain = load_engine(open_checkpoint(tmp_path / "tiny.gguf")).logits(TOKENS)
    with LLM(tmp_path / "tiny.gguf", context=128, quant="int8") as llm:
        assert llm.note is not None
        assert "linear weights are quantized already (Q4_0) and stay as they are" in llm.note
        assert torch.equal(llm.logits(TOKENS), plain)
    with LLM(tmp_path / "tiny.gguf", context=128) as llm:
        assert llm.note is None


def test_plain_weights_of_a_gguf_file_are_quantized(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path)
    tiny_gguf.convert(directory, tmp_path / "tiny.gguf", "F16")
    with LLM(tmp_path / "tiny.gguf", context=128, quant="int4") as llm:
        assert llm.note is None
        assert llm._engine.runner.model.layers[1].experts.weights.up[0].kind == "int4"


def test_weights_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build_model(), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name][3, 7] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} cannot be quantized to int4: a weight is nan"):
        load_engine(open_checkpoint(directory), quant="int4")


def test_another_wish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant is 'int3', wanted one of keep, int8, int4"):
        LLM(tmp_path, quant="int3")


def test_the_plan_counts_what_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny.save(tiny.build_model(hidden_size=256, moe_intermediate_size=256), tmp_path))
    used = {quant: plan_here(checkpoint, quant, Wants(context=64)).devices[0].used_bytes for quant in ("int4", "int8")}
    monkeypatch.setattr(memory, "available_bytes", lambda root=None: sum(used.values()) // 2)
    assert load_engine(checkpoint, quant="int4", context=64)
    with pytest.raises(PlanError, match=r"does not fit: .* are missing; would fit: .*--quant int4"):
        load_engine(checkpoint, quant="int8", context=64)
