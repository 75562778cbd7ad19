"""The tensors that a ModelConfig implies, and the check of a checkpoint against them before anything is read.

Torch-free. Names and shapes are those of the Hugging Face releases: linear weights are [out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from glmlocal.errors import CheckpointError
from glmlocal.formats.expert_pack_layout import PACK_DTYPE
from glmlocal.formats.fp8 import FP8_DTYPE, scales_of
from glmlocal.formats.index import TensorIndex, TensorRef, quoted
from glmlocal.formats.schemes import DENSE_DTYPES, QUANTIZED_DTYPES

if TYPE_CHECKING:
    from glmlocal.models.config import ModelConfig

ARCHITECTURE = "Glm4MoeForCausalLM"
_SUPPORTED = (
    f"BF16, F16, F32, {FP8_DTYPE} with scales per row or 128 x 128 block, GPTQ, AWQ, compressed-tensors, MLX, NVFP4 "
    "and MXFP4 are in safetensors, "
    f"BF16, F16, F32 and {', '.join(sorted(QUANTIZED_DTYPES))} in GGUF"
)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's own tensors, without MTP; no ``lm_head.weight`` when the embeddings are tied."""
    return dict(_model_shapes(config))


def expected_mtp_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that the declared MTP layers need."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return dict(item for i in layers for item in _mtp_shapes(config, i))


def optional_mtp_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The copies of embeddings and head that some releases (GLM-4.5, Air) keep in their MTP layer."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    names = ("embed_tokens.weight", "shared_head.head.weight")
    return {f"model.layers.{i}.{name}": (config.vocab_size, config.hidden_size) for i in layers for name in names}


def top_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is in no layer."""
    return dict(_top_shapes(config))


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Of one decoder layer, or of an MTP layer (from num_hidden_layers on) without its optional copies."""
    if layer >= config.num_hidden_layers:
        return dict(_mtp_shapes(config, layer))
    return dict(_layer_shapes(config, layer, is_dense=layer < config.first_k_dense_replace))


def check_tensors(config: ModelConfig, tensors: TensorIndex) -> bool:
    """Is everything there that the model needs, in the right shape and a supported dtype? Reads no tensor.

    Returns whether every declared MTP layer is complete and usable. An MTP layer that is not is no error (trunk-only
    files, and files with the unused layer squeezed into an exotic type, are common); ``mtp_problem`` says why.
    Raises CheckpointError naming the first offending tensor and how many more there are.
    """
    expected = expected_tensors(config)
    unreadable = [name for name in expected if name in tensors.unreadable]
    if unreadable:
        raise CheckpointError(
            f"{tensors.source} cannot be run: {tensors.unreadable[unreadable[0]]}{_and_more(unreadable)}"
        )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise _missing(config, tensors, missing, expected)
    _check_dtypes(config, tensors, expected)
    _check_shapes(tensors, expected)
    _refuse_strangers(config, tensors, expected)
    return mtp_problem(config, tensors) is None


def mtp_problem(config: ModelConfig, tensors: TensorIndex) -> str | None:
    """Why the MTP layers cannot be used; None when they can."""
    expected = expected_mtp_tensors(config)
    if not expected:
        return "none declared"
    unreadable = next((name for name in expected if name in tensors.unreadable), None)
    if unreadable is not None:
        return tensors.unreadable[unreadable]
    missing = sum(name not in tensors for name in expected)
    if missing == len(expected):
        return "none in the file"
    if missing:
        return f"{missing} of its {len(expected)} tensors are missing"
    present = {name: shape for name, shape in optional_mtp_tensors(config).items() if name in tensors}
    try:
        _check_dtypes(config, tensors, expected | present)
        _check_shapes(tensors, expected | present)
    except CheckpointError as error:
        return str(error)
    return None


def _model_shapes(config: ModelConfig) -> Shapes:
    embeddings, *rest = _top_shapes(config)
    yield embeddings
    for i in range(config.num_hidden_layers):
        yield from _layer_shapes(config, i, is_dense=i < config.first_k_dense_replace)
    yield from rest


def _top_shapes(config: ModelConfig) -> Shapes:
    embedding = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", embedding
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", embedding


def _mtp_shapes(config: ModelConfig, i: int) -> Shapes:
    prefix, hidden = f"model.layers.{i}", config.hidden_size
    yield from _layer_shapes(config, i, is_dense=False)
    yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}.{name}.weight", (hidden,)


