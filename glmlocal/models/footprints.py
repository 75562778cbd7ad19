"""Makes Footprints: from a release of the catalogue, or from the tensors of an opened checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from glmlocal.catalogue import MTP, Format, Release
from glmlocal.errors import CheckpointError, ConfigError
from glmlocal.formats.expert_pack_layout import PACK_DTYPE
from glmlocal.formats.forms import FORMS, Form
from glmlocal.formats.fp8 import FP8_DTYPE, scales_of
from glmlocal.formats.index import Checkpoint, TensorIndex, TensorRef
from glmlocal.formats.llama_cpp_types import tensor_type
from glmlocal.formats.schemes import DENSE_DTYPES
from glmlocal.models import dsa_config, tensors
from glmlocal.models.config import KV_DTYPES, ModelConfig, check_tensors
from glmlocal.models.dsa_config import DsaConfig
from glmlocal.models.footprint import Footprint, Layer, Part
from glmlocal.models.footprint_parts import Stored, component_of, joined, layer_of, top_parts, unused_layer

QUANTS = ("keep", "int8", "int4")
TEXT_FILES_BYTES = 20_000_000  # tokenizer.json, config and template beside a release's weights
_DYNAMIC = {"UD-Q4_K_XL": "Q4_K_S", "UD-Q5_K_XL": "Q5_K_M", "UD-Q6_K_XL": "Q6_K"}  # Unsloth's: the nearest in size
_ROLES = {"lm_head": "output", "v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}  # llama.cpp's
FP8_SCALE_GROUP = 128  # numbers per fp32 scale in DeepSeek's FP8 cache of MLA; its rotated key stays bf16

_Config = ModelConfig | DsaConfig
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def of_release(release: Release, quant: str = "keep") -> Footprint:
    """Of a release as the catalogue has it: exact for BF16, else an estimate. Raises ConfigError for ``quant``.

    Releases that store a model alike, as many publishers' Q4_K_M do, share their layers.
    """
    _check_quant(quant)
    storage = _storage(release)
    top, layers, mtp = _released(storage, quant)
    footprint = _footprint(
        storage.config,
        name=release.name,
        quant=quant,
        top=top,
        layers=layers,
        mtp=mtp,
        file_bytes=0,
        is_exact=release.format == "bf16",
    )
    published = None if footprint.is_exact else release.published_bytes
    return replace(footprint, file_bytes=published or footprint.weights_bytes + TEXT_FILES_BYTES)


def of_checkpoint(
    checkpoint: Checkpoint, quant: str = "keep", name: str | None = None, file_bytes: int | None = None
) -> Footprint:
    """Of a checkpoint's own tensors, of which nothing but headers is looked at.

    ``name`` is by default that of its directory or file; ``file_bytes``, the size of its weight files, is looked up by
    default and must be given where they are not on this machine. Raises CheckpointError where loading it would (not for
    GLM-5, which cannot be loaded), and ConfigError for ``quant``.
    """
    _check_quant(quant)
    config, index = _read_config(checkpoint.config), checkpoint.tensors
    has_mtp = check_tensors(config, index) if isinstance(config, ModelConfig) else _check_dsa(config, index)
    layers = [layer_of(_found(index, _layer_tensors(config, i)), quant) for i in range(config.num_hidden_layers)]
    mtp = [(layer, alike) for layer, alike in _stored_mtp(config, index, quant, has_mtp=has_mtp) if layer.params]
    is_tied = isinstance(config, ModelConfig) and config.tie_word_embeddings
    return _footprint(
        config,
        name=name or checkpoint.path.name,
        quant=quant,
        top=top_parts(_found(index, _top_tensors(config)), quant, is_tied=is_tied),
        layers=tuple(layer for layer, _ in layers),
        mtp=joined(layer for layer, _ in mtp),
        file_bytes=sum(file.stat().st_size for file in index.files) if file_bytes is None else file_bytes,
        is_exact=all(alike for _, alike in (*layers, *mtp)),
    )


def _check_quant(quant: str) -> None:
    if quant not in QUANTS:
        raise ConfigError(f"quant is {quant!r}, wanted one of {', '.join(QUANTS)}")


def _read_config(config: Mapping[str, Any]) -> _Config:
    if config.get("model_type") == dsa_config.MODEL_TYPE:
        return DsaConfig.from_hf(config)
    return ModelConfig.from_hf(config)


def _top_tensors(config: _Config) -> dict[str, tuple[int, ...]]:
    return dsa_config.top_tensors(config) if isinstance(config, DsaConfig) else tensors.top_tensors(config)


def _layer_tensors(config: _Config, i: int) -> dict[str, tuple[int, ...]]:
    """MTP layers without copies of embeddings and head."""
    return dsa_config.layer_tensors(config, i) if isinstance(config, DsaConfig) else tensors.layer_tensors(config, i)


def _mtp_layers(config: _Config) -> range:
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _copies(config: _Config, i: int) -> dict[str, tuple[int, ...]]:
    """Of embeddings and head, which some releases keep in an MTP layer."""
    names = (f"model.layers.{i}.embed_tokens.weight", f"model.layers.{i}.shared_head.head.weight")
    return dict.fromkeys(names, (config.vocab_size, config.hidden_size))


# Releases


class _Storage(NamedTuple):
    """Of a release, what says how each tensor is stored."""

    config: _Config
    format: Format
    quant: str | None  # of a GGUF file: "Q4_K_M"
    recipe: tuple[tuple[str, str], ...]
    mtp: MTP


def _storage(release: Release) -> _Storage:
    config = _read_config(release.family.config)
    if release.mtp == "none":
        config = replace(config, num_nextn_predict_layers=0)
    return _Storage(config, release.format, release.quant, tuple(release.recipe.items()), release.mtp)


@lru_cache(maxsize=256)
def _released(storage: _Storage, quant: str) -> tuple[tuple[Part, ...], tuple[Layer, ...], Layer | None]:
    """What is in no layer, the decoder layers, the MTP layer."""
    config = storage.config
    made: dict[tuple[object, ...], Layer] = {}  # alike layers once

    def layer(i: int) -> Layer:
        key = _layer_kind(storage, i)
        if key not in made:
            stored = (_published(storage, i, name, shape) for name, shape in _release_shapes(storage, i))
            in_mtp = i >= config.num_hidden_layers
            made[key], _ = layer_of(stored, quant, in_mtp=in_mtp, num_experts=config.n_routed_experts)
        return made[key]

    top = [_published(storage, 0, name, shape) for name, shape in _top_tensors(config).items()]
    layers = tuple(layer(i) for i in range(config.num_hidden_layers))
    return top_parts(top, quant), layers, joined(layer(i) for i in _mtp_layers(config))


def _release_shapes(storage: _Storage, i: int) -> _Shapes:
    shapes = _shapes_of_a_layer(storage.config, i)
    if i >= storage.config.num_hidden_layers and storage.mtp == "with copies":
        shapes += tuple(_copies(storage.config, i).items())
    return shapes


@lru_cache(maxsize=256)
def _shapes_of_a_layer(config: _Config, i: int) -> _Shapes:
    """With the first of its experts alone."""
    items = _layer_tensors(config, i).items()
    return tuple(item for item in items if ".mlp.experts." not in item[0] or ".mlp.experts.0." in item[0])


def _layer_kind(storage: _Storage, i: int) -> tuple[object, ...]:
    """Equal for layers of a release that are alike."""
    config = storage.config
    is_mtp, is_dense = i >= config.num_hidden_layers, i < config.first_k_dense_replace
    has_indexer = isinstance(config, DsaConfig) and config.has_indexer(i)
    types: tuple[str, ...] = ()
    if storage.quant is not None and storage.format == "gguf":
        types = _gguf_type(storage, "attn_v", 256, i), _gguf_type(storage, "ffn_down", 256, i)
    return is_mtp, is_dense, has_indexer, types


def _published(storage: _Storage, i: int, name: str, shape: tuple[int, ...]) -> Stored:
    """A tensor of layer ``i`` as the release has it."""
    form = _release_form(storage, i, name, shape)
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return Stored(name, shape, form, form.file_bytes(rows, columns))


def _release_form(storage: _Storage, i: int, name: str, shape: tuple[int, ...]) -> Form:
    is_gguf = storage.format == "gguf"
    if len(shape) == 1:
        return FORMS["f32" if is_gguf or name.endswith("e_score_correction_bias") else "bf16"]
    component, leaf = component_of(name), name.split(".")[-2]
    if component == "router":
        return FORMS["f32" if is_gguf else "bf16"]
    if is_gguf:
        return FORMS[_form_name(_gguf_type(storage, _ROLES.get(leaf, ""), shape[1], i))]
    in_mtp = i >= storage.config.num_hidden_layers
    return FORMS[_by_recipe(dict(storage.recipe), component, leaf, ".indexer." in name, in_mtp)]


def _by_recipe(recipe: Mapping[str, str], component: str, leaf: str, in_indexer: bool, in_mtp: bool) -> str:
    """The entry that says most: of one matrix, of the indexers, of MTP, of a component, of all that is linear."""
    keys = [leaf] if leaf in ("eh_proj", "weights_proj") else []
    keys += ["indexer"] if in_indexer else []
    keys += [f"mtp.{component}", "mtp"] if in_mtp else []
    return next(recipe[key] for key in (*keys, f"{component}.{leaf}", component, "linear") if key in recipe)


def _gguf_type(storage: _Storage, role: str, columns: int, i: int) -> str:
    assert storage.quant is not None
    num_blocks = storage.config.num_hidden_layers + storage.config.num_nextn_predict_layers
    return tensor_type(_DYNAMIC.get(storage.quant, storage.quant), role, columns, i, num_blocks)


# Checkpoints


def _form_name(dtype: str) -> str:
    return dtype.lower() if dtype in DENSE_DTYPES else dtype


def _found(index: TensorIndex, names: Iterable[str]) -> list[Stored]:
    found = []
    for name in names:
        ref = index[name]
        if ref.dtype == FP8_DTYPE:
            scheme, scales = scales_of(index, name)
            found.append(Stored(name, ref.shape, FORMS[scheme.name], ref.nbytes + scales.nbytes))
        elif ref.matrix is not None:
            form = Form(ref.dtype, ref.matrix.scheme, ref.matrix.scheme.bits)
            found.append(Stored(name, ref.shape, form, ref.nbytes))
        elif ref.dtype.startswith(PACK_DTYPE):
            form = _packed_form(index, ref)
            found.append(Stored(name, ref.shape, form, ref.nbytes, is_packed=True))
        else:
            found.append(Stored(name, ref.shape, FORMS[_form_name(ref.dtype)], ref.nbytes))
    return found


def _packed_form(index: TensorIndex, ref: TensorRef) -> Form:
    """Of a matrix in an expert pack, whose header says everything."""
    kind, pack = ref.dtype.removeprefix(PACK_DTYPE), index.experts
    assert pack is not None
    matrices = (matrix for layout in pack.header.layouts.values() for matrix in layout.matrices)
    scheme = next(matrix.scheme for matrix in matrices if matrix.kind == kind)
    return FORMS[kind] if scheme is None else Form(kind, scheme, scheme.bits)


def _stored_mtp(config: _Config, index: TensorIndex, quant: str, *, has_mtp: bool) -> Iterable[tuple[Layer, bool]]:
    for i in _mtp_layers(config):
        weights = {**_layer_tensors(config, i), **_copies(config, i)}
        if has_mtp:
            yield layer_of(_found(index, [name for name in weights if name in index]), quant, in_mtp=True)
        else:
            refs = (ref for name, ref in index.items() if name.startswith(f"model.layers.{i}."))
            yield unused_layer(refs, weights), True


def _check_dsa(config: DsaConfig, index: TensorIndex) -> bool:
    """As ``check_tensors`` for the models that it knows."""
    mtp = {name: shape for i in _mtp_layers(config) for name, shape in _layer_tensors(config, i).items()}
    model = dict(_top_tensors(config))
    for i in range(config.num_hidden_layers):
        model |= _layer_tensors(config, i)
    has_mtp = bool(mtp) and all(name in index for name in mtp)
    for i in _mtp_layers(config):
        mtp |= {name: shape for name, shape in _copies(config, i).items() if name in index}
    for name, shape in (model | mtp if has_mtp else model).items():
        ref = index.get(name)
        if ref is None:
            raise CheckpointError(f"{index.source} lacks the tensor {name} (shape {list(shape)}); download it again")
        if ref.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {list(ref.shape)}, wanted {list(shape)}")
        if ref.dtype not in DENSE_DTYPES and (ref.dtype, len(shape)) != (FP8_DTYPE, 2):
            raise CheckpointError(f"tensor {name} is {ref.dtype}, which is not supported")
    return has_mtp


# Both


def _footprint(
    config: _Config,
    *,
    name: str,
    quant: str,
    top: tuple[Part, ...],
    layers: tuple[Layer, ...],
    mtp: Layer | None,
    file_bytes: int,
    is_exact: bool,
) -> Footprint:
    """With what the config says of attention and its cache."""
    cache, index_cache, num_layers = _cache_bytes(config), _index_cache_bytes(config), config.num_hidden_layers
    has_indexer = [isinstance(config, DsaConfig) and config.has_indexer(i) for i in range(num_layers)]
    index_kv = {dtype: tuple(size if has else 0 for has in has_indexer) for dtype, size in index_cache.items()}
    kv = {dtype: tuple(size + i for i in index_kv.get(dtype, (0,) * num_layers)) for dtype, size in cache.items()}
    num_mtp = config.num_nextn_predict_layers if mtp is not None and mtp.nbytes else 0  # of those that are held
    mtp_kv = {dtype: num_mtp * (size + index_cache.get(dtype, 0)) for dtype, size in cache.items()}
    return Footprint(
        name=name,
        quant=quant,
        top=top,
        layers=layers,
        mtp=mtp,
        num_experts_per_tok=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        kv_bytes=kv,
        mtp_kv_bytes=mtp_kv,
        attention_flops=(_attention_flops(config),) * num_layers,
        attention_window=config.index_topk if isinstance(config, DsaConfig) else None,
        file_bytes=file_bytes,
        is_exact=is_exact,
        index_flops=tuple(_index_flops(config) if has else 0 for has in has_indexer) if index_cache else (),
        index_kv_bytes=index_kv,
    )


def _cache_bytes(config: _Config) -> dict[str, int]:
    """KV dtype → bytes that one token takes in one layer, GLM-5's indexer keys not counted."""
    if isinstance(config, ModelConfig):
        return {dtype: config.kv_bytes_per_token(dtype) // config.num_hidden_layers for dtype in KV_DTYPES}
    scales = 4 * -(-config.kv_lora_rank // FP8_SCALE_GROUP)
    sizes = {dtype: KV_DTYPES[dtype] * config.latent_width for dtype in ("fp32", "bf16")}
    return {**sizes, "fp8": config.kv_lora_rank + scales + 2 * config.qk_rope_head_dim}


def _index_cache_bytes(config: _Config) -> dict[str, int]:
    """The same of the keys that one indexer keeps; in FP8 with a scale per group."""
    if isinstance(config, ModelConfig):
        return {}
    width = config.index_head_dim
    return {"fp32": 4 * width, "bf16": 2 * width, "fp8": width + 4 * -(-width // FP8_SCALE_GROUP)}


def _attention_flops(config: _Config) -> int:
    """Scores and weighted sum; those of MLA in its absorbed form, over the latent."""
    if isinstance(config, ModelConfig):
        return 2 * config.num_attention_heads * (config.head_dim + config.head_dim)
    return 2 * config.num_attention_heads * (config.latent_width + config.kv_lora_rank)


def _index_flops(config: _Config) -> int:
    return 2 * config.index_n_heads * config.index_head_dim if isinstance(config, DsaConfig) else 0
