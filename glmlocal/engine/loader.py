"""Checkpoint → a model with its weights, a KV cache and an engine around them."""

from __future__ import annotations

import os
from collections.abc import Callable

from glmlocal import memory
from glmlocal.engine.block_pool import BlockPool
from glmlocal.engine.engine import Engine
from glmlocal.engine.model_runner import ModelRunner
from glmlocal.engine.scheduler import Scheduler
from glmlocal.errors import ConfigError, PlanError
from glmlocal.formats.index import Checkpoint
from glmlocal.layers.kv_cache import KVCache
from glmlocal.models import glm4_moe
from glmlocal.models.config import KV_DTYPES, ModelConfig, check_tensors
from glmlocal.models.precision import choose_activations, choose_kv_dtype
from glmlocal.models.weights import Quant, WeightReader, loaded_bytes
from glmlocal.units import format_bytes

BLOCK_SIZE = 32  # tokens of KV in one block
MAX_NUM_BATCHED_TOKENS = (
    512  # prefill chunk: large enough that each weight is read for many tokens, small enough to cancel
)
KV_FRACTION = 0.5  # of the memory that is free once the weights are counted


def load_engine(
    checkpoint: Checkpoint,
    *,
    context: int | None = None,
    kv_dtype: str = "auto",
    max_batch: int = 8,
    quant: Quant = "keep",
    activations: str = "auto",
    num_threads: int | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Engine:
    """Check the checkpoint, read it, and return an engine that is ready to step.

    ``quant`` says what linear weights become that are not quantized yet, ``activations`` what integer codes meet.
    ``on_bytes`` is told how many bytes have been read so far, from several threads.
    Raises CheckpointError (nothing is read before every name, shape and dtype is right), ConfigError, PlanError.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    has_mtp = check_tensors(config, checkpoint.tensors)
    kv_dtype = choose_kv_dtype(kv_dtype, checkpoint.tensors)
    context, num_blocks = kv_budget(config, kv_dtype, context, max_batch, free_bytes(checkpoint, quant))
    model = glm4_moe.build(
        config,
        WeightReader(checkpoint.tensors, on_bytes, quant, choose_activations(activations, checkpoint.tensors)),
        max_positions=context,
        has_mtp=has_mtp,
        num_threads=num_threads or len(os.sched_getaffinity(0)),
    )
    kv_cache = KVCache.allocate(
        config.num_hidden_layers, num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim, kv_dtype
    )
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        context=context,
        max_batch=max_batch,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )
    return Engine(ModelRunner(model, kv_cache), scheduler)


def free_bytes(checkpoint: Checkpoint, quant: Quant = "keep") -> int:
    """Memory that is left for KV once the weights are loaded. Raises PlanError when they alone do not fit."""
    available, needed = memory.available_bytes(), loaded_bytes(checkpoint.tensors, quant)
    if needed > available:
        raise PlanError(
            f"{checkpoint.path.name} does not fit: its weights are {format_bytes(needed)}, but "
            f"{format_bytes(available)} of memory are free; close other programs or take a smaller quantization"
        )
    return available - needed


def kv_budget(config: ModelConfig, kv_dtype: str, context: int | None, max_batch: int, free: int) -> tuple[int, int]:
    """Context in tokens and number of KV blocks. Without a wish: the model's limit, or what half the free memory holds.

    The pool serves ``max_batch`` full contexts where memory allows, and never fewer than one.
    """
    limit = config.max_position_embeddings
    bytes_per_token = config.kv_bytes_per_token(kv_dtype)
    affordable = int(free * KV_FRACTION) // bytes_per_token // BLOCK_SIZE * BLOCK_SIZE
    if context is None:
        context = min(limit, affordable)
        if context < BLOCK_SIZE:
            raise PlanError(
                f"no memory for a context: {format_bytes(bytes_per_token)} of KV per token, {format_bytes(free)} free"
            )
    elif not 1 < context <= limit:
        raise ConfigError(f"--context is {context}, wanted 2 to {limit} (the model's max_position_embeddings)")
    elif context * bytes_per_token > free:
        hint = _smaller_dtype(config, kv_dtype, context, free)
        raise PlanError(
            f"--context {context} needs {format_bytes(context * bytes_per_token)} for the KV cache, but "
            f"{format_bytes(free)} are free beside the weights; --context {affordable} would fit{hint}"
        )
    num_tokens = max(context, min(context * max_batch, affordable))
    return context, -(-num_tokens // BLOCK_SIZE)


def _smaller_dtype(config: ModelConfig, kv_dtype: str, context: int, free: int) -> str:
    """A hint, where a KV cache of a narrower dtype would hold the context."""
    smaller = [name for name in KV_DTYPES if config.kv_bytes_per_token(name) < config.kv_bytes_per_token(kv_dtype)]
    fitting = [name for name in smaller if context * config.kv_bytes_per_token(name) <= free]
    return f", or --kv-dtype {fitting[0]}" if fitting else ""
