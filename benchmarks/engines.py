"""The engines that benchmarks compare, each run as a worker: ``python engines.py NAME`` answers calls on stdin.

All have the same operations on token ids and time only their own work: what an application would wait for, with
nothing but a greedy choice on top. Imports at the top are of the standard library, as the worker may run in another
interpreter.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from _common import serve

TIE = 0.02  # of the range of the logits, as bf16 is allowed: tokens this close to the best may be chosen as well
MAX_BATCH = 512  # tokens of a prompt that are computed at once


class Engine(Protocol):
    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """``tokens``, and where the engine shows its logits ``near``: at each step the ids within TIE of the best."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""

    def decode(self, prompt: list[int], num_tokens: int) -> float:
        """Seconds for ``num_tokens`` tokens after the first one."""

    def encode(self, text: str) -> list[int] | None:
        """Token ids, None where the engine has no tokenizer."""

    def vocab_size(self) -> int: ...


class _StepEngine:
    """An engine that is driven step by step: ``_forward`` returns the logits after the last of the given tokens."""

    def _reset(self) -> None:
        raise NotImplementedError

    def _forward(self, tokens: list[int]) -> Any:
        raise NotImplementedError

    def _tokens(self, prompt: list[int]) -> Iterator[Any]:
        self._reset()
        logits = self._forward(prompt)
        while True:
            yield logits
            logits = self._forward([int(logits.argmax())])

    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        tokens, near = [], []
        for logits, _ in zip(self._tokens(prompt), range(num_tokens), strict=False):
            best = float(logits.max())
            tokens.append(int(logits.argmax()))
            floor = best - TIE * (best - float(logits.min()))
            near.append([token for token, logit in enumerate(logits.tolist()) if logit >= floor])
        return {"tokens": tokens, "near": near}

    def prefill(self, prompt: list[int]) -> float:
        self._reset()
        start = time.perf_counter()
        int(self._forward(prompt).argmax())
        return time.perf_counter() - start

    def decode(self, prompt: list[int], num_tokens: int) -> float:
        self._reset()
        token = int(self._forward(prompt).argmax())
        start = time.perf_counter()
        for _ in range(num_tokens):
            token = int(self._forward([token]).argmax())
        return time.perf_counter() - start


class LlamaCpp(_StepEngine):
    """llama.cpp through the C functions of llama-cpp-python: its defaults, and logits of the last token only.

    ``only_mapped``: weights stay in the mapped file; by default it copies them into another order, into memory.
    """

    def __init__(self, model: str, threads: int, context: int, only_mapped: bool = False) -> None:
        import numpy as np

        llama_cpp = import_module("llama_cpp")
        self._llama, self._np = llama_cpp, np
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = not only_mapped
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, MAX_BATCH, MAX_BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for a context of {context} tokens")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def _reset(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _forward(self, tokens: list[int]) -> Any:
        for start in range(0, len(tokens), MAX_BATCH):
            part = self._np.array(tokens[start : start + MAX_BATCH], self._np.int32)
            pointer = part.ctypes.data_as(self._llama.llama_batch_get_one.argtypes[0])
            if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(pointer, len(part))):
                raise RuntimeError("llama_decode failed")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return self._np.ctypeslib.as_array(logits, (self._vocab_size,))

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (self._llama.llama_token * len(data))()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, len(data), False, False)
        return [int(token) for token in tokens[:count]]

    def vocab_size(self) -> int:
        return int(self._vocab_size)


