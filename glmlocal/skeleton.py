"""An engine around a model of small layers: what a step costs beside its products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.engine import Engine
from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.engine.scheduler import Scheduler
from glmlocal.formats.quant import QuantizedMatrix
from glmlocal.formats.schemes import Activations
from glmlocal.layers.embedding import Embedding
from glmlocal.layers.experts import ResidentExperts
from glmlocal.layers.kv_cache import KVCache
from glmlocal.layers.linear import Linear
from glmlocal.layers.norm import RMSNorm
from glmlocal.layers.rope import cos_sin_table
from glmlocal.models.config import ModelConfig
from glmlocal.models.glm4_moe import DecoderLayer, Glm4MoeForCausalLM

_EXPERTS, _TOP_K, _CONTEXT, _BLOCK = 8, 8, 4096, 32
_GLM_VOCAB = 151552


def _floats(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full((rows, columns), 2.0**-8, dtype=dtype)


Matrix = Callable[[int, int], Tensor | QuantizedMatrix]  # rows, columns → weights


@dataclass(frozen=True, slots=True)
class Heads:
    """Of attention in one layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def numbers(self) -> int:
        """Of one position's keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def operations(self) -> int:
        """Of one query with one position."""
        return 4 * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class SkeletonShape(Heads):
    """Of a model whose tokens meet all of its experts, and a shared one."""

    hidden: int
    intermediate: int  # of an expert

    @property
    def layer_weights(self) -> int:
        """That a token meets; the router's are not counted."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * (_TOP_K + 1) * self.hidden * self.intermediate


TINY = SkeletonShape(hidden=64, heads=2, kv_heads=2, head_dim=32, intermediate=64)  # costs nothing but its calls
SMALL = SkeletonShape(hidden=640, heads=10, kv_heads=2, head_dim=64, intermediate=256)  # as small models are


class Skeleton:
    """Decodes one endless request. Every matrix of a layer has memory of its own."""

    def __init__(
        self,
        layers: int,
        shape: SkeletonShape = TINY,
        matrix: Matrix = _floats,
        activations: Activations = "fp32",
        vocab: int = _GLM_VOCAB,
    ) -> None:
        config = ModelConfig.from_hf(
            {
                "model_type": "glm4_moe",
                "vocab_size": vocab,
                "hidden_size": shape.hidden,
                "intermediate_size": shape.intermediate,
                "moe_intermediate_size": shape.intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "n_routed_experts": _EXPERTS,
                "num_experts_per_tok": _TOP_K,
                "first_k_dense_replace": 0,
                "max_position_embeddings": _CONTEXT,
                "eos_token_id": [0],
            }
        )
        cos_sin, hidden = cos_sin_table(_CONTEXT, shape.head_dim, 1e6), shape.hidden
        self.layers, self._hidden = layers, hidden
        self._head = Linear(kernels.pack(_floats(vocab, hidden)))
        model = Glm4MoeForCausalLM(
            config,
            Embedding(np.zeros((vocab, 2 * hidden), np.uint8), "BF16", hidden),
            tuple(_layers(layers, shape, matrix, activations, cos_sin)),
            RMSNorm(torch.ones(hidden), 1e-5),
            self._head,
            (),
        )
        num_blocks = _CONTEXT // _BLOCK
        cache = KVCache.allocate(layers, num_blocks, _BLOCK, shape.kv_heads, shape.head_dim, "bf16")
        scheduler = Scheduler(
            BlockPool(num_blocks, _BLOCK), context=_CONTEXT, max_batch=1, max_num_batched_tokens=_CONTEXT
        )
        self._engine = Engine(ModelRunner(model, cache), scheduler)
        endless = SamplingParams(temperature=0.0, max_tokens=_CONTEXT - 2, ignore_eos=True)
        self._engine.add(Request("endless", (1,), endless))

    def step(self) -> None:
        """One token. Raises RuntimeError when the context is full, after some 4,000."""
        if not self._engine.step():
            raise RuntimeError("the skeleton's context is full")

    def chunk(self, tokens: int) -> Tensor:
        """A prompt of so many tokens in one chunk, with the product with the vocabulary for each."""
        return self._engine.logits([1] * tokens)

    def head(self) -> Tensor:
        """The product with the vocabulary that is part of a step."""
        return self._head(torch.ones(1, self._hidden))


def _layers(
    count: int, shape: SkeletonShape, matrix: Matrix, activations: Activations, cos_sin: Tensor
) -> Iterator[DecoderLayer]:
    hidden, q_size, kv_size = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    query, key, out = matrix(q_size, hidden), matrix(kv_size, hidden), matrix(hidden, q_size)
    wide, tall = matrix(shape.intermediate, hidden), matrix(hidden, shape.intermediate)
    ones = torch.ones(hidden)
    for index in range(count):
        q, k, v, o, gate, up, down = (
            kernels.pack(each, activations) for each in (query, key, key, out, wide, wide, tall)
        )
        gates = _floats(_EXPERTS, hidden, torch.float32)
        router = kernels.Router(kernels.pack(gates), torch.zeros(_EXPERTS), _TOP_K, 1, 1, True, 1.0)
        attention = kernels.AttentionBlock(
            input_layernorm=ones,
            q_proj=q,
            k_proj=k,
            v_proj=v,
            o_proj=o,
            q_bias=None,
            k_bias=None,
            v_bias=None,
            q_norm=None,
            k_norm=None,
            post_attention_layernorm=ones,
            rms_norm_eps=1e-5,
            head_dim=shape.head_dim,
            cos_sin=cos_sin,
            router=router,
        )
        experts = kernels.pack_experts([wide] * _EXPERTS, [wide] * _EXPERTS, [tall] * _EXPERTS, activations)
        yield DecoderLayer(index, kernels.bind_attention(attention), None, ResidentExperts(experts), (gate, up, down))
