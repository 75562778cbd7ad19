"""FP8 checkpoints: our logits against transformers on the dequantized weights, and what damage to them is called."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeForCausalLM

import tiny
from glmlocal.engine.engine import Engine
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from loading import load_engine

TOKENS = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(3)).tolist()
TOLERANCE = 1e-4  # of the logit range
UP = "model.layers.1.mlp.experts.3.up_proj.weight"  # [144, 160]
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"  # [160, 144]
SUFFIX = {"compressed-tensors": "_scale", "deepseek": "_scale_inv"}
Tensors = dict[str, torch.Tensor]


def load(directory: Path) -> Engine:
    return load_engine(open_checkpoint(directory), context=64)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / (want.max() - want.min()))


@pytest.fixture(scope="module", params=["compressed-tensors", "deepseek"])
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(style: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An FP8 checkpoint on disk and what transformers computes from its weights."""
    root = tmp_path_factory.mktemp(style)
    # All 8 experts of every layer are used, so that a change of any of them shows.
    model = tiny.build_model(**tiny.FP8_SIZES, num_experts_per_tok=8)
    directory = root / "fp8"
    directory.mkdir()
    tiny.quantize_fp8(tiny.save(model, root / "source"), directory, style=style)
    wide = Glm4MoeForCausalLM.from_pretrained(directory / "dequantized", dtype=torch.float32).eval()
    with torch.no_grad():
        return directory, wide(torch.tensor([TOKENS])).logits[0]


