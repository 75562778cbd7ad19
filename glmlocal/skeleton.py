"""An engine around a model of small layers: what a step costs beside its products."""

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

_HEAD_DIM, _EXPERTS, _TOP_K, _CONTEXT, _BLOCK = 32, 8, 8, 4096, 32
_TINY_HIDDEN, _GLM_VOCAB = 64, 151552


class Skeleton:
    """Decodes one endless request. A layer's matrices are ``square``, fp32 or quantized [hidden, hidden], each with a
    copy of its own: q, k, v, o, and gate, up and down of eight routed experts and a shared one, all of which every
    token meets."""

    def __init__(
        self,
        layers: int,
        square: Tensor | QuantizedMatrix | None = None,
        activations: Activations = "fp32",
        vocab: int = _GLM_VOCAB,
    ) -> None:
        square = _floats(_TINY_HIDDEN, _TINY_HIDDEN) if square is None else square
        hidden = square.shape[0]
        heads = hidden // _HEAD_DIM
        config = ModelConfig.from_hf(
            {
                "model_type": "glm4_moe",
                "vocab_size": vocab,
                "hidden_size": hidden,
                "intermediate_size": hidden,
                "moe_intermediate_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_dim": _HEAD_DIM,
                "n_routed_experts": _EXPERTS,
                "num_experts_per_tok": _TOP_K,
                "first_k_dense_replace": 0,
                "max_position_embeddings": _CONTEXT,
                "eos_token_id": [0],
            }
        )
        cos_sin = cos_sin_table(_CONTEXT, _HEAD_DIM, 1e6)
        self._hidden = hidden
        self._head = Linear(_matrix(vocab, hidden))
        model = Glm4MoeForCausalLM(
            config,
            Embedding(np.zeros((vocab, 2 * hidden), np.uint8), "BF16", hidden),
            tuple(_layer(i, square, activations, cos_sin) for i in range(layers)),
            RMSNorm(torch.ones(hidden), 1e-5),
            self._head,
            (),
        )
        num_blocks = _CONTEXT // _BLOCK
        cache = KVCache.allocate(layers, num_blocks, _BLOCK, heads, _HEAD_DIM, "bf16")
        scheduler = Scheduler(
            BlockPool(num_blocks, _BLOCK), context=_CONTEXT, max_batch=1, max_num_batched_tokens=_CONTEXT
        )
        self._engine = Engine(ModelRunner(model, cache), scheduler)
        endless = SamplingParams(temperature=0.0, max_tokens=_CONTEXT - 2, ignore_eos=True)
        self._engine.add(Request("endless", (1,), endless))

    @staticmethod
    def attention_work(hidden: int) -> tuple[int, int]:
        """Numbers of keys and values, and operations, of a query with one position in one layer."""
        return 2 * hidden, 4 * hidden

    @staticmethod
    def layer_weights(hidden: int) -> int:
        """Of one layer, that a token meets; the router's are not counted."""
        return (4 + 3 * (_EXPERTS + 1)) * hidden * hidden

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


def _layer(index: int, square: Tensor | QuantizedMatrix, activations: Activations, cos_sin: Tensor) -> DecoderLayer:
    def squares(count: int) -> list[kernels.Weight]:
        return [kernels.pack(square, activations) for _ in range(count)]

    hidden = square.shape[0]
    ones = torch.ones(hidden)
    router = kernels.Router(_matrix(_EXPERTS, hidden, torch.float32), torch.zeros(_EXPERTS), _TOP_K, 1, 1, True, 1.0)
    q, k, v, o = squares(4)
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
        head_dim=_HEAD_DIM,
        cos_sin=cos_sin,
        router=router,
    )
    matrices = [square] * _EXPERTS
    experts = ResidentExperts(kernels.pack_experts(matrices, matrices, matrices, activations))
    gate, up, down = squares(3)
    return DecoderLayer(index, kernels.bind_attention(attention), None, experts, (gate, up, down))


def _matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> kernels.Weight:
    return kernels.pack(_floats(rows, columns, dtype))


def _floats(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full((rows, columns), 2.0**-8, dtype=dtype)
