"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (HF model_type ``glm4_moe``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from glmlocal import kernels
from glmlocal.formats.expert_pack import expert_name
from glmlocal.layers.context import ForwardContext, StepCancelled
from glmlocal.layers.embedding import AnyEmbedding
from glmlocal.layers.experts import Experts, ResidentExperts
from glmlocal.layers.linear import Linear
from glmlocal.layers.norm import RMSNorm
from glmlocal.layers.rope import cos_sin_table
from glmlocal.models.config import ModelConfig
from glmlocal.models.weights import WeightReader

FFN = tuple[kernels.Weight, kernels.Weight, kernels.Weight]  # gate, up, down
PlaceExperts = Callable[[int], Experts | None]  # layer → its routed experts, None: read them into memory


def in_memory(layer: int) -> None:
    """The ``PlaceExperts`` of a model that fits."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm attention, then pre-norm FFN, each added to the residual: three native calls."""

    index: int
    attention: kernels.BoundAttention
    mlp: FFN | None  # of a dense layer, which has no experts
    experts: Experts | None
    shared_experts: FFN | None  # added unscaled

    def __call__(self, x: Tensor, context: ForwardContext, following: DecoderLayer | None = None) -> Tensor:
        """x fp32 [tokens, hidden] → the same; writes this layer's keys and values to the cache.

        ``following`` is shown what there is of its input while this layer's experts are on their way.
        """
        out = kernels.attention_block(self.attention, x, context.step, context.kv_cache.layers[self.index])
        if self.experts is None:
            _foresee(following, out.residual)
            return kernels.combine(out.residual, out.hidden, None, self.mlp)
        assert out.topk_ids is not None
        assert out.topk_weights is not None
        routed = self.experts.submit(out.hidden, out.topk_ids, out.topk_weights)
        shared = None
        try:
            if routed.is_done or self.shared_experts is None:
                _foresee(following, out.residual)
            else:
                shared = kernels.swiglu_ffn(out.hidden, *self.shared_experts)
                _foresee(following, out.residual + shared)
        finally:
            arrived = routed.wait()
        if shared is None:
            return kernels.combine(out.residual, out.hidden, arrived, self.shared_experts)
        return out.residual + (shared + arrived)  # as ``combine`` adds them


def _foresee(layer: DecoderLayer | None, x: Tensor) -> None:
    if layer is not None and layer.experts is not None:
        layer.experts.foresee(x.shape[0], lambda: kernels.route(layer.attention, x))


@dataclass(frozen=True, slots=True)
class MTPLayer:
    """One multi-token-prediction ("NextN") layer: weights only, speculation does not use them yet.

    ``embed_tokens`` and ``head`` are None where the checkpoint has no copies and the model's own are meant.
    """

    enorm: RMSNorm
    hnorm: RMSNorm
    eh_proj: Linear
    layer: DecoderLayer
    shared_head_norm: RMSNorm
    embed_tokens: AnyEmbedding | None
    head: Linear | None


