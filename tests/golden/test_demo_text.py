"""The demo model itself: its greedy text, token for token, against transformers on the dequantized weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from glmlocal import LLM
from glmlocal.demo.cache import cached_demo
from glmlocal.formats.index import open_checkpoint
from glmlocal.models.weights import WeightReader
from glmlocal.paths import demo_dir

NUM_TOKENS = 128
COPIED_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "use_qk_norm",
    "attention_bias",
    "routed_scaling_factor",
    "norm_topk_prob",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    if cached_demo(demo_dir()) is None:
        pytest.skip("the demo model is not in the cache; `glmlocal show demo` fetches it")
    with LLM("demo", context=512, kv_dtype="fp32") as model:
        yield model


@pytest.fixture(scope="module")
def reference(llm: LLM) -> Glm4MoeForCausalLM:
    """transformers' model with the file's weights, dequantized to fp32."""
    checkpoint = open_checkpoint(cached_demo(demo_dir()))
    ours = llm.config
    rope = {"rope_type": "default", "rope_theta": ours.rope_theta, "partial_rotary_factor": ours.partial_rotary_factor}
    fields = {name: getattr(ours, name) for name in COPIED_FIELDS}
    config = Glm4MoeConfig(**fields, rope_parameters=rope, pad_token_id=None)
    model = Glm4MoeForCausalLM(config).eval()
    weight = WeightReader(checkpoint.tensors, lambda num_bytes: None).dense
    state = {}
    for name in model.state_dict():
        prefix, _, last = name.rpartition(".")
        experts = range(config.n_routed_experts)
        if name == "lm_head.weight":
            state[name] = weight("model.embed_tokens.weight")
        elif last == "gate_up_proj":
            halves = [[weight(f"{prefix}.{e}.{part}_proj.weight") for part in ("gate", "up")] for e in experts]
            state[name] = torch.stack([torch.cat(pair) for pair in halves])
        elif prefix.endswith("experts") and last == "down_proj":
            state[name] = torch.stack([weight(f"{prefix}.{e}.down_proj.weight") for e in experts])
        else:
            state[name] = weight(name)
    model.load_state_dict(state)
    return model


def test_the_weights_that_the_reference_has_are_those_of_the_gguf_package(
    llm: LLM, reference: Glm4MoeForCausalLM
) -> None:
    """Ours dequantized them above: hold that against gguf's own."""
    file = GGUFReader(cached_demo(demo_dir()))
    theirs = {tensor.name: tensor for tensor in file.tensors}
    state = reference.state_dict()
    for ours, name in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.3.mlp.experts.down_proj": "blk.3.ffn_down_exps.weight",
        "model.layers.7.self_attn.k_proj.weight": "blk.7.attn_k.weight",
    }.items():
        tensor = theirs[name]
        assert torch.equal(state[ours], torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)))


@torch.no_grad()
def test_greedy_text_equals_transformers_over_128_tokens(llm: LLM, reference: Glm4MoeForCausalLM) -> None:
    prompt = llm.tokenizer.encode("The history of the lighthouse began")
    ours = llm.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    assert list(ours) == theirs.tolist()


@torch.no_grad()
def test_logits_equal_transformers(llm: LLM, reference: Glm4MoeForCausalLM) -> None:
    tokens = llm.tokenizer.encode("Paris is the capital of France, and Rome is the capital of Italy. 12 × 7 = 84.")
    want = reference(torch.tensor([tokens])).logits[0]
    assert float((llm.logits(tokens) - want).abs().max() / (want.max() - want.min())) < 1e-4


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    answer = llm.chat(QUESTION, temperature=0, max_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.reasoning == ""
