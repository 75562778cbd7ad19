"""GGUF models of architecture ``glm4moe``: tensors under Hugging Face names, metadata as a config.json.

llama.cpp's converter keeps the rows of q and k as they are for this architecture (half-split rotary pairs), so renaming
is all it takes. Blocks are numbered like layers, the MTP layers being the last ``nextn_predict_layers`` of
``block_count``; that many layers are the trunk whether or not the file has the MTP tensors (llama.cpp
``src/models/glm4-moe.cpp``). Stacked experts become one tensor per expert, a slice of the stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmlocal.errors import CheckpointError
from glmlocal.formats.gguf_file import GGUFFile, read_gguf
from glmlocal.formats.gguf_names import COMPANIONS, SPLIT_NAME
from glmlocal.formats.index import TensorRef, quoted
from glmlocal.formats.safetensors import MAX_EXPERTS, split_tensor

ARCHITECTURE = "glm4moe"
_SIGMOID = 2  # gguf.ExpertGatingFuncType.SIGMOID
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)")

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",  # as the first files for this architecture had it
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_norm.weight": "shared_head.norm.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.shared_head_head.weight": "shared_head.head.weight",
}
_EXPERT_TENSORS = {
    "ffn_gate_exps.weight": "gate_proj",
    "ffn_up_exps.weight": "up_proj",
    "ffn_down_exps.weight": "down_proj",
}


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """A whole model, of one file or of all parts of a split one."""

    files: tuple[Path, ...]
    metadata: dict[str, Any]  # of the first file
    config: dict[str, Any]  # as config.json would have it
    refs: dict[str, TensorRef]  # under Hugging Face names; what has none keeps its GGUF name


def read_model(path: Path) -> GGUFModel:
    """Open a model from its file, or from any part of a split one. Raises CheckpointError."""
    files = _read_parts(path)
    metadata = files[0].metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{files[0].path} is a model of architecture {quoted(architecture)}; of GGUF architectures, glmlocal runs "
            f"{ARCHITECTURE} (GLM-4.5, 4.5-Air, 4.6 and 4.7)"
        )
    refs: dict[str, TensorRef] = {}
    for file in files:
        for stored in file.tensors:
            for ref in _rename(stored):
                if ref.name in refs:
                    raise CheckpointError(f"{file.path} stores {quoted(stored.name)}, which was already found before")
                refs[ref.name] = ref
    config = _Metadata(files[0].path, metadata).config(refs)
    return GGUFModel(tuple(file.path for file in files), metadata, config, refs)


def choose_file(directory: Path, names: list[str]) -> str:
    """The one model among a directory's files: its file, or the first part of its only split set."""
    models = [name for name in names if name.lower().endswith(".gguf")]
    models = [name for name in models if not name.lower().startswith(COMPANIONS)] or models
    sets: dict[str, str] = {}  # what identifies a model → its first file, as names are sorted
    for name in models:
        split = SPLIT_NAME.fullmatch(name)
        sets.setdefault(f"{split['stem']}-of-{split['count']}" if split else name, name)
    if len(sets) > 1:
        listed = ", ".join(map(quoted, list(sets.values())[:5])) + (" …" if len(sets) > 5 else "")
        raise CheckpointError(f"{directory} holds {len(sets)} GGUF models ({listed}); give the file of one of them")
    return next(iter(sets.values()))


def _read_parts(path: Path) -> list[GGUFFile]:
    """The file, or all files of its split set: ``NAME-00001-of-00003.gguf`` and so on, first part first."""
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None:
        file = read_gguf(path)
        if _split_number(file, "split.count", default=1) > 1:
            raise CheckpointError(
                f"{path} is a part of a split model whose name was changed; name the parts as they were published "
                "(NAME-00001-of-00003.gguf and so on)"
            )
        return [file]
    count = int(name["count"])
    if not 1 <= int(name["no"]) <= count:
        raise CheckpointError(f"{path} calls itself part {int(name['no'])} of {count}")
    paths = [path.with_name(f"{name['stem']}-{no:05d}-of-{name['count']}.gguf") for no in range(1, count + 1)]
    absent = [part.name for part in paths if not part.is_file()]
    if absent:
        raise CheckpointError(
            f"{path.parent} lacks {len(absent)} of the {count} parts of this model, {quoted(absent[0])} first; "
            "download them again"
        )
    files = [read_gguf(part) for part in paths]
    for i, file in enumerate(files):
        stored = (_split_number(file, "split.no", default=i), _split_number(file, "split.count", default=count))
        if stored != (i, count):
            raise CheckpointError(
                f"{file.path} is part {stored[0] + 1} of {stored[1]} by its metadata but part {i + 1} of {count} by "
                "its name; download it again"
            )
    found = sum(len(file.tensors) for file in files)
    wanted = _split_number(files[0], "split.tensors.count", default=found)
    if found != wanted:
        raise CheckpointError(f"the {count} parts of {paths[0]} hold {found} tensors but {wanted} were split")
    return files


def _split_number(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file.path}: {key} is {quoted(value)}; a number was expected")
    return value