@dataclass(frozen=True, slots=True)
class Glm4MoeForCausalLM:
    config: ModelConfig
    embed_tokens: AnyEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear
    mtp: tuple[MTPLayer, ...]

    def __call__(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """input_ids int64 [tokens] → hidden states after the final norm, fp32 [tokens, hidden].

        Raises StepCancelled between two layers when the context says so.
        """
        x = self.embed_tokens(input_ids)
        for layer, following in zip(self.layers, (*self.layers[1:], None), strict=True):
            if context.is_cancelled():
                raise StepCancelled
            x = layer(x, context, following)
        return self.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """fp32 [tokens, hidden] → fp32 [tokens, vocab]."""
        return self.lm_head(hidden_states)


def build(
    config: ModelConfig,
    reader: WeightReader,
    *,
    max_positions: int,
    has_mtp: bool,
    num_threads: int,
    place: PlaceExperts = in_memory,
) -> Glm4MoeForCausalLM:
    """Read and pack all weights, several layers at a time, but for routed experts that ``place`` has elsewhere."""
    rotary_dim = int(config.head_dim * config.partial_rotary_factor)
    cos_sin = cos_sin_table(max_positions, rotary_dim, config.rope_theta)

    def layer(i: int) -> DecoderLayer:
        return _decoder_layer(config, reader, i, cos_sin, place)

    def mtp(i: int) -> MTPLayer:
        return _mtp_layer(config, reader.at_least_8_bits(), config.num_hidden_layers + i, cos_sin, place)

    def lm_head() -> Linear:
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return Linear(reader.at_least_8_bits().weight(name))

    with ThreadPoolExecutor(num_threads) as pool:
        head_future = pool.submit(lm_head)
        layer_futures = [pool.submit(layer, i) for i in range(config.num_hidden_layers)]
        mtp_futures = [pool.submit(mtp, i) for i in range(config.num_nextn_predict_layers if has_mtp else 0)]
        try:
            return Glm4MoeForCausalLM(
                config,
                reader.embedding("model.embed_tokens.weight"),
                tuple(future.result() for future in layer_futures),
                reader.norm("model.norm", config.rms_norm_eps),
                head_future.result(),
                tuple(future.result() for future in mtp_futures),
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C or a bad tensor: do not read the rest of 60 GB first
            raise


def _decoder_layer(
    config: ModelConfig, reader: WeightReader, i: int, cos_sin: Tensor, place: PlaceExperts
) -> DecoderLayer:
    prefix = f"model.layers.{i}"
    mlp = f"{prefix}.mlp"
    if i < config.first_k_dense_replace:
        return DecoderLayer(i, _attention(config, reader, prefix, cos_sin, None), _ffn(reader, mlp), None, None)
    return DecoderLayer(
        i,
        _attention(config, reader, prefix, cos_sin, _router(config, reader, mlp)),
        None,
        place(i) or _experts(config, reader, i),
        _ffn(reader, f"{mlp}.shared_experts") if config.n_shared_experts else None,
    )


def _attention(
    config: ModelConfig,
    reader: WeightReader,
    prefix: str,
    cos_sin: Tensor,
    router: kernels.Router[kernels.Weight] | None,
) -> kernels.BoundAttention:
    attn = f"{prefix}.self_attn"

    def bias(name: str) -> Tensor | None:
        return reader.dense(f"{attn}.{name}_proj.bias") if config.attention_bias else None

    def head_norm(name: str) -> Tensor | None:
        return reader.dense(f"{attn}.{name}_norm.weight") if config.use_qk_norm else None

    return kernels.bind_attention(
        kernels.AttentionBlock(
            input_layernorm=reader.dense(f"{prefix}.input_layernorm.weight"),
            q_proj=reader.weight(f"{attn}.q_proj.weight"),
            k_proj=reader.weight(f"{attn}.k_proj.weight"),
            v_proj=reader.weight(f"{attn}.v_proj.weight"),
            o_proj=reader.weight(f"{attn}.o_proj.weight"),
            q_bias=bias("q"),
            k_bias=bias("k"),
            v_bias=bias("v"),
            q_norm=head_norm("q"),
            k_norm=head_norm("k"),
            post_attention_layernorm=reader.dense(f"{prefix}.post_attention_layernorm.weight"),
            rms_norm_eps=config.rms_norm_eps,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
            router=router,
        )
    )


def _ffn(reader: WeightReader, prefix: str) -> FFN:
    gate, up, down = (reader.weight(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return gate, up, down


def _router(config: ModelConfig, reader: WeightReader, prefix: str) -> kernels.Router[kernels.Weight]:
    return kernels.Router(
        kernels.pack(reader.dense(f"{prefix}.gate.weight")),
        reader.dense(f"{prefix}.gate.e_score_correction_bias"),
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )


def _experts(config: ModelConfig, reader: WeightReader, i: int) -> ResidentExperts:
    packed = reader.packed_experts(i)
    if packed is not None:
        return ResidentExperts(packed)

    def matrices(name: str) -> Iterator[kernels.MatrixRows]:
        return (reader.rows(expert_name(i, e, name)) for e in range(config.n_routed_experts))

    return ResidentExperts(kernels.pack_experts(matrices("gate"), matrices("up"), matrices("down"), reader.activations))


def _mtp_layer(config: ModelConfig, reader: WeightReader, i: int, cos_sin: Tensor, place: PlaceExperts) -> MTPLayer:
    prefix, eps = f"model.layers.{i}", config.rms_norm_eps
    embed, head = f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head"
    return MTPLayer(
        reader.norm(f"{prefix}.enorm", eps),
        reader.norm(f"{prefix}.hnorm", eps),
        reader.linear(f"{prefix}.eh_proj"),
        _decoder_layer(config, reader, i, cos_sin, place),
        reader.norm(f"{prefix}.shared_head.norm", eps),
        reader.embedding(embed) if embed in reader else None,
        reader.linear(head) if f"{head}.weight" in reader else None,
    )
