"""The tiny models through GGUF: the same logits, quantized types against transformers on the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors.torch import save_file

import tiny
import tiny_gguf
from crafted import HALF_FIELDS, random_blocks
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.schemes import QUANTIZED_DTYPES
from loading import load_engine
from test_logits_glm4_moe import TOKENS, TOLERANCE, reference_logits, relative_error


@pytest.mark.parametrize(
    "config", ["air", "glm45", "four_groups", "two_shared_experts", "no_norm_topk_prob", "all_moe"]
)
def test_f32_gguf_gives_the_logits_of_transformers(config: str, tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS[config])
    tiny_gguf.convert(tiny.save(model, tmp_path), tmp_path / "tiny.gguf")
    got = load_engine(open_checkpoint(tmp_path / "tiny.gguf")).logits(TOKENS)
    assert relative_error(got, reference_logits(model, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
def test_quantized_gguf_gives_the_logits_of_its_dequantized_weights(quant: str, tmp_path: Path) -> None:
    model = tiny.build_model(intermediate_size=96, moe_intermediate_size=32)
    stored = tiny_gguf.convert(tiny.save(model, tmp_path), tmp_path / "tiny.gguf", quant)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dequantized = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    got = load_engine(open_checkpoint(tmp_path / "tiny.gguf"), kv_dtype="fp32").logits(TOKENS)
    want = reference_logits(dequantized, TOKENS)
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(got, reference_logits(model, TOKENS)) > TOLERANCE  # it was quantized


def _random_weights(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes of a type whose weights are random and about as large as a linear layer's."""
    weights, _ = GGML_QUANT_SIZES[kind]
    raw = random_blocks(kind.name, int(np.prod(shape)) // weights, np.random.default_rng(len(shape)))
    wanted = float(shape[-1]) ** -0.5
    if kind.name == "IQ1_M":  # a quarter of the fp16 scale in each of four words
        for at, nibble in zip((49, 51, 53, 55), (0, 0, 0, 0x10), strict=True):  # 2^-11
            raw[:, at] = raw[:, at] & 0x0F | nibble
    elif kind.name == "MXFP4":
        raw[:, 0] = 121 + raw[:, 0] % 4
    elif kind.name == "NVFP4":
        raw[:, :4] = 8 + raw[:, :4] % 16
    for at in HALF_FIELDS[kind.name]:
        raw[:, at : at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if HALF_FIELDS[kind.name]:
        scale = (wanted / dequantize(raw, kind).std() * (0.5 + np.arange(len(raw)) % 7 / 7)).astype(np.float16)
        for at in HALF_FIELDS[kind.name]:
            raw[:, at : at + 2] = scale.reshape(-1, 1).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("quant", sorted(QUANTIZED_DTYPES))
def test_every_type_gives_the_logits_of_its_dequantized_weights(quant: str, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 256)
    experts = dict.fromkeys(("n_routed_experts", "num_experts_per_tok"), 4)  # all of them: rounding chooses no others
    model = tiny.build_model(**sizes, **experts, num_attention_heads=16, num_hidden_layers=2)
    stored = tiny_gguf.convert(tiny.save(model, tmp_path), tmp_path / "tiny.gguf", quant, blocks=_random_weights)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dequantized = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    want = reference_logits(dequantized, TOKENS)
    got = load_engine(open_checkpoint(tmp_path / "tiny.gguf"), kv_dtype="fp32").logits(TOKENS)
    assert relative_error(got, want) < TOLERANCE
    rounded = load_engine(open_checkpoint(tmp_path / "tiny.gguf"), kv_dtype="fp32", activations="int8").logits(TOKENS)
    assert TOLERANCE < relative_error(rounded, want) < 0.05


def test_split_gguf_and_its_mtp_layer(tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS["glm45"])
    directory = tiny.save(model, tmp_path, mtp=True)
    tiny_gguf.convert(directory, tmp_path / "tiny.gguf", split_bytes=200_000)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 1
    engine = load_engine(open_checkpoint(parts[0]), draft=1)
    assert relative_error(engine.logits(TOKENS), reference_logits(model, TOKENS)) < TOLERANCE
    assert len(engine.runner.model.mtp) == 1


def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny.build_model(tie_word_embeddings=True)
    stored = tiny_gguf.convert(tiny.save(model, tmp_path), tmp_path / "tiny.gguf", "Q8_0")
    assert "lm_head.weight" not in stored
    model.load_state_dict(stored_to_state(model, stored))
    got = load_engine(open_checkpoint(tmp_path / "tiny.gguf"), kv_dtype="fp32").logits(TOKENS)
    assert relative_error(got, reference_logits(model, TOKENS)) < TOLERANCE


def stored_to_state(model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert tensors → the fused ones that transformers keeps in memory."""
    state = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    state["lm_head.weight"] = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([stored[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up")])
                    for e in range(len(tensor))
                ]
            )
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            state[name] = torch.stack([stored[f"{prefix}.{e}.down_proj.weight"] for e in range(len(tensor))])
    return state
