"""Tiny checkpoints as GPTQ, AWQ, compressed-tensors and MLX releases are stored, packed by plain numpy.

``tests/golden/fixtures/foreign`` has matrices that the tools themselves packed; whole models are made without them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import fp4_releases

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {  # whole words of 3 and 6 bits; groups of 64 are ragged in 160 and 96 columns
    "hidden_size": 160,
    "intermediate_size": 288,
    "moe_intermediate_size": 96,
    "num_attention_heads": 8,
    "head_dim": 24,
}
_LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")


@dataclass(frozen=True)
class Form:
    """How one matrix is quantized."""

    bits: int = 4
    group: int = 32  # -1: a scale per row
    symmetric: bool = True
    dtype: torch.dtype = torch.float16  # of scales


@dataclass(frozen=True)
class Codes:
    """A matrix [out, in] in unsigned codes."""

    codes: np.ndarray  # [out, in]
    scales: torch.Tensor  # [out, groups]
    zeros: np.ndarray  # [out, groups]
    group: int

    @property
    def wide(self) -> torch.Tensor:
        return torch.from_numpy(
            (self.codes.astype(np.float32) - self.spread(self.zeros).astype(np.float32))
            * self.spread(self.scales.float().numpy())
        )

    def spread(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.group, axis=1)[:, : self.codes.shape[1]]


def quantized(weight: torch.Tensor, form: Form) -> Codes:
    rows, columns = weight.shape
    group = columns if form.group == -1 else form.group
    groups, top = -(-columns // group), (1 << form.bits) - 1
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group - columns)).view(rows, groups, group)
    if form.symmetric:
        scales = padded.abs().amax(2) / (top / 2)
        zeros = np.full((rows, groups), 1 << (form.bits - 1))
    else:
        low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round().clamp(0, top).numpy().astype(np.int64)
        zeros[0, 0], zeros[-1, -1] = top, 0  # the ends, which are stored minus one and as they are
    scales = scales.to(form.dtype)
    steps = (padded / scales.float()[..., None]).round().numpy().astype(np.int64) + zeros[..., None]
    codes = np.clip(steps, 0, top).reshape(rows, -1)[:, :columns]
    return Codes(codes, scales, zeros, group)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes → rows of int32 words, lowest bit first and without gaps, padded with zeros."""
    rows = codes.shape[0]
    stream = (codes[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def awq_words(codes: np.ndarray) -> np.ndarray:
    """[n, columns] → [n, columns / 8]: columns 0 … 7 pack to 0x75316420."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
    return (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=2, dtype=np.uint32).view(np.int32)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def gptq(name: str, made: Codes, form: Form, *, v2: bool = False, g_idx: bool = True) -> Tensors:
    zeros = bit_stream(made.zeros.T, form.bits)
    if not v2:
        if form.bits == 3:
            zeros = bit_stream((made.zeros.T - 1) & 7, 3)
        else:  # as GPTQModel does it, with a borrow from the next field where a zero point is 0
            ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[form.bits]
            zeros = (zeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
    tensors = {
        f"{name}.qweight": _tensor(bit_stream(made.codes, form.bits).T),
        f"{name}.qzeros": _tensor(zeros),
        f"{name}.scales": made.scales.T.contiguous(),
    }
    if g_idx:
        tensors[f"{name}.g_idx"] = torch.arange(made.codes.shape[1], dtype=torch.int32) // made.group
    return tensors


def awq_gemm(name: str, made: Codes, form: Form) -> Tensors:
    return {
        f"{name}.qweight": _tensor(awq_words(made.codes.T)),
        f"{name}.qzeros": _tensor(awq_words(made.zeros.T)),
        f"{name}.scales": made.scales.T.contiguous(),
    }


def awq_gemv(name: str, made: Codes, form: Form) -> Tensors:
    padding = 32 - made.zeros.shape[1]
    return {
        f"{name}.qweight": _tensor(bit_stream(made.codes, 4)),
        f"{name}.qzeros": _tensor(bit_stream(np.pad(made.zeros, ((0, 0), (0, padding))), 4)),
        f"{name}.scales": torch.nn.functional.pad(made.scales, (0, padding)),
    }


def packed(name: str, made: Codes, form: Form) -> Tensors:
    tensors = {
        f"{name}.weight_packed": _tensor(bit_stream(made.codes, form.bits)),
        f"{name}.weight_scale": made.scales,
        f"{name}.weight_shape": torch.tensor(made.codes.shape),
    }
    if not form.symmetric:
        tensors[f"{name}.weight_zero_point"] = _tensor(bit_stream(made.zeros.T, form.bits).T)
    return tensors


def packed_with_plain_zeros(name: str, made: Codes, form: Form) -> Tensors:
    """As earlier versions of compressed-tensors wrote them."""
    zeros = _tensor((made.zeros - (1 << (form.bits - 1))).astype(np.int8))
    return {**packed(name, made, form), f"{name}.weight_zero_point": zeros}


def int8(name: str, made: Codes, form: Form) -> Tensors:
    tensors = {
        f"{name}.weight": _tensor((made.codes - 128).astype(np.int8)),
        f"{name}.weight_scale": made.scales,
    }
    if not form.symmetric:
        tensors[f"{name}.weight_zero_point"] = _tensor((made.zeros - 128).astype(np.int8))
    return tensors


def mlx_biases(made: Codes, form: Form) -> torch.Tensor:
    return (made.scales.float() * -_tensor(made.zeros).float()).to(form.dtype)


def mlx(name: str, made: Codes, form: Form) -> Tensors:
    return {
        f"{name}.weight": _tensor(bit_stream(made.codes, form.bits).view(np.uint32)),
        f"{name}.scales": made.scales,
        f"{name}.biases": mlx_biases(made, form),
    }


@dataclass(frozen=True)
class Style:
    """A release: what its config says, and how each of its matrices is stored (None: plain)."""

    name: str
    config: dict[str, Any]
    store: Callable[[str, Any, Form], Tensors]
    base: Form = field(default_factory=Form)
    others: Mapping[str, Form | None] = field(default_factory=dict)  # by a part of the name
    config_key: str = "quantization_config"
    lm_head: bool = False
    quantize: Callable[[torch.Tensor, Form], Any] | None = None  # None: ``quantized``

    def form_of(self, module: str) -> Form | None:
        return next((form for part, form in self.others.items() if part in module), self.base)


def _group(bits: int, targets: list[str], *, group: int = 32, symmetric: bool = True) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    )
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None, **strategy}
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _compressed(groups: dict[str, Any], stored_as: str = "pack-quantized") -> dict[str, Any]:
    ignore = ["lm_head", "re:.*mlp.gate$"]
    return {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": groups, "ignore": ignore}


def _gptq_config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **values}


def _fp4_styles() -> list[Style]:
    def style(
        name: str, config: dict[str, Any], store: Any, quantize: Any, config_key: str = "quantization_config"
    ) -> Style:
        return Style(
            name,
            config,
            lambda module, made, form: store(module, made),
            config_key=config_key,
            quantize=lambda weight, form: quantize(weight),
        )

    def group(size: int, strategy: str) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size, "symmetric": True}
        return {"group_0": {"targets": ["Linear"], "weights": weights}}

    nvfp4, mxfp4 = fp4_releases.nvfp4, fp4_releases.mxfp4
    return [
        style(
            "packed nvfp4",
            _compressed(group(16, "tensor_group"), "nvfp4-pack-quantized"),
            fp4_releases.compressed,
            lambda weight: nvfp4(weight, divided=True),
        ),
        style("packed mxfp4", _compressed(group(32, "group"), "mxfp4-pack-quantized"), fp4_releases.compressed, mxfp4),
        style(
            "modelopt nvfp4",
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            fp4_releases.modelopt,
            lambda weight: nvfp4(weight, divided=False),
        ),
        style("quark mxfp4", {"quant_method": "quark"}, fp4_releases.modelopt, mxfp4),
        style(
            "mlx nvfp4",
            {"group_size": 16, "bits": 4, "mode": "nvfp4"},
            fp4_releases.mlx,
            lambda weight: nvfp4(weight, divided=True, has_factor=False),
            "quantization",
        ),
        style("mlx mxfp4", {"group_size": 32, "bits": 4, "mode": "mxfp4"}, fp4_releases.mlx, mxfp4, "quantization"),
    ]


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_BF16 = torch.bfloat16
STYLES = {
    style.name: style
    for style in (
        Style(
            "gptq int4-int8mix",
            _gptq_config(
                dynamic={
                    "-:model\\.layers\\.1\\..*o_proj": {},
                    "+:.*\\.experts\\.": {"bits": 8, "group_size": 64},
                    ".*down_proj": {"bits": 8, "group_size": -1},
                    ".*\\.experts\\.3\\.": {"bits": 2},  # an earlier rule counts
                }
            ),
            gptq,
            others={
                "layers.1.self_attn.o_proj": None,
                ".experts.": Form(8, 64),
                "down_proj": Form(8, -1),
            },
        ),
        Style("gptq asymmetric", _gptq_config(sym=False, group_size=64), gptq, Form(4, 64, False)),
        Style(
            "gptq_v2 asymmetric",
            _gptq_config(sym=False, checkpoint_format="gptq_v2"),
            lambda *of: gptq(*of, v2=True, g_idx=False),
            Form(4, 32, False),
        ),
        Style("gptq int3", _gptq_config(bits=3, sym=False), gptq, Form(3, 32, False)),
        Style("gptq int2 per row", _gptq_config(bits=2, group_size=-1, sym=False), gptq, Form(2, -1, False)),
        Style("gptq int8", _gptq_config(bits=8, lm_head=True), gptq, Form(8, 32, dtype=_BF16), lm_head=True),
        Style("gptq int8 asymmetric", _gptq_config(bits=8, sym=False), gptq, Form(8, 32, False)),
        Style("awq", _AWQ, awq_gemm, Form(4, 32, False)),
        Style(
            "awq fp16mix",
            {**_AWQ, "group_size": 64, "modules_to_not_convert": ["shared_experts", "self_attn"]},
            awq_gemm,
            Form(4, 64, False, _BF16),
            others={"shared_experts": None, "self_attn": None},
        ),
        Style("awq gemv", {**_AWQ, "version": "GEMV"}, awq_gemv, Form(4, 32, False)),
        Style("packed int4", _compressed({"group_0": _group(4, ["Linear"])}), packed, Form(4, 32, dtype=_BF16)),
        Style(
            "packed asymmetric",
            _compressed({"group_0": _group(4, ["Linear"], group=64, symmetric=False)}),
            packed,
            Form(4, 64, False),
        ),
        Style(
            "packed with plain zeros",
            _compressed({"group_0": _group(4, ["Linear"], symmetric=False)}),
            packed_with_plain_zeros,
            Form(4, 32, False),
        ),
        Style(
            "packed mix",
            _compressed(
                {
                    "everything": _group(8, ["Linear"], group=-1),
                    "experts": _group(4, ["re:.*mlp\\.experts\\..*"]),
                    "one": _group(6, ["model.layers.1.mlp.experts.2.up_proj"], symmetric=False),
                }
            ),
            packed,
            Form(8, -1, dtype=_BF16),
            others={
                "model.layers.1.mlp.experts.2.up_proj": Form(6, 32, False, _BF16),
                ".mlp.experts.": Form(4, 32, dtype=_BF16),
            },
        ),
        Style("packed int3", _compressed({"a": _group(3, ["Linear"])}), packed, Form(3, 32, dtype=torch.float32)),
        Style("int8", _compressed({"a": _group(8, ["Linear"], group=-1)}, "int-quantized"), int8, Form(8, -1)),
        Style(
            "int8 asymmetric",
            _compressed({"a": _group(8, ["Linear"], symmetric=False)}, "naive-quantized"),
            int8,
            Form(8, 32, False, _BF16),
        ),
        *(
            Style(
                f"mlx {bits}-bit",
                {"group_size": 32, "bits": bits},
                mlx,
                Form(bits, 32, False, _BF16),
                config_key="quantization",
                lm_head=True,
            )
            for bits in (2, 3, 4, 5, 6, 8)
        ),
        Style(
            "mlx mix",
            {
                "group_size": 32,
                "bits": 4,
                "mode": "affine",
                "model.layers.1.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 8},
                "model.layers.1.self_attn.o_proj": False,
                "model.embed_tokens": {"group_size": 32, "bits": 6},
            },
            mlx,
            Form(4, 32, False, _BF16),
            others={
                "layers.1.mlp.experts.": Form(4, 32, False, _BF16),
                "layers.1.self_attn.o_proj": None,
                "embed_tokens": Form(6, 32, False, _BF16),
            },
            config_key="quantization",
            lm_head=True,
        ),
        *_fp4_styles(),
    )
}


def quantize_release(source: Path, directory: Path, style: Style) -> Path:
    """A copy of a checkpoint as such a release, and in ``directory``/dequantized what its weights then are, in fp32."""
    shutil.copytree(source, directory / "dequantized")
    tensors = load_file(source / "model.safetensors")
    stored, wide = {}, dict(tensors)
    is_mlx = style.config_key == "quantization"
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        is_table = name in ("lm_head.weight", "model.embed_tokens.weight") and style.lm_head
        form = style.form_of(module)
        if is_mlx and ".experts." in module and "layers.1." in module and style.name == "mlx mix":
            form = Form(8 if module.endswith("down_proj") else 4, 32, False, _BF16)
        wanted = _LINEAR.fullmatch(name) or (is_table and (is_mlx or name == "lm_head.weight"))
        if not wanted or form is None:
            stored[name] = weight
            continue
        made = (style.quantize or quantized)(weight, form)
        stored |= style.store(module, made, form)
        wide[name] = mlx_wide(made, form) if style.store is mlx else made.wide
    if is_mlx:
        stored = stacked(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(wide, directory / "dequantized" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config[style.config_key] = style.config
    if is_mlx:
        config["quantization_config"] = style.config  # mlx-lm writes both
    (directory / "config.json").write_text(json.dumps(config))
    for text in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(source / text, directory)
    return directory


def mlx_wide(made: Codes, form: Form) -> torch.Tensor:
    products = made.codes.astype(np.float32) * made.spread(made.scales.float().numpy())
    return torch.from_numpy(products + made.spread(mlx_biases(made, form).float().numpy()))


def stacked(tensors: Tensors) -> Tensors:
    """Routed experts as mlx-lm keeps them, one after another in one tensor."""
    result: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(r"(.*\.mlp\.)experts\.(\d+)(\..*)", name)
        if expert is None:
            result[name] = tensor
        else:
            stacks.setdefault(f"{expert[1]}switch_mlp{expert[3]}", {})[int(expert[2])] = tensor
    return result | {name: torch.stack([found[e] for e in sorted(found)]) for name, found in stacks.items()}
