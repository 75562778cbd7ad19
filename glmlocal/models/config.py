"""ModelConfig: what a ``glm4_moe`` config.json says, checked.

Every number is checked against a range before anything is sized by it; the ranges are far wider than any model of the
family. Code that a config names (``auto_map``) is never looked at. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glmlocal.errors import CheckpointError
from glmlocal.formats.index import quoted
from glmlocal.models.tensors import (
    ARCHITECTURE,
    check_tensors,
    expected_mtp_tensors,
    expected_tensors,
    mtp_problem,
    optional_mtp_tensors,
)

__all__ = [  # a config and the tensors that follow from it are asked for together
    "KV_DTYPES",
    "ModelConfig",
    "check_tensors",
    "expected_mtp_tensors",
    "expected_tensors",
    "mtp_problem",
    "optional_mtp_tensors",
]

MODEL_TYPE = "glm4_moe"
KV_DTYPES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # bytes of one element of the KV cache
KV_SCALE_BYTES = 4  # int8: one scale for each token and kv head of keys, one of values

_INT_RANGES = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "moe_intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 2048),
    "num_key_value_heads": (1, 2048),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 1 << 30),
    "first_k_dense_replace": (0, 512),
    "n_routed_experts": (1, 1024),
    "num_experts_per_tok": (1, 1024),
    "n_shared_experts": (1, 64),
    "n_group": (1, 1024),
    "topk_group": (1, 1024),
    "num_nextn_predict_layers": (0, 16),
}
_FLOAT_RANGES = {  # above the first, up to and with the second
    "rms_norm_eps": (0.0, 1.0),
    "routed_scaling_factor": (0.0, 1e4),
    "rope_theta": (0.0, 1e12),
    "partial_rotary_factor": (0.0, 1.0),
}
_BOOLS = ("norm_topk_prob", "attention_bias", "use_qk_norm", "tie_word_embeddings")
_ALIASES = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
_MAX_TOKEN_ID = 1 << 31
_MAX_EXPERTS_IN_ALL = 1 << 17  # GLM-5 has 19,456; the list of expected tensors must stay a list one can make


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hugging Face's names; the defaults are those of transformers' Glm4MoeConfig (5.23)."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944  # of the dense layers
    moe_intermediate_size: int = 1408  # of one expert
    num_hidden_layers: int = 46  # without MTP layers
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128  # hidden_size // num_attention_heads where the file has none
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    hidden_act: str = "silu"
    attention_bias: bool = False  # on q, k and v; o never has one
    use_qk_norm: bool = False
    tie_word_embeddings: bool = False
    first_k_dense_replace: int = 1
    n_routed_experts: int = 128
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 1  # as declared; check_tensors tells whether they are there
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    quant_method: str | None = None  # quantization_config.quant_method; used in messages only

    @property
    def rotary_dim(self) -> int:
        """Features of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of KV cache for one token, MTP layers not counted; ``kv_dtype`` is one of KV_DTYPES."""
        head_bytes = self.head_dim * KV_DTYPES[kv_dtype] + (KV_SCALE_BYTES if kv_dtype == "int8" else 0)
        return 2 * self.num_hidden_layers * self.num_key_value_heads * head_bytes

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's dict. Raises CheckpointError naming the field, its value and what is accepted."""
        _check_architecture(config)
        values = {**config, **_read_rope(config)}
        for name, alias in _ALIASES.items():
            values[name] = _either(values, name, alias)
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        read: dict[str, Any] = {name: _int(values, name, defaults[name]) for name in _INT_RANGES if name != "head_dim"}
        read["head_dim"] = _int(values, "head_dim", read["hidden_size"] // read["num_attention_heads"])
        read |= {name: _float(values, name, defaults[name]) for name in _FLOAT_RANGES}
        read |= {name: _bool(values, name, defaults[name]) for name in _BOOLS}
        hidden_act = values.get("hidden_act") or "silu"
        if hidden_act != "silu":
            raise _wrong("hidden_act", hidden_act, "'silu'")
        result = cls(
            **read,
            hidden_act=hidden_act,
            eos_token_id=_token_ids(values.get("eos_token_id")),
            bos_token_id=_optional_token_id("bos_token_id", values.get("bos_token_id")),
            pad_token_id=_optional_token_id("pad_token_id", values.get("pad_token_id")),
            quant_method=_quant_method(config),
        )
        _check_relations(result)
        return result


def _check_architecture(config: Mapping[str, Any]) -> None:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    named = architectures if isinstance(architectures, list) and architectures else []
    if model_type in (MODEL_TYPE, None) and (ARCHITECTURE in named or (model_type and not named)):
        return
    found = f"architecture {quoted(named[0])}" if named else "no architecture"
    raise CheckpointError(
        f"the checkpoint has {found} and model_type {quoted(model_type)}; glmlocal runs {ARCHITECTURE} "
        f"(model_type {MODEL_TYPE!r}): GLM-4.5, 4.5-Air, 4.6 and 4.7"
    )


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and partial_rotary_factor, where given, from the form of transformers 4 (top level) or 5."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise _wrong(key, rope, "an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{key} has rope_type {quoted(kind)}; only 'default' is supported")
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise CheckpointError(f"{key} has entries per layer type ({quoted(nested[0])}); one for all is supported")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers' order
    names = ("rope_theta", "partial_rotary_factor")
    return {name: rope[name] if rope.get(name) is not None else config.get(name) for name in names}


def _quant_method(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and isinstance(quantization.get("quant_method"), str):
        # One method of many formats: the format says more.
        names = (quantization["quant_method"], quantization.get("format"))
        return " ".join(name for name in names if isinstance(name, str))
    return "mlx" if isinstance(config.get("quantization"), Mapping) else None


def _check_relations(config: ModelConfig) -> None:
    """What must hold between fields that are each in range."""
    if config.head_dim % 2:
        raise _wrong("head_dim", config.head_dim, "an even number")
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        wanted = f"a fraction that makes an even number of head_dim {config.head_dim}"
        raise _wrong("partial_rotary_factor", config.partial_rotary_factor, wanted)
    if config.num_attention_heads % config.num_key_value_heads:
        wanted = f"a divisor of num_attention_heads {config.num_attention_heads}"
        raise _wrong("num_key_value_heads", config.num_key_value_heads, wanted)
    if config.first_k_dense_replace > config.num_hidden_layers:
        wanted = f"0 to num_hidden_layers {config.num_hidden_layers}"
        raise _wrong("first_k_dense_replace", config.first_k_dense_replace, wanted)
    if config.num_hidden_layers * config.n_routed_experts > _MAX_EXPERTS_IN_ALL:
        wanted = f"at most {_MAX_EXPERTS_IN_ALL} experts in all {config.num_hidden_layers} layers"
        raise _wrong("n_routed_experts", config.n_routed_experts, wanted)
    per_group, rest = divmod(config.n_routed_experts, config.n_group)
    if rest or (config.n_group > 1 and per_group < 2):
        wanted = f"a divisor of n_routed_experts {config.n_routed_experts} that leaves at least 2 in a group"
        raise _wrong("n_group", config.n_group, wanted)
    if config.topk_group > config.n_group:
        raise _wrong("topk_group", config.topk_group, f"1 to n_group {config.n_group}")
    if config.num_experts_per_tok > per_group * config.topk_group:
        wanted = f"1 to {per_group * config.topk_group}, the experts of the {config.topk_group} groups that are kept"
        raise _wrong("num_experts_per_tok", config.num_experts_per_tok, wanted)


def _wrong(name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{name} is {quoted(value)} in the model's config; {wanted} was expected")


def _either(values: Mapping[str, Any], name: str, alias: str) -> Any:
    first, second = values.get(name), values.get(alias)
    if first is not None and second is not None and first != second:
        raise _wrong(alias, second, f"the same as {name} ({quoted(first)})")
    return second if first is None else first


def _int(values: Mapping[str, Any], name: str, default: int) -> int:
    """An absent or null field is the default. A bool is not a number here, nor is 1.0."""
    value = values.get(name)
    low, high = _INT_RANGES[name]
    value = default if value is None else value
    if type(value) is not int or not low <= value <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}")
    return value


def _float(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    low, high = _FLOAT_RANGES[name]
    value = default if value is None else value
    if type(value) not in (int, float) or not low < value <= high:  # NaN is not
        raise _wrong(name, value, f"a number above {low:g} and up to {high:g}")
    return float(value)


def _bool(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 1024 or not all(type(i) is int and 0 <= i < _MAX_TOKEN_ID for i in ids):
        raise _wrong("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def _optional_token_id(name: str, value: Any) -> int | None:
    if value is None or value == -1:  # -1 is how some configs write "none"
        return None
    if type(value) is not int or not 0 <= value < _MAX_TOKEN_ID:
        raise _wrong(name, value, "a token id or null")
    return value