def _rename(ref: TensorRef) -> list[TensorRef]:
    """The tensor under its Hugging Face name, one per expert for a stack [E, out, in]; unknown ones as they are."""
    if ref.name in _MODEL_TENSORS:
        return [_named(ref, _MODEL_TENSORS[ref.name])]
    block = _BLOCK_NAME.fullmatch(ref.name)
    if block is None:
        return [ref]
    layer, name = f"model.layers.{block[1]}", block[2]
    if name in _LAYER_TENSORS:
        return [_named(ref, f"{layer}.{_LAYER_TENSORS[name]}")]
    if name in _EXPERT_TENSORS and len(ref.shape) == 3 and ref.shape[0] <= MAX_EXPERTS:
        names = [f"{layer}.mlp.experts.{e}.{_EXPERT_TENSORS[name]}.weight" for e in range(ref.shape[0])]
        return list(split_tensor(ref, [(expert, ref.shape[1:]) for expert in names]))
    return [ref]


def gguf_name(name: str) -> str:
    """The inverse of the renaming, for what is no routed expert; names that GGUF has given stay."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return f"blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}" if layer else name


_MODEL_NAMES = {name: stored for stored, name in _MODEL_TENSORS.items()}
_LAYER_NAMES = {name: stored for stored, name in reversed(_LAYER_TENSORS.items())}  # of two, the one listed first


def _named(ref: TensorRef, name: str) -> TensorRef:
    return TensorRef(name, ref.file, ref.offset, ref.nbytes, ref.shape, ref.dtype)


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Typed look-ups in the metadata, with the architecture's prefix."""

    path: Path
    values: Mapping[str, Any]

    def config(self, refs: Mapping[str, TensorRef]) -> dict[str, Any]:
        """The config.json that this model would have. Ranges are checked later, by ModelConfig.from_hf."""
        self._refuse_variants()
        embeddings = refs.get("model.embed_tokens.weight")
        if embeddings is None or len(embeddings.shape) != 2:
            raise CheckpointError(f"{self.path} has no matrix token_embd.weight; download it again")
        mtp_layers = self.integer("nextn_predict_layers", 0)
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", self.integer("embedding_length") // max(heads, 1))
        if self.integer("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(f"{self.path}: attention.key_length and value_length differ, which GLM-4.5 never has")
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "vocab_size": embeddings.shape[0],
            "hidden_size": self.integer("embedding_length"),
            "intermediate_size": self.integer("feed_forward_length"),
            "moe_intermediate_size": self.integer("expert_feed_forward_length"),
            "num_hidden_layers": self.integer("block_count") - mtp_layers,
            "num_nextn_predict_layers": mtp_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rope_theta": self.real("rope.freq_base", 10000.0),
            "partial_rotary_factor": _fraction(self.integer("rope.dimension_count", head_dim), head_dim),
            "max_position_embeddings": self.integer("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in refs,
            "use_qk_norm": "model.layers.0.self_attn.q_norm.weight" in refs,
            "tie_word_embeddings": "lm_head.weight" not in refs,
            "first_k_dense_replace": self.integer("leading_dense_block_count", 0),
            "n_routed_experts": self.integer("expert_count"),
            "num_experts_per_tok": self.integer("expert_used_count"),
            "n_shared_experts": self.integer("expert_shared_count"),
            "n_group": self.integer("expert_group_count", 1) or 1,
            "topk_group": self.integer("expert_group_used_count", 1) or 1,
            # llama.cpp's reading of absent keys: no normalising, and 0 means no scaling
            "norm_topk_prob": self.boolean("expert_weights_norm", False),
            "routed_scaling_factor": self.real("expert_weights_scale", 1.0) or 1.0,
            "eos_token_id": self._stop_ids(),
            "bos_token_id": self.values.get("tokenizer.ggml.bos_token_id"),
            "pad_token_id": self.values.get("tokenizer.ggml.padding_token_id"),
        }

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # some writers store one value per layer
        if type(value) is not int:
            raise self._wrong(key, value, "an integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, value, "a number")
        if abs(value) < 1e38 and float(np.float32(value)) == value:
            # fp32 in the file: the shortest decimal that gives it is what config.json had (1e-05, not 9.99999974e-06)
            return float(str(np.float32(value)))
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata key {ARCHITECTURE}.{key}; convert the model again")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {ARCHITECTURE}.{key} is {quoted(value)}; {wanted} was expected")

    def _refuse_variants(self) -> None:
        gating = self.integer("expert_gating_func", _SIGMOID) or _SIGMOID  # 0: not stated
        if gating != _SIGMOID:
            raise CheckpointError(
                f"{self.path}: {ARCHITECTURE}.expert_gating_func is {gating}; only {_SIGMOID} (sigmoid) is supported"
            )
        scaling = self._get("rope.scaling.type", "none")
        if scaling not in ("none", "") and self.real("rope.scaling.factor", 0.0) != 1.0:
            raise CheckpointError(
                f"{self.path}: rope scaling {quoted(scaling)} is not supported; only plain rotary embeddings are"
            )

    def _stop_ids(self) -> list[int]:
        ids: list[int] = []
        for name in ("eos", "eot", "eom"):
            token = self.values.get(f"tokenizer.ggml.{name}_token_id")
            if token is not None and token not in ids:
                ids.append(token)
        return ids


def _fraction(part: int, whole: int) -> float:
    """A factor such that ``int(whole * factor)`` is ``part`` again, as transformers computes the rotary width."""
    factor = part / whole if whole else 0.0
    return factor if int(whole * factor) == part else math.nextafter(factor, math.inf)
