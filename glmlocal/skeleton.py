"""An engine around a model of tiny layers and a whole vocabulary: what a step costs beside its products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glmlocal import kernels
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.engine import Engine
from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.request import Request, SamplingParams
from glmlocal.engine.scheduler import Scheduler
from glmlocal.layers.embedding import Embedding
from glmlocal.layers.experts import ResidentExperts
from glmlocal.layers.kv_cache import KVCache
from glmlocal.layers.linear import Linear
from glmlocal.layers.norm import RMSNorm
from glmlocal.layers.rope import cos_sin_table
from glmlocal.models.config import ModelConfig
from glmlocal.models.glm4_moe import DecoderLayer, Glm4MoeForCausalLM

_HIDDEN, _HEADS, _HEAD_DIM, _EXPERTS, _TOP_K, _VOCAB, _CONTEXT, _BLOCK = 64, 2, 32, 8, 8, 151552, 4096, 32


class Skeleton:
    """Decodes one endless request; weights are random, and every layer has a router and experts."""

    def __init__(self, layers: int) -> None:
        config = ModelConfig.from_hf(
            {
                "model_type": "glm4_moe",
                "vocab_size": _VOCAB,
                "hidden_size": _HIDDEN,
                "intermediate_size": _HIDDEN,
                "moe_intermediate_size": _HIDDEN,
                "num_hidden_layers": layers,
                "num_attention_heads": _HEADS,
                "num_key_value_heads": _HEADS,
                "head_dim": _HEAD_DIM,
                "n_routed_experts": _EXPERTS,
                "num_experts_per_tok": _TOP_K,
                "first_k_dense_replace": 0,
                "max_position_embeddings": _CONTEXT,
                "eos_token_id": [0],
            }
        )
        cos_sin = cos_sin_table(_CONTEXT, _HEAD_DIM, 1e6)
        self._head = Linear(_matrix(_VOCAB))
        model = Glm4MoeForCausalLM(
            config,
            Embedding(np.zeros((_VOCAB, 2 * _HIDDEN), np.uint8), "BF16", _HIDDEN),
            tuple(_layer(i, cos_sin) for i in range(layers)),
            RMSNorm(torch.ones(_HIDDEN), 1e-5),
            self._head,
            (),
        )
        num_blocks = _CONTEXT // _BLOCK
        cache = KVCache.allocate(layers, num_blocks, _BLOCK, _HEADS, _HEAD_DIM, "bf16")
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

    def head(self) -> Tensor:
        """The product with the vocabulary that is part of a step."""
        return self._head(torch.ones(1, _HIDDEN))


def _layer(index: int, cos_sin: Tensor) -> DecoderLayer:
    ones = torch.ones(_HIDDEN)
    router = kernels.Router(_matrix(_EXPERTS, torch.float32), torch.zeros(_EXPERTS), _TOP_K, 1, 1, True, 1.0)
    square = _matrix(_HIDDEN)
    attention = kernels.AttentionBlock(
        input_layernorm=ones,
        q_proj=square,
        k_proj=square,
        v_proj=square,
        o_proj=square,
        q_bias=None,
        k_bias=None,
        v_bias=None,
        q_norm=None,
        k_norm=None,
        post_attention_layernorm=ones,
        rms_norm_eps=1e-5,
        head_dim=_HEAD_DIM,
        cos_sin=cos_sin,
        router=router,
    )
    matrices = [torch.zeros(_HIDDEN, _HIDDEN)] * _EXPERTS
    experts = ResidentExperts(kernels.pack_experts(matrices, matrices, matrices))
    return DecoderLayer(index, kernels.bind_attention(attention), None, experts, (square, square, square))


def _matrix(rows: int, dtype: torch.dtype = torch.bfloat16) -> kernels.Weight:
    return kernels.pack(torch.full((rows, _HIDDEN), 2.0**-8, dtype=dtype))