@pytest.fixture
def changed(checkpoint: tuple[Path, torch.Tensor], tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    """A function that copies the checkpoint with its tensors changed."""

    def copy(change: Callable[[Tensors], None]) -> Path:
        tensors = load_file(checkpoint[0] / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((checkpoint[0] / "config.json").read_text())
        return tmp_path

    return copy


def test_logits_equal_transformers_on_the_dequantized_weights(checkpoint: tuple[Path, torch.Tensor]) -> None:
    directory, want = checkpoint
    engine = load(directory)
    assert relative_error(engine.logits(TOKENS), want) < TOLERANCE
    one_by_one = load(directory)
    one_by_one.scheduler.max_num_batched_tokens = 1
    assert relative_error(one_by_one.logits(TOKENS), want) < TOLERANCE


def test_fp8_weights_take_a_byte_each_and_the_rest_stays(checkpoint: tuple[Path, torch.Tensor], style: str) -> None:
    model = load(checkpoint[0]).runner.model
    attn = tiny.attention_weights(model.layers[1])
    q_proj, router = attn.q_proj, attn.router.weight
    assert q_proj.kind == ("fp8_channel" if style == "compressed-tensors" else "fp8_block128")
    assert model.layers[1].experts.weights.down[2].kind == q_proj.kind
    assert (model.lm_head.weight.kind, router.kind) == ("f32", "f32")
    if cpu.available:
        assert q_proj.nbytes <= 1.05 * q_proj.shape[0] * q_proj.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_may_be_narrower_than_fp32(
    checkpoint: tuple[Path, torch.Tensor], changed: Callable[..., Path], style: str, dtype: torch.dtype
) -> None:
    def narrow(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(SUFFIX[style]):
                tensors[name] = tensors[name].to(dtype)

    narrowed = load(changed(narrow)).logits(TOKENS)
    assert TOLERANCE < relative_error(narrowed, checkpoint[1]) < 0.05  # rounded scales are other weights


def test_scales_per_row_may_come_without_their_dimension_or_as_one_for_all(
    checkpoint: tuple[Path, torch.Tensor], changed: Callable[..., Path], style: str
) -> None:
    if style != "compressed-tensors":
        return  # no scales per row

    def flatten(tensors: Tensors) -> None:
        tensors[UP + "_scale"] = tensors[UP + "_scale"][:, 0].clone()

    assert relative_error(load(changed(flatten)).logits(TOKENS), checkpoint[1]) < TOLERANCE

    def one(tensors: Tensors) -> None:
        for name in [UP, DOWN]:
            rows = tensors[name + "_scale"]
            tensors[name] = (tensors[name].float() * rows).to(torch.float8_e4m3fn)  # small numbers, but the same ones
            tensors[name + "_scale"] = torch.ones((1,) if name == UP else (), dtype=torch.bfloat16)

    rounded = load(changed(one))
    assert rounded.runner.model.layers[1].experts.weights.up[3].kind == "fp8_channel"
    assert relative_error(rounded.logits(TOKENS), checkpoint[1]) < 0.1
    nothing = load(changed(lambda tensors: (one(tensors), tensors[UP + "_scale"].fill_(1e-6))))
    assert relative_error(nothing.logits(TOKENS), rounded.logits(TOKENS)) > 3 * TOLERANCE


def _scaled(tensors: Tensors, suffix: str) -> None:
    tensors[UP + suffix][-1] *= 1.5


def _rolled(tensors: Tensors, suffix: str) -> None:
    tensors[UP + suffix] = tensors[UP + suffix].roll(1, 0)


def _rows_swapped(tensors: Tensors, suffix: str) -> None:
    bits = tensors[UP].view(torch.uint8)
    tensors[UP] = bits[[1, 0, *range(2, len(bits))]].view(torch.float8_e4m3fn)


def _sign_lost(tensors: Tensors, suffix: str) -> None:
    tensors[UP] = (tensors[UP].view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("change", [_scaled, _rolled, _rows_swapped, _sign_lost])
def test_every_part_matters(
    checkpoint: tuple[Path, torch.Tensor],
    changed: Callable[..., Path],
    style: str,
    change: Callable[[Tensors, str], None],
) -> None:
    directory = changed(lambda tensors: change(tensors, SUFFIX[style]))
    assert relative_error(load(directory).logits(TOKENS), checkpoint[1]) > 3 * TOLERANCE


def test_transposed_block_scales_give_other_logits_or_are_refused(
    checkpoint: tuple[Path, torch.Tensor], changed: Callable[..., Path], style: str
) -> None:
    if style != "deepseek":
        return  # no blocks

    def transpose(tensors: Tensors) -> None:  # [2, 2] of every expert
        for name in tensors:
            if ".experts." in name and name.endswith("_scale_inv"):
                assert tensors[name].shape == (2, 2)
                tensors[name] = tensors[name].T.contiguous()

    assert relative_error(load(changed(transpose)).logits(TOKENS), checkpoint[1]) > 3 * TOLERANCE

    name = "model.layers.1.self_attn.k_proj.weight_scale_inv"  # [48, 160]: [1, 2]
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} has shape [2, 1]")):
        load(changed(lambda tensors: tensors.update({name: tensors[name].T.contiguous()})))


BAD_SCALES = {
    "nan": ("nan", lambda scales: scales.flatten()[-1:].fill_(float("nan"))),
    "zero": ("0", lambda scales: scales.flatten()[-1:].zero_()),
    "negative": ("-1", lambda scales: scales.flatten()[-1:].fill_(-1)),
    "infinite": ("inf", lambda scales: scales.flatten()[-1:].fill_(float("inf"))),
    "huge": ("256", lambda scales: scales.flatten()[-1:].fill_(256)),
}


@pytest.mark.parametrize("kind", BAD_SCALES)
def test_scales_that_can_only_be_damage_are_refused_by_name(
    changed: Callable[..., Path], style: str, kind: str
) -> None:
    shown, damage = BAD_SCALES[kind]
    name = DOWN + SUFFIX[style]
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} has the scale {shown};")) as error:
        load(changed(lambda tensors: damage(tensors[name])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_that_are_nan_are_refused_by_name_and_row(changed: Callable[..., Path], code: int) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[DOWN].view(torch.uint8)[157, 3] = code

    with pytest.raises(CheckpointError, match=re.escape(f"tensor {DOWN} has a weight that is NaN in row 157;")):
        load(changed(damage))


def _without_scales(tensors: Tensors, suffix: str) -> None:
    del tensors[DOWN + suffix]


def _with_both(tensors: Tensors, suffix: str) -> None:
    tensors |= {DOWN + "_scale": torch.ones(160, 1), DOWN + "_scale_inv": torch.ones(2, 2)}


def _with_a_row_less(tensors: Tensors, suffix: str) -> None:
    tensors[DOWN + suffix] = tensors[DOWN + suffix][:-1].clone()


def _with_integer_scales(tensors: Tensors, suffix: str) -> None:
    tensors[DOWN + suffix] = tensors[DOWN + suffix].to(torch.int32)


def _with_an_fp8_router(tensors: Tensors, suffix: str) -> None:
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _with_fp8_embeddings(tensors: Tensors, suffix: str) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


REFUSED = {
    _without_scales: f"tensor {DOWN} is F8_E4M3 with no scales: one of {DOWN}_scale and {DOWN}_scale_inv was expected",
    _with_both: f"tensor {DOWN} is F8_E4M3 with scales twice",
    _with_a_row_less: f"tensor {DOWN}@ has shape",
    _with_integer_scales: f"tensor {DOWN}@ is I32; scales must be BF16, F16, F32",
    _with_an_fp8_router: "tensor model.layers.1.mlp.gate.weight is F8_E4M3; norms, biases, routers and embeddings must",
    _with_fp8_embeddings: "tensor model.embed_tokens.weight is F8_E4M3; norms, biases, routers and embeddings must be",
}


@pytest.mark.parametrize("change", REFUSED)
def test_incomplete_checkpoints_are_refused_before_anything_is_read(
    changed: Callable[..., Path], style: str, change: Callable[[Tensors, str], None]
) -> None:
    message = REFUSED[change].replace("@", SUFFIX[style])
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load(changed(lambda tensors: change(tensors, SUFFIX[style])))
    assert "\n" not in str(error.value)


def test_other_formats_of_compressed_tensors_are_named(checkpoint: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    tensors = load_file(checkpoint[0] / "model.safetensors")
    tensors[DOWN.replace("weight", "weight_packed")] = tensors.pop(DOWN).view(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint[0] / "config.json").read_text())
    stored_as = "marlin-24"
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="in the format 'marlin-24'; pack-quantized, int-quant"):
        load(tmp_path)


def test_an_mtp_layer_in_fp8_is_loaded(style: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.build_model(**tiny.FP8_SIZES), tmp_path / "source", mtp=True)
    directory = tmp_path / "fp8"
    directory.mkdir()
    checkpoint = open_checkpoint(tiny.quantize_fp8(source, directory, style=style))
    (mtp,) = load_engine(checkpoint, context=64, draft=1).runner.model.mtp
    assert mtp.layer.experts.weights.up[0].kind.startswith("fp8")