def _layer_shapes(config: ModelConfig, i: int, *, is_dense: bool) -> Shapes:
    prefix, hidden = f"model.layers.{i}", config.hidden_size
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    kv_width = config.num_key_value_heads * config.head_dim
    widths = {"q": config.num_attention_heads * config.head_dim, "k": kv_width, "v": kv_width}
    for name, width in widths.items():
        yield f"{prefix}.self_attn.{name}_proj.weight", (width, hidden)
        if config.attention_bias:
            yield f"{prefix}.self_attn.{name}_proj.bias", (width,)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, widths["q"])
    if config.use_qk_norm:
        yield f"{prefix}.self_attn.q_norm.weight", (config.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (config.head_dim,)
    if is_dense:
        yield from _ffn_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
        return
    yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _ffn_shapes(f"{prefix}.mlp.shared_experts", hidden, shared)
    for e in range(config.n_routed_experts):
        yield from _ffn_shapes(f"{prefix}.mlp.experts.{e}", hidden, config.moe_intermediate_size)


def _ffn_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _missing(
    config: ModelConfig, tensors: TensorIndex, missing: list[str], expected: Mapping[str, tuple[int, ...]]
) -> CheckpointError:
    if not any(name.startswith("model.layers.0.") for name in tensors) and mtp_problem(config, tensors) is None:
        return CheckpointError(f"{tensors.source} holds an MTP layer alone; give the file of the whole model")
    hint = "download the checkpoint again"
    if config.quant_method is not None:
        hint = f"it is quantized with {quoted(config.quant_method)}, which is not supported yet: {_SUPPORTED}"
    return CheckpointError(
        f"{tensors.source} lacks the tensor {missing[0]} (shape {list(expected[missing[0]])}){_and_more(missing)}; "
        f"{hint}"
    )


def _check_dtypes(config: ModelConfig, tensors: TensorIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    quantized = QUANTIZED_DTYPES if tensors.kind == "gguf" else frozenset({FP8_DTYPE})
    supported = DENSE_DTYPES | quantized
    wrong = [name for name in expected if not _is_supported(tensors[name], supported)]
    if wrong:
        method = "" if config.quant_method is None else f" (quantized with {quoted(config.quant_method)})"
        raise CheckpointError(
            f"tensor {wrong[0]} is {tensors[wrong[0]].dtype}{method}{_and_more(wrong)}, which is not supported: "
            f"{_SUPPORTED}"
        )
    plain = [
        name
        for name in expected
        if (tensors[name].matrix or tensors[name].dtype in quantized)
        and _must_be_plain(name, expected[name], tensors[name])
    ]
    if plain:
        what = "norms, biases and routers" if tensors.kind == "gguf" else "norms, biases, routers and embeddings"
        raise CheckpointError(
            f"tensor {plain[0]} is {tensors[plain[0]].dtype}{_and_more(plain)}; {what} must be "
            f"{', '.join(sorted(DENSE_DTYPES))}"
        )


def _is_supported(ref: TensorRef, supported: frozenset[str]) -> bool:
    # Whatever a pack has stored the kernels can use: nothing else gets past its header.
    return ref.matrix is not None or ref.dtype in supported or ref.dtype.startswith(PACK_DTYPE)


def _check_shapes(tensors: TensorIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [name for name, shape in expected.items() if tensors[name].shape != shape]
    if not wrong:
        for name in expected:
            if tensors[name].dtype == FP8_DTYPE:
                scales_of(tensors, name)
    if wrong:
        raise CheckpointError(
            f"tensor {wrong[0]} has shape {list(tensors[wrong[0]].shape)}, wanted {list(expected[wrong[0]])}"
            f"{_and_more(wrong)}; the config and the tensors are of different models"
        )


def _refuse_strangers(config: ModelConfig, tensors: TensorIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Tensors that would change the result if they were not silently left out.

    A GGUF file may have no tensor that its architecture does not know: llama.cpp refuses such files too. Safetensors
    may (buffers, other heads), but not the biases and norms that the config denies.
    """
    if tensors.kind == "gguf":
        mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        prefixes = tuple(f"model.layers.{i}." for i in mtp)
        stranger = next((name for name in tensors if name not in expected and not name.startswith(prefixes)), None)
        if stranger is not None:
            raise CheckpointError(
                f"{tensors.source} has the tensor {quoted(stranger)}, which {ARCHITECTURE} of this config does not have"
            )
        return
    optional = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight")
    names = (f"model.layers.{i}.self_attn.{name}" for i in range(config.num_hidden_layers) for name in optional)
    denied = next((name for name in names if name in tensors and name not in expected), None)
    if denied is not None:
        raise CheckpointError(
            f"{tensors.source} has the tensor {denied}, but its config says attention_bias {config.attention_bias} "
            f"and use_qk_norm {config.use_qk_norm}; the two are of different models"
        )


def _must_be_plain(name: str, shape: tuple[int, ...], ref: TensorRef) -> bool:
    has_rows = ref.dtype != FP8_DTYPE if ref.matrix is None else ref.matrix.has_rows
    if name.endswith("embed_tokens.weight") and not has_rows:  # they are read one by one, with their scales
        return True
    return len(shape) == 1 or name.endswith(".mlp.gate.weight")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""