class Transformers(_StepEngine):
    """transformers' Glm4MoeForCausalLM on the file's weights, dequantized to fp32."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import torch

        transformers = import_module("transformers")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._new_cache = torch, transformers.DynamicCache
        config, weights = dequantized(Path(model))
        self._model = transformers.Glm4MoeForCausalLM(config).eval()
        missing, unexpected = self._model.load_state_dict(weights, strict=False, assign=True)
        if config.tie_word_embeddings:
            self._model.tie_weights()
        if unexpected or set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
            raise RuntimeError(f"{model} lacks {sorted(missing)[:3]} or has too much: {sorted(unexpected)[:3]}")
        parameters = inspect.signature(inspect.unwrap(self._model.forward)).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # until transformers 5.23
        self._cache = self._new_cache()

    def _reset(self) -> None:
        self._cache = self._new_cache()

    def _forward(self, tokens: list[int]) -> Any:
        for start in range(0, len(tokens), MAX_BATCH):
            ids = self._torch.tensor([tokens[start : start + MAX_BATCH]])
            out = self._model(ids, **{self._cache_name: self._cache}, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].numpy()

    def encode(self, text: str) -> None:
        return None  # the file's tokenizer is not rebuilt for transformers

    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn_{a}": f"self_attn.{b}" for a, b in zip("qkv", ("q_proj", "k_proj", "v_proj"), strict=True)},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}


def dequantized(path: Path) -> tuple[Any, dict[str, Any]]:
    """A glm4moe GGUF as transformers' config and fp32 state dict, without the MTP layer.

    Read with the ``gguf`` package alone, so that a mistake of our own reader cannot hide.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    field = {name: value.contents() for name, value in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Any:
        # A copy: fp32 tensors are mapped read-only.
        return torch.from_numpy(np.array(dequantize(tensors[name].data, tensors[name].tensor_type), np.float32))

    config = _config(field, tensors)
    weights = {"model.embed_tokens.weight": read("token_embd.weight"), "model.norm.weight": read("output_norm.weight")}
    if "output.weight" in tensors:
        weights["lm_head.weight"] = read("output.weight")
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        for name in (name.removeprefix(theirs) for name in tensors if name.startswith(theirs)):
            module, _, kind = name.rpartition(".")
            if module in _LAYER_NAMES:
                weights[f"{ours}{_LAYER_NAMES[module]}.{kind}"] = read(theirs + name)
        if layer >= config.first_k_dense_replace:
            gate, up, down = (read(f"{theirs}ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
            weights[f"{ours}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            weights[f"{ours}mlp.experts.down_proj"] = down
            weights[f"{ours}mlp.gate.e_score_correction_bias"] = read(f"{theirs}exp_probs_b.bias")
    return config, weights


def _config(field: dict[str, Any], tensors: dict[str, Any]) -> Any:
    def get(name: str, default: Any = None) -> Any:
        return field.get(f"glm4moe.{name}", default)

    head_dim = get("attention.key_length")
    rotary = get("rope.dimension_count", head_dim)
    return import_module("transformers").Glm4MoeConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count") - get("nextn_predict_layers", 0),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=head_dim,
        moe_intermediate_size=get("expert_feed_forward_length"),
        n_routed_experts=get("expert_count"),
        num_experts_per_tok=get("expert_used_count"),
        n_shared_experts=get("expert_shared_count"),
        n_group=get("expert_group_count", 1),
        topk_group=get("expert_group_used_count", 1),
        first_k_dense_replace=get("leading_dense_block_count"),
        norm_topk_prob=get("expert_weights_norm", False),
        routed_scaling_factor=get("expert_weights_scale", 1.0),
        use_qk_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": get("rope.freq_base", 10000.0),
            "partial_rotary_factor": rotary / head_dim,
        },
    )


class Glmlocal:
    """glmlocal as its Python API gives it: a streamed answer, detokenized."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        from glmlocal import LLM

        self._llm = LLM(model, context=context, threads=threads, max_batch=1)

    def _stream(self, prompt: list[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        deltas = self._llm.generate(
            prompt, stream=True, temperature=0.0, max_tokens=num_tokens, ignore_eos=True, repetition_penalty=1.0
        )
        for delta in deltas:
            if delta.token_ids:
                yield delta.token_ids

    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        return {"tokens": [token for tokens in self._stream(prompt, num_tokens) for token in tokens]}

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        next(self._stream(prompt, 1))
        return time.perf_counter() - start

    def decode(self, prompt: list[int], num_tokens: int) -> float:
        stream = self._stream(prompt, num_tokens + 1)
        first = len(next(stream))
        start = time.perf_counter()
        rest = sum(len(tokens) for tokens in stream)
        elapsed_s = time.perf_counter() - start
        if first + rest != num_tokens + 1:
            raise RuntimeError(f"glmlocal stopped after {first + rest} of {num_tokens + 1} tokens")
        return elapsed_s * num_tokens / rest

    def encode(self, text: str) -> list[int]:
        return list(self._llm.tokenizer.encode(text))

    def vocab_size(self) -> int:
        return int(self._llm.config.vocab_size)


ENGINES: dict[str, Callable[..., Engine]] = {"glmlocal": Glmlocal, "llama.cpp": LlamaCpp, "transformers": Transformers}

if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]])
